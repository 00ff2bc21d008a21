"""Evaluation: the strongest rival of an adapter, the KV cache of the video's prefix, computed once and reused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modeling.streaming import keep_rope_deltas
from ..modeling.vision import embed_frames
from .condition import Decoding, PreparedSample, Reply, batches_of
from .condition_video import VideoInContext
from .samples import Answer, Sample


@dataclass(frozen=True, eq=False)
class Prefix:
    """The base's KV cache of the beginning that the turns of a video share.

    Attributes:
        cache: of one row; copy it to go on from it.
        length: tokens in it, all visual ones among them.
    """

    cache: Any
    length: int


class CacheCondition(VideoInContext):
    """The video in the context, but the part before the question is computed once a video and its KV cache reused.

    The prefix is the longest beginning that the tokens of all its turns share, so no token differs from `video`'s.
    Batches hold questions of one video.
    """

    name = "kv_cache"

    def prompts_with_video(self, sample: Sample) -> Sequence[str]:
        return [question.prompt for question in sample.questions]

    def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
        replies, seconds = [], []
        for prepared in batch:
            turns = self.turns(prepared, prepared.prompts)
            start = self.now()
            prefix = self.encode_prefix(prepared.internalization, turns)
            seconds.append(self.now() - start)
            replies.append(self._continue(prefix, turns, decoding))
        return self.make_answers(replies, [prepared.num_frames for prepared in batch], seconds)

    @torch.no_grad()
    def encode_prefix(self, internalization: Mapping[str, Tensor], turns: Sequence[Mapping[str, Tensor]]) -> Prefix:
        """Run the base over the beginning that a video's turns share.

        Args:
            internalization: the internalization turn, which asks something else: the beginning ends before the text.
            turns: with all questions about that video.

        Raises:
            ValueError: the chat template puts text before the video.
        """
        ids = internalization["input_ids"][0]
        length = min(_shared(ids, turn["input_ids"][0]) for turn in turns)
        # the first token of an answer comes of a token that is not in the cache
        length = min(length, *(turn["input_ids"].shape[1] - 1 for turn in turns))
        if self.processor.count_visual_tokens(ids[length:]):
            raise ValueError(
                "the turns of a video differ before its last visual token, so they share no prefix with the whole "
                "video: its KV cache cannot be reused with a chat template that puts text before the video."
            )
        whole = len(ids)
        inputs = {
            name: value[:, :length] if value.shape == (1, whole) else value for name, value in internalization.items()
        }
        with keep_rope_deltas(self.vlm):
            embedded = embed_frames(self.vlm, self.to_vlm(inputs))
            output = getattr(self.vlm, "base_model", self.vlm)(**embedded, use_cache=True)
        return Prefix(output.past_key_values, length)

    @torch.no_grad()
    def _continue(self, prefix: Prefix, turns: Sequence[Mapping[str, Tensor]], decoding: Decoding) -> list[Reply]:
        replies, lengths = [], [turn["input_ids"].shape[1] for turn in turns]
        for place in batches_of(lengths, decoding.batch_size, tokens_at_once=self.tokens_at_once):
            rows = turns[place]
            start = self.now()
            inputs = self._behind(prefix, rows)
            cache = copy.deepcopy(prefix.cache)
            cache.batch_repeat_interleave(len(rows))
            copying = self.now() - start
            generated, seconds = self.generate(inputs, decoding.max_new_tokens, past_key_values=cache)
            for turn, token_ids in zip(rows, generated, strict=True):
                ids = turn["input_ids"]
                visual = self.processor.count_visual_tokens(ids)
                replies.append(Reply(token_ids, ids.shape[1], visual, (copying + seconds) / len(rows)))
        return replies

    def _behind(self, prefix: Prefix, turns: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The turns with their padding between the prefix, whose places in the cache are fixed, and the rest."""
        width = max(turn["input_ids"].shape[1] for turn in turns)
        rows: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "position_ids": []}
        for turn in turns:
            ids = turn["input_ids"]
            filled = {
                "input_ids": (ids, self.processor.pad_token_id),
                "attention_mask": (torch.ones_like(ids), 0),
                "position_ids": (self._positions(turn), 0),
            }
            for name, (tensor, fill) in filled.items():
                head, rest = tensor[..., : prefix.length], tensor[..., prefix.length :]
                gap = tensor.new_full((*tensor.shape[:-1], width - ids.shape[1]), fill)
                rows[name].append(torch.cat([head, gap, rest], dim=-1))
        return {name: torch.cat(tensors, dim=-2) for name, tensors in rows.items()}

    def _positions(self, turn: Mapping[str, Tensor]) -> Tensor:
        """Position ids `[..., 1, tokens]` that generation gives to the whole turn.

        Those of the rest do not follow from the prefix alone: Qwen2.5-VL's video may reach further in time than the
        text behind it.
        """
        inputs = self.to_vlm({name: value for name, value in turn.items() if not name.startswith("pixel_")})
        with keep_rope_deltas(self.vlm):
            prepare: Any = self.vlm._prepare_position_ids_for_generation
            positions: Tensor = prepare(inputs.pop("input_ids"), inputs)
        return positions.to(turn["input_ids"].device)


def _shared(first: Tensor, second: Tensor) -> int:
    """How many tokens two rows begin with alike."""
    length = min(len(first), len(second))
    different = (first[:length] != second[:length]).nonzero()
    return int(different[0]) if len(different) else length
