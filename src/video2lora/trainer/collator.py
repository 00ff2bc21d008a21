"""Trainer: from rows of a dataset to a batch, decoding in the data loader's workers."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.errors import DatasetError
from ..modeling.processor import Video2LoraProcessor
from ..video import VideoError, VideoReader

if TYPE_CHECKING:
    from ..video import VideoFrames


class Video2LoraCollator:
    """Makes batches for [`Video2LoraModel.forward`] from rows of [`load_rows`].

    Decoding happens here, so in the workers of the data loader. A video that cannot be read is left out, with its
    error in `skipped`; a batch with nothing left is one dummy video of weight zero, so that every process takes part
    in every collective. What is random (segments, choice of queries, number of frames) follows from seed, epoch and
    row id alone: a resumed run draws what it would have drawn.

    Args:
        processor: the model's processor.
        seed: of the random choices.
        composition_probability, max_segments, max_queries_per_video, num_frames_range: as in
            [`Video2LoraTrainingArguments`].
        online_teacher: also prepare the turns with the video in their context (`teacher_inputs`).
        pack_queries: put a video's turns one behind the other in a row (`turns` of [`Video2LoraModel.forward`]), or in
            several: as wide as makes the batch smallest, 4 times the longest turn at most.
        pixel_dtype: the base's, to which its inputs are rounded anyway: half as much then travels from the workers to
            the device. As the processor makes them by default.
        training: whether to draw; validation takes all queries, whole videos and the processor's number of frames.
    """

    def __init__(
        self,
        processor: Video2LoraProcessor,
        seed: int = 0,
        composition_probability: float = 0.0,
        max_segments: int = 2,
        max_queries_per_video: int | None = None,
        online_teacher: bool = False,
        training: bool = True,
        num_frames_range: Sequence[int] | None = None,
        pack_queries: bool = False,
        pixel_dtype: torch.dtype | None = None,
    ) -> None:
        self.processor = processor
        self.seed = seed
        self.composition_probability = composition_probability if training else 0.0
        self.max_segments = max_segments
        self.max_queries_per_video = max_queries_per_video if training else None
        self.num_frames_range = num_frames_range if training else None
        self.online_teacher = online_teacher
        self.pack_queries = pack_queries
        self.pixel_dtype = pixel_dtype
        # shared with the workers, which hold copies of this collator
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw what belongs to this epoch from now on, in the workers too."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            rows: as [`load_rows`] gives them: `id`, `video`, `start`, `end`, `queries`; `video` may also be frames in
                memory.

        Returns:
            `input_ids`, `attention_mask`, `labels` `[queries, tokens]`, or `[rows, tokens]` with `turns` where queries
            are packed; `video_inputs`, a row for each segment but the
            frames packed (see [`Video2LoraProcessor.pad`]); `queries_per_video` and `segments_per_adapter`, lists;
            `query_weights` `[queries]`, 0 for a dummy; `num_videos`, the rows given; `kept`, which of them are in the
            batch; `skipped`, a message for each video left out; `query_ids`, (row id, number) of each query; and
            `teacher_inputs` where asked for, packed too.

        Raises:
            DatasetError: no row of that form, or a query without a response.
            ValueError, RuntimeError: whatever else goes wrong with a video (its base's processor may refuse it), with
                the row's id and video in the message and the error as its cause.
        """
        samples, skipped, kept = [], [], []
        for place, row in enumerate(rows):
            draw = self._random(_check_row(row)["id"])
            queries = self._choose(row, draw)
            try:
                samples.append(self._sample(row, queries, draw))
                kept.append(place)
            except VideoError as error:
                skipped.append(f"{row['id']}: {error}")
            except Exception as error:
                kind = ValueError if isinstance(error, ValueError) else RuntimeError
                raise kind(f"{_describe(row)}: {type(error).__name__}: {error}") from error
        weight = 1.0 if samples else 0.0
        batch = self._join(samples or [self._dummy()])
        batch["query_weights"] = torch.full((len(batch["query_ids"]),), weight)
        return batch | {"num_videos": len(rows), "kept": kept or [0], "skipped": skipped}

    def _choose(self, row: Mapping[str, Any], draw: random.Random) -> list[tuple[int, Mapping[str, str]]]:
        """The queries of this epoch with their numbers, in their order."""
        queries, limit = list(enumerate(row["queries"])), self.max_queries_per_video
        if limit is not None and len(queries) > limit:
            queries = [queries[i] for i in sorted(draw.sample(range(len(queries)), limit))]
        if not queries:
            raise DatasetError(f"row {row['id']!r} has no queries: run check_rows on the dataset.")
        missing = [number for number, query in queries if query["response"] is None]
        if missing:
            raise DatasetError(
                f"row {row['id']!r} has no response to query {missing[0]}: let a teacher fill it (`video2lora teach`)."
            )
        return queries

    def _sample(
        self, row: Mapping[str, Any], queries: Sequence[tuple[int, Mapping[str, str]]], draw: random.Random
    ) -> dict[str, Any]:
        """One row: its segments' inputs and its turns' tokens."""
        with VideoReader(row["video"], longest_edge=self.processor.longest_edge) as reader:
            whole, segments = self._read(reader, row, draw)
        turns = [self.processor.encode_turn(query["prompt"], query["response"]) for _, query in queries]
        sample: dict[str, Any] = {
            "segments": [self._rounded(self.processor.encode_video(segment)) for segment in segments],
            "turns": turns,
            "query_ids": [(row["id"], number) for number, _ in queries],
        }
        if self.online_teacher:
            sample["teacher"] = [self._teacher_turn(whole, query["prompt"], query["response"]) for _, query in queries]
        return sample

    def _read(
        self, reader: VideoReader, row: Mapping[str, Any], draw: random.Random
    ) -> tuple[VideoFrames, list[VideoFrames]]:
        """The row's span, and what is read of it: the span itself, or its segments, to be composed."""
        count = 1
        if draw.random() < self.composition_probability:
            count = draw.randint(2, self.max_segments)
        num_frames = self._num_frames(draw)
        whole = reader.sample(num_frames=num_frames, start=row.get("start"), end=row.get("end"))
        return whole, [whole] if count == 1 else self._segments(reader, whole, count, num_frames)

    def _num_frames(self, draw: random.Random) -> int:
        """Frames of this video, or of each of its segments: log-uniform, so that every doubling is as likely."""
        if self.num_frames_range is None:
            return self.processor.num_frames
        least, most = self.num_frames_range
        return min(int(math.exp(draw.uniform(math.log(least), math.log(most + 1)))), most)

    def _segments(self, reader: VideoReader, whole: VideoFrames, count: int, num_frames: int) -> list[VideoFrames]:
        """Equal consecutive parts of a span; fewer where the video has not that many frames."""
        times = reader.times
        frames = int(((times >= whole.start) & (times < whole.end)).sum())
        count = max(1, min(count, frames))
        edges = torch.linspace(whole.start, whole.end, count + 1, dtype=torch.float64).tolist()
        spans = zip(edges, edges[1:], strict=False)
        return [reader.sample(num_frames=num_frames, start=a, end=b) for a, b in spans]

    def _teacher_turn(self, frames: VideoFrames, prompt: str, response: str) -> dict[str, Tensor]:
        """The turn with the video in its context."""
        question = self.processor.encode_video(frames, prompt, add_generation_prompt=True)
        return self._rounded(self.processor.append_response(question, prompt, response))

    def _rounded(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs whose pixels are what the model will make of them."""
        if self.pixel_dtype is None:
            return inputs
        # as the model does: a number for each video is none of the pixels
        pixels = {name for name, value in inputs.items() if value.is_floating_point() and value.dim() > 1}
        return {name: value.to(self.pixel_dtype) if name in pixels else value for name, value in inputs.items()}

    def _join(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self.pack_queries:
            batch: dict[str, Any] = self._pack_turns([sample["turns"] for sample in samples])
        else:
            batch = self.processor.pad_turns([turn for sample in samples for turn in sample["turns"]])
        segments = [part for sample in samples for part in sample["segments"]]
        batch["video_inputs"] = dict(self.processor.pad(segments, pack_frames=True))
        batch["queries_per_video"] = [len(sample["turns"]) for sample in samples]
        batch["segments_per_adapter"] = [len(sample["segments"]) for sample in samples]
        batch["query_ids"] = [query_id for sample in samples for query_id in sample["query_ids"]]
        if self.online_teacher:
            teacher = [turn for sample in samples for turn in sample["teacher"]]
            batch["teacher_inputs"] = dict(self.processor.pad(teacher, pack_frames=True))
        return batch

    def _pack_turns(self, videos: Sequence[Sequence[tuple[list[int], list[int]]]]) -> dict[str, Tensor]:
        """Turns of several videos in as few tokens as rows of one length take."""
        rows = []
        for turns, counts in zip(videos, _rows(videos), strict=True):
            left = iter(turns)
            rows += [list(islice(left, count)) for count in counts]
        joined = [(list(chain(*(ids for ids, _ in row))), list(chain(*(labels for _, labels in row)))) for row in rows]
        batch = self.processor.pad_turns(joined)
        batch["turns"] = torch.zeros_like(batch["input_ids"])
        for numbers, row in zip(batch["turns"], rows, strict=True):
            lengths = torch.tensor([len(ids) for ids, _ in row])
            numbers[: int(lengths.sum())] = torch.arange(1, len(row) + 1).repeat_interleave(lengths)
        return batch

    def _dummy(self) -> dict[str, Any]:
        """Something to run on where no video of a batch could be read."""
        frames = self.processor.load_video(torch.full((1, 8, 8, 3), 128, dtype=torch.uint8))
        turn = self.processor.encode_turn("?", "?")
        sample = {
            "segments": [self._rounded(self.processor.encode_video(frames))],
            "turns": [turn],
            "query_ids": [("", 0)],
        }
        return sample | ({"teacher": [self._teacher_turn(frames, "?", "?")]} if self.online_teacher else {})

    def _random(self, row_id: str) -> random.Random:
        key = f"{self.seed}\x1f{int(self._epoch)}\x1f{row_id}".encode()
        return random.Random(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))


def _rows(videos: Sequence[Sequence[tuple[list[int], list[int]]]]) -> list[list[int]]:
    """How many turns go into each row of each video, for the width that makes the batch smallest."""
    lengths = [[len(ids) for ids, _ in turns] for turns in videos]
    longest = max(max(video) for video in lengths)
    widest = min(max(longest, *map(sum, lengths)), 4 * longest)
    # the widest, which leaves most videos whole, wins a draw
    widths = range(widest, longest - 1, -max(1, (widest - longest) // 32))
    layouts = [[_fill(video, width) for video in lengths] for width in widths]
    return min(layouts, key=lambda layout: _size(layout, lengths))


def _fill(lengths: Sequence[int], width: int) -> list[int]:
    """Numbers of consecutive turns that fit into rows of a width."""
    counts, used = [0], 0
    for length in lengths:
        if counts[-1] and used + length > width:
            counts.append(0)
            used = 0
        counts[-1] += 1
        used += length
    return counts


def _size(layout: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]]) -> int:
    """Tokens of the batch, padding included."""
    widest = 0
    for counts, video in zip(layout, lengths, strict=True):
        left = iter(video)
        widest = max(widest, *(sum(islice(left, count)) for count in counts))
    return widest * sum(map(len, layout))


def _check_row(row: Any) -> Mapping[str, Any]:
    """Refuse what a dataset of one's own may give instead of a row."""
    if not isinstance(row, Mapping) or not {"id", "video", "queries"} <= set(row):
        given = f"the keys {sorted(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
        raise DatasetError(
            f"expected a row with id, video, queries (and start, end where it is a span), got {given}: load_rows "
            "makes such rows of every other form."
        )
    return row


def _describe(row: Mapping[str, Any]) -> str:
    """A row's id, and its video if that has a name."""
    video = row["video"]
    name = video.get("path") if isinstance(video, Mapping) else video
    return f"row {row['id']!r}" + (f" (video {name})" if isinstance(name, (str, os.PathLike)) else "")
