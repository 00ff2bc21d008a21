"""Moving shapes, ablations: clips prepared once for all variants, and a variant's own view of them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from batches import FRAMES, TURN, Form, Prefixes
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from train_hypernetwork import TRAINED_TASKS

from video2lora import Video2LoraProcessor
from video2lora.data.files import write_atomically
from video2lora.data.moving_shapes import TASKS, MovingShapes, make_queries
from video2lora.modeling.processor import IGNORE_INDEX
from video2lora.modeling.vision import embed_frames
from video2lora.trainer.collator import Video2LoraCollator

MAX_SEGMENTS = 4
CLIP_FRAMES = FRAMES * MAX_SEGMENTS  # seconds too: every segment has 12 frames of its own
CUT = 0.3  # share of training clips that are also kept as segments
WHOLE, SEGMENTS = "whole", "segments"
FORMS = {WHOLE: 1, "2 segments": 2, "4 segments": 4}  # of validation clips
SETTINGS = "prepared.json"
Answers = Literal["true", "own", "captions"]


@dataclass(frozen=True)
class Budget:
    """What every variant gets.

    Attributes:
        steps: of training.
        clips: a step.
        queries: about each clip.
        validation: clips that variants are scored on.
    """

    steps: int = 800
    clips: int = 128
    queries: int = 4
    validation: int = 1024

    @property
    def validation_batches(self) -> int:
        return -(-self.validation // self.clips)


# --- preparing -------------------------------------------------------------------------------------------------------


class CollatedClips(Dataset):
    """Clips by the batch, as the library's collator makes them; for a data loader's workers.

    Item i is `(tensors, video inputs of each group)`: what is asked about the clips, and the clips whole and in
    segments.

    Args:
        processor: of the model.
        split: "train", or "validation", with one question of every task and all clips in every one of `FORMS`.
        clips: a batch.
        queries: about each clip of training; its caption is a further one.
        dtype: of the pixels, the base's.
    """

    def __init__(
        self, processor: Video2LoraProcessor, split: str, clips: int, queries: int, dtype: torch.dtype
    ) -> None:
        self.processor, self.split, self.clips, self.dtype = processor, split, clips, dtype
        asked: dict[str, Any] = {"queries_per_video": queries, "tasks": TRAINED_TASKS} if split == "train" else {}
        self.rows = MovingShapes(split, 10**9, num_frames=CLIP_FRAMES, **asked)
        self.whole = Video2LoraCollator(processor, training=False)
        self.cut = Video2LoraCollator(processor, composition_probability=1.0, max_segments=MAX_SEGMENTS)
        self.prefix = Prefixes(processor.tokenizer)(Form(FRAMES, CLIP_FRAMES))

    def __getitem__(self, number: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        rows = [self.rows[number * self.clips + i] for i in range(self.clips)]
        mine = [len(row["queries"]) for row in rows]
        if self.split == "train":
            rows = [self._with_caption(row, number * self.clips + i) for i, row in enumerate(rows)]
        batch = self.whole(rows)
        tensors = self._asked(rows, batch) | {"queries": torch.tensor(mine)}
        groups = {WHOLE: (batch["video_inputs"], [1] * len(rows)), **self._segments(rows, number)}
        starts = batch["video_inputs"]["input_ids"][:, : len(self.prefix)]
        if (starts != torch.tensor(self.prefix)).any():
            raise ValueError(
                "whole clips are rendered otherwise than batches.Prefixes says: the teacher would see others."
            )
        for group, (inputs, counts) in groups.items():
            mask = inputs["attention_mask"].bool()
            lengths = mask.sum(1).tolist()
            tensors |= pack(f"{group}.ids", inputs["input_ids"][mask].split(lengths))
            tensors[f"{group}.counts"] = torch.tensor(counts)
        videos = {group: self._to_dtype(inputs) for group, (inputs, counts) in groups.items() if sum(counts)}
        return tensors, videos

    def _with_caption(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        (query,) = make_queries(self.rows.scene(index), 1, tasks=("caption",))
        caption = {"prompt": query.prompt, "response": query.response, "task": query.task}
        return row | {"queries": [*row["queries"], caption]}

    def _asked(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Turns, how many of their tokens are answers, and their questions as they stand behind a clip."""
        queries = [query for row in rows for query in row["queries"]]
        mask = batch["attention_mask"].bool()
        turns = batch["input_ids"][mask].split(mask.sum(1).tolist())
        tokenizer = self.processor.tokenizer
        behind = [tokenizer(query["prompt"] + TURN, add_special_tokens=False)["input_ids"] for query in queries]
        return {
            **pack("turns", turns),
            **pack("behind", behind),
            "answers": (batch["labels"] != IGNORE_INDEX).sum(1),
            "tasks": torch.tensor([TASKS.index(query["task"]) for query in queries]),
            "prefix": torch.tensor(self.prefix),
        }

    def _segments(self, rows: Sequence[Mapping[str, Any]], number: int) -> dict[str, tuple[dict, list[int]]]:
        """Clips cut: some, by the collator; in validation all, into as many parts as a form has."""
        if self.split == "train":
            draw = random.Random(number)
            cut = [draw.random() < CUT for _ in rows]
            if not any(cut):
                nothing = torch.zeros(0, 1, dtype=torch.long)
                return {SEGMENTS: ({"input_ids": nothing, "attention_mask": nothing}, [0] * len(rows))}
            batch = self.cut([row for row, is_cut in zip(rows, cut, strict=True) if is_cut])
            counts = iter(batch["segments_per_adapter"])
            return {SEGMENTS: (batch["video_inputs"], [next(counts) if is_cut else 0 for is_cut in cut])}
        groups = {}
        for name, count in FORMS.items():
            if count > 1:
                parts = [part for row in rows for part in self._parts(row["video"], count)]
                groups[name] = (dict(self.processor.pad(parts)), [count] * len(rows))
        return groups

    def _parts(self, video: Any, count: int) -> Iterator[dict[str, Tensor]]:
        for i in range(count):
            span = {"start": CLIP_FRAMES * i / count, "end": CLIP_FRAMES * (i + 1) / count}
            yield self.processor.encode_video(self.processor.load_video(video, **span))

    def _to_dtype(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def prepare_clips(
    vlm: Any, processor: Video2LoraProcessor, folder: Path, budget: Budget, workers: int, until: float
) -> bool:
    """Write the batches that are not there yet, with what the frozen base's vision tower sees in place of pixels.

    It sees the same whatever the hypernetwork is, so it need not look in every run again.

    Returns:
        Whether all are there.
    """
    for split, number in (("validation", budget.validation_batches), ("train", budget.steps)):
        missing = [i for i in range(number) if not batch_file(folder, split, i).exists()]
        (folder / split).mkdir(parents=True, exist_ok=True)
        data = CollatedClips(processor, split, budget.clips, budget.queries, vlm.dtype)
        loader = DataLoader(data, sampler=missing, batch_size=None, num_workers=min(workers, len(missing)))
        for i, (tensors, videos) in zip(missing, loader, strict=True):
            for group, inputs in videos.items():
                tensors[f"{group}.visual"] = see(vlm, inputs)
            write_tensors(batch_file(folder, split, i), tensors)
            if time.time() > until:
                return i == missing[-1] and split == "train"
    return True


@torch.no_grad()
def see(vlm: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Visual tokens of all videos `[visual tokens, hidden_size]`, on the CPU."""
    moved = dict(inputs) | {name: inputs[name].to(vlm.device) for name in ("input_ids", "attention_mask")}
    return embed_frames(vlm, moved)["inputs_embeds"][moved["input_ids"] == vlm.config.image_token_id].cpu()


def batch_file(folder: Path, split: str, number: int) -> Path:
    return folder / split / f"{number:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file under another name first."""
    part = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part)
    os.replace(part, path)


def write_settings(folder: Path, vlm: Path, budget: Budget) -> None:
    """Note what is prepared, and for which base.

    Raises:
        SystemExit: the folder holds something else.
    """
    digest = hashlib.sha256((vlm / "model.safetensors").read_bytes()).hexdigest()
    settings = {"budget": asdict(budget), "vlm_sha256": digest}
    path = folder / SETTINGS
    if path.exists() and (found := json.loads(path.read_text())) != settings:
        raise SystemExit(f"{folder} was prepared otherwise ({found}, not {settings}): choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(settings, indent=1).encode())


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        ids: tokens of the turn without a clip.
        behind: tokens of the question behind a clip, to where the answer begins.
        answer: tokens, the last ones of `ids`.
        task: of `TASKS`.
    """

    ids: Tensor
    behind: Tensor
    answer: Tensor
    task: str

    def answered(self, answer: Tensor) -> Turn:
        """The same question with another answer."""
        question = self.ids[: len(self.ids) - len(self.answer)]
        return Turn(torch.cat([question, answer]), self.behind, answer, self.task)


class Clips:
    """A batch from its file.

    Attributes:
        turns: those of each clip; `captions`: the further one about each, where there is one.
    """

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path)
        turns = [
            Turn(ids, behind, ids[ids.shape[0] - answer :], TASKS[task])
            for ids, behind, answer, task in zip(
                unpack(self.tensors, "turns"),
                unpack(self.tensors, "behind"),
                self.tensors["answers"].tolist(),
                self.tensors["tasks"].tolist(),
                strict=True,
            )
        ]
        counts = self.tensors["queries"].tolist()
        captioned = (len(turns) - sum(counts)) // len(counts)
        rest = iter(turns)
        self.turns: list[list[Turn]] = []
        self.captions: list[list[Turn]] = []
        for count in counts:
            self.turns.append(list(islice(rest, count)))
            self.captions.append(list(islice(rest, captioned)))

    def videos(self, group: str, image_token_id: int) -> list[list[tuple[Tensor, Tensor]]]:
        """For each clip the videos that it is given as: token ids, and what stands in place of visual ones."""
        ids = unpack(self.tensors, f"{group}.ids")
        visual: Sequence[Tensor] = ()
        if ids:
            visual = self.tensors[f"{group}.visual"].split([int((row == image_token_id).sum()) for row in ids])
        rows = iter(zip(ids, visual, strict=True))
        return [list(islice(rows, count)) for count in self.tensors[f"{group}.counts"].tolist()]


def lay_out(rows: Sequence[tuple[Tensor, Tensor]], image_token_id: int, left: bool = False) -> dict[str, Tensor]:
    """Videos as token ids `[rows, tokens]`, -1 for padding, what stands in place of visual ones, and where."""
    ids = pad_rows([row for row, _ in rows], left)
    places = (ids.flatten() == image_token_id).nonzero()[:, 0]
    return {"ids": ids, "places": places, "visual": torch.cat([visual for _, visual in rows])}


def embed(vlm: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's inputs, where it is, of what `lay_out` returned: what it would itself make of pixels.

    Returns:
        `inputs_embeds` `[rows, tokens, hidden_size]`, `attention_mask`, and whatever else was in `inputs`.
    """
    moved = {name: value.to(vlm.device, non_blocking=True) for name, value in inputs.items()}
    ids, places, visual = (moved.pop(name) for name in ("ids", "places", "visual"))
    embeds = vlm.get_input_embeddings()(ids.clamp_min(0).flatten()).detach()
    embeds = embeds.index_copy(0, places, visual.to(embeds)).unflatten(0, ids.shape)
    return moved | {"inputs_embeds": embeds, "attention_mask": (ids >= 0).long()}


def in_context(clips: Clips, image_token_id: int) -> list[tuple[Turn, Tensor, Tensor]]:
    """Each turn with the tokens before its answer where the clip is in its context, and the visual ones."""
    prefix = clips.tensors["prefix"]
    return [
        (turn, torch.cat([prefix, turn.behind]), visual)
        for ((_, visual),), asked in zip(clips.videos(WHOLE, image_token_id), clips.turns, strict=True)
        for turn in asked
    ]


def teacher_inputs(clips: Clips, image_token_id: int) -> dict[str, Tensor]:
    """The turns with the clip in their context, laid out, and `labels`."""
    rows = in_context(clips, image_token_id)
    whole = [torch.cat([ids, turn.answer]) for turn, ids, _ in rows]
    inputs = lay_out([(ids, visual) for ids, (_, _, visual) in zip(whole, rows, strict=True)], image_token_id)
    return inputs | {"labels": labels_of(inputs["ids"], [turn.answer.shape[0] for turn, *_ in rows])}


class PreparedBatches(Dataset):
    """A variant's view of the prepared batches: whole inputs of [`Video2LoraModel.forward`], one an item.

    Only that videos are laid out and not yet embedded, which the base does faster where it is (`embed`).

    Args:
        folder: of `prepare`.
        steps: how many batches.
        processor: of the model.
        composition: give the clips that were cut as their segments.
        answers: true ones, the base's own with the clip in its context, or true ones to captions alone.
        teacher: add the turns with the clip in their context.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        processor: Video2LoraProcessor,
        composition: bool = True,
        answers: Answers = "true",
        teacher: bool = False,
    ) -> None:
        self.folder, self.steps = folder, steps
        self.pad_token_id, self.image_token_id = processor.pad_token_id, processor.vlm_processor.image_token_id
        self.composition, self.answers, self.teacher = composition, answers, teacher

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> dict[str, Any]:
        clips = Clips(batch_file(self.folder, "train", number))
        turns = clips.captions if self.answers == "captions" else clips.turns
        if self.answers == "own":
            own = iter(unpack(load_file(batch_file(self.folder, "answers", number)), "answers"))
            turns = [[turn.answered(next(own)) for turn in asked] for asked in turns]
        videos = clips.videos(WHOLE, self.image_token_id)
        if self.composition:
            cut = clips.videos(SEGMENTS, self.image_token_id)
            videos = [segments or whole for segments, whole in zip(cut, videos, strict=True)]
        batch = self.join(videos, turns)
        return batch | ({"teacher_inputs": teacher_inputs(clips, self.image_token_id)} if self.teacher else {})

    def join(
        self, videos: Sequence[Sequence[tuple[Tensor, Tensor]]], turns: Sequence[Sequence[Turn]]
    ) -> dict[str, Any]:
        """What the library's collator returns, for clips given as these videos."""
        flat = [turn for asked in turns for turn in asked]
        ids = pad_rows([turn.ids for turn in flat])
        return {
            "input_ids": torch.where(ids < 0, self.pad_token_id, ids),
            "attention_mask": (ids >= 0).long(),
            "labels": labels_of(ids, [turn.answer.shape[0] for turn in flat]),
            "video_inputs": lay_out([video for several in videos for video in several], self.image_token_id),
            "queries_per_video": [len(asked) for asked in turns],
            "segments_per_adapter": [len(several) for several in videos],
            "query_weights": torch.ones(len(flat)),
            "query_ids": [(str(i), j) for i, asked in enumerate(turns) for j in range(len(asked))],
            "num_videos": len(videos),
            "kept": list(range(len(videos))),
            "skipped": [],
        }

    def validation(self, number: int, form: str) -> tuple[dict[str, Any], list[str]]:
        """A batch of validation clips in one of `FORMS`, and the task of each question."""
        clips = Clips(batch_file(self.folder, "validation", number))
        batch = self.join(clips.videos(form, self.image_token_id), clips.turns)
        return batch, [turn.task for asked in clips.turns for turn in asked]


def pad_rows(rows: Sequence[Tensor], left: bool = False) -> Tensor:
    """Token ids `[rows, tokens]`, padded with -1 on the right (or left)."""
    lengths = torch.tensor([row.shape[0] for row in rows])[:, None]
    width = int(lengths.max())
    places = torch.arange(width)
    ids = torch.full((len(rows), width), -1)
    ids[places >= width - lengths if left else places < lengths] = torch.cat(list(rows))
    return ids


def labels_of(ids: Tensor, answers: Sequence[int]) -> Tensor:
    """Labels `[rows, tokens]` of padded token ids: the last so many of each row."""
    real = (ids >= 0).sum(1, keepdim=True)
    places = torch.arange(ids.shape[1])
    labelled = (places < real) & (places >= real - torch.tensor(answers)[:, None])
    return ids.masked_fill(~labelled, IGNORE_INDEX)


def pack(name: str, rows: Sequence[Any]) -> dict[str, Tensor]:
    """Rows of token ids one after the other, and their lengths."""
    values = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return {
        name: torch.cat([torch.zeros(0, dtype=torch.long), *values]),
        f"{name}.lengths": torch.tensor([len(row) for row in values]),
    }


def unpack(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Rows that `pack` has put together."""
    return list(tensors[name].split(tensors[f"{name}.lengths"].tolist()))
