"""Evaluation: no video in the context: no adapter, the video's adapter, another video's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..modeling import LoraWeights, Video2LoraModel, Video2LoraProcessor
from .condition import Condition, Decoding, PreparedSample, batches_of, expected_lengths
from .samples import Answer


class NoAdapterCondition(Condition):
    """The base that sees the question alone: what can be guessed."""

    name = "no_adapter"

    def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
        replies = self.reply_to_text(
            [prepared.prompts for prepared in batch], decoding, expected=expected_lengths(batch)
        )
        return self.make_answers(replies, [0] * len(batch), [0.0] * len(batch))


class Internalizing(Condition):
    """A condition that needs adapters of videos."""

    @torch.no_grad()
    def internalize(
        self, videos: Sequence[Sequence[dict[str, Tensor]]], batch_size: int
    ) -> tuple[list[LoraWeights], float]:
        """An adapter of each video's segments (internalization turns), and seconds in all."""
        segments = [turn for several in videos for turn in several]
        start = self.now()
        generated = [
            self.model.generate_segments(**self.processor.pad(segments[rows]))
            for rows in batches_of([turn["input_ids"].shape[1] for turn in segments], batch_size)
        ]
        adapters = self.model.hypernetwork.combine(generated, [len(several) for several in videos])
        return list(adapters), self.now() - start


class AdapterCondition(Internalizing):
    """The video's adapter and no visual token: a video is internalized once for all its questions.

    Args:
        segments: cut the span into so many equal parts, each with the run's number of frames, and compose them.
        keep_segments: which of them go into the adapter, in order; all by default. `(0,)` is the first part alone.

    Raises:
        ValueError: no segment, or one that does not exist.
    """

    name = "adapter"

    def __init__(
        self,
        model: Video2LoraModel,
        processor: Video2LoraProcessor,
        segments: int = 1,
        keep_segments: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, processor)
        keep = list(range(segments)) if keep_segments is None else list(keep_segments)
        exist = all(isinstance(place, int) and 0 <= place < segments for place in keep)
        if segments < 1 or not keep or len(set(keep)) < len(keep) or not exist:
            raise ValueError(
                f"segments={segments} and keep_segments={keep_segments}: expected at least one segment and different "
                f"ones of 0..{segments - 1} to keep."
            )
        self.num_segments, self.keep_segments = segments, keep
        if segments > 1:
            self.name = f"adapter_{segments}_segments"
            if keep != list(range(segments)):
                self.name = f"adapter_segment_{'_'.join(str(place + 1) for place in keep)}_of_{segments}"

    def settings(self) -> dict[str, Any]:
        return {"segments": self.num_segments, "keep_segments": self.keep_segments}

    def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
        parts = [self._parts(prepared) for prepared in batch]
        adapters, seconds = self.internalize([[turn for _, turn in several] for several in parts], decoding.batch_size)
        prompts = [prepared.prompts for prepared in batch]
        replies = self.reply_to_text(prompts, decoding, adapters, expected_lengths(batch))
        num_frames = [sum(frames for frames, _ in several) for several in parts]
        return self.make_answers(replies, num_frames, [seconds / len(batch)] * len(batch))

    def _parts(self, prepared: PreparedSample) -> list[tuple[int, dict[str, Tensor]]]:
        """Frames and internalization turn of each part of the video that goes into its adapter."""
        if self.num_segments == 1:
            return [(prepared.num_frames, prepared.internalization)]
        segments = prepared.segments.get(self.num_segments)
        if segments is None:
            raise ValueError(
                f"{prepared.sample.id} was not prepared in {self.num_segments} segments: give this condition to "
                "prepare_samples."
            )
        kept = [segments[place] for place in self.keep_segments]
        return [(len(segment.frames.frames), segment.internalization) for segment in kept]


class OtherAdapterCondition(Internalizing):
    """The adapter of another video, the partner's: what any adapter would do."""

    name = "other_adapter"
    needs_partner = True

    def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
        partners = [self._partner(prepared) for prepared in batch]
        # spans of one video have the same partner
        places = {sample_id: place for place, sample_id in enumerate(dict.fromkeys(p.sample.id for p in partners))}
        videos = {partner.sample.id: [partner.internalization] for partner in partners}
        adapters, seconds = self.internalize([videos[sample_id] for sample_id in places], decoding.batch_size)
        own = [adapters[places[partner.sample.id]] for partner in partners]
        prompts = [prepared.prompts for prepared in batch]
        replies = self.reply_to_text(prompts, decoding, own, expected_lengths(batch))
        num_frames = [partner.num_frames for partner in partners]
        extras = [partner.sample.id for partner in partners]
        return self.make_answers(replies, num_frames, [seconds / len(batch)] * len(batch), extras)

    @staticmethod
    def _partner(prepared: PreparedSample) -> PreparedSample:
        if prepared.partner is None:
            raise ValueError(
                f"{prepared.sample.id} was prepared without a partner: give this condition to prepare_samples."
            )
        return prepared.partner
