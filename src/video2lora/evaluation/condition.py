"""Evaluation: what every condition shares: prepared samples, greedy decoding, honest clocks, answers out of tokens."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..modeling import LoraWeights, Video2LoraModel, Video2LoraProcessor
from ..modeling.lora import stack_lora
from ..modeling.streaming import keep_rope_deltas
from ..video import VideoFrames
from .samples import Answer, Sample

# whatever the base's generation config says: every condition answers with the likeliest token and nothing else
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}

CONTEXT_TOKENS_AT_ONCE = 65536
"""Tokens of long contexts that share a batch: each has a KV cache, and padding a mask of its tokens squared."""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: always greedily, to the base's end of turn.

    Attributes:
        max_new_tokens: of an answer.
        batch_size: queries generated together.
    """

    max_new_tokens: int = 64
    batch_size: int = 8


@dataclass(frozen=True, eq=False)
class PreparedVideo:
    """Frames, and the internalization turn the base's processor makes of them (`[1, tokens]` and the pixels)."""

    frames: VideoFrames
    internalization: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class PreparedSample:
    """A sample ready for the model, made in worker threads ahead of it (`prepare_samples`).

    Attributes:
        sample: what is asked.
        frames: decoded once; every condition sees these very frames.
        internalization: the internalization turn of the frames, `[1, tokens]` and the pixels.
        partner: another video's, for `other_adapter`; None where no condition asks for it.
        turns: the video in context with a prompt behind it and the generation prompt, by that prompt. The pixels are
            the tensors of `internalization`, held once.
        segments: by their number n, n equal consecutive parts of the span, each with frames of its own.
    """

    sample: Sample
    frames: VideoFrames
    internalization: dict[str, Tensor]
    partner: PreparedSample | None = None
    turns: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    segments: Mapping[int, tuple[PreparedVideo, ...]] = field(default_factory=dict)

    @property
    def num_frames(self) -> int:
        """Frames really used."""
        return len(self.frames.frames)

    @property
    def prompts(self) -> list[str]:
        """What is asked, in order."""
        return [question.prompt for question in self.sample.questions]


@dataclass(frozen=True)
class Reply:
    """What the model generated for one query.

    Attributes:
        token_ids: the end of the turn included.
        context_tokens, visual_tokens: as in `Answer`.
        seconds: an equal share of its batch's.
    """

    token_ids: list[int]
    context_tokens: int
    visual_tokens: int
    seconds: float


class Condition(ABC):
    """A way to answer questions about videos. All answer the same prompts about the same frames, greedily.

    What shares a batch depends on the samples given together and on `decoding` alone.

    Args:
        model: on the device and in the dtype to use; its base answers in every condition.
        processor: the model's.

    Attributes:
        name: of the condition with these options, unique among those of a run.
        needs_partner: whether `PreparedSample.partner` must be there.
        num_segments: how many parts of the span are to be prepared as `PreparedSample.segments`; 1 for none.
    """

    name: str
    needs_partner: ClassVar[bool] = False
    num_segments: int = 1

    def __init__(self, model: Video2LoraModel, processor: Video2LoraProcessor) -> None:
        self.model, self.vlm, self.processor = model.eval(), model.vlm, processor
        eos = self.vlm.generation_config.eos_token_id
        self.end_token_ids: set[int] = (
            processor.end_token_ids if eos is None else {eos} if isinstance(eos, int) else set(eos)
        )

    def settings(self) -> dict[str, Any]:
        """What decides the answers besides the run's own settings; JSON can hold it."""
        return {}

    def prompts_with_video(self, sample: Sample) -> Sequence[str]:
        """Prompts that this condition puts behind the video in the context: `PreparedSample.turns`."""
        return ()

    @abstractmethod
    def answer(self, batch: Sequence[PreparedSample], decoding: Decoding) -> list[list[Answer]]:
        """Answer all questions of a batch of samples.

        Returns:
            For each sample the answers to its questions, in order.
        """

    # --- for conditions ----------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds on a clock, once the accelerator has done all it was given."""
        device = self.vlm.device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def generate(
        self, inputs: Mapping[str, Tensor], max_new_tokens: int, **options: Any
    ) -> tuple[list[list[int]], float]:
        """Token ids generated behind each row, the end of turn included where it came to it, and seconds in all."""
        start = self.now()
        moved = {name: value.to(self.vlm.device) for name, value in inputs.items()}
        with keep_rope_deltas(self.vlm):
            output = self.model.generate(
                **moved,
                **GREEDY,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(self.end_token_ids),
                pad_token_id=self.processor.pad_token_id,
                **options,
            )
        seconds = self.now() - start
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        ends = [next((i + 1 for i, token in enumerate(row) if token in self.end_token_ids), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)], seconds

    def reply_to_text(
        self,
        prompts: Sequence[Sequence[str]],
        decoding: Decoding,
        adapters: Sequence[LoraWeights] | None = None,
        expected: Sequence[Sequence[float]] | None = None,
    ) -> list[list[Reply]]:
        """Answer text without a video in the context.

        Args:
            prompts: for each sample.
            decoding: batches go across samples.
            adapters: one for each sample; the base by itself without.
            expected: for each sample, how long the answers will be (`expected_lengths`): long ones share batches.
        """
        flat = longest_first(prompts, expected)
        replies: dict[tuple[int, int], Reply] = {}
        for begin in range(0, len(flat), decoding.batch_size):
            rows = sorted(flat[begin : begin + decoding.batch_size])
            inputs = dict(self.processor(text=[prompts[place][number] for place, number in rows]))
            options: dict[str, Any] = {}
            if adapters is not None:
                queries = Counter(place for place, _ in rows)  # in the order of the rows, by place
                options["adapters"] = stack_lora([adapters[place] for place in queries])
                options["queries_per_adapter"] = list(queries.values())
            generated, seconds = self.generate(inputs, decoding.max_new_tokens, **options)
            lengths = inputs["attention_mask"].sum(1).tolist()
            for row, token_ids, length in zip(rows, generated, lengths, strict=True):
                replies[row] = Reply(token_ids, length, 0, seconds / len(rows))
        return [[replies[place, number] for number in range(len(several))] for place, several in enumerate(prompts)]

    def read(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """The text of generated tokens, and whether they end the turn."""
        ended = bool(token_ids) and token_ids[-1] in self.end_token_ids
        text = self.processor.decode(token_ids, skip_special_tokens=True)
        # the limit may fall in the middle of a character
        return (text if ended else text.rstrip("\ufffd")).strip(), ended

    def make_answers(
        self,
        replies: Sequence[Sequence[Reply]],
        num_frames: Sequence[int],
        prepare_seconds: Sequence[float],
        extras: Sequence[str | None] | None = None,
    ) -> list[list[Answer]]:
        """Answers out of replies; the other arguments hold one value for each sample."""
        extras = [None] * len(replies) if extras is None else extras
        answers: list[list[Answer]] = []
        for several, frames, seconds, extra in zip(replies, num_frames, prepare_seconds, extras, strict=True):
            answers.append([])
            for reply in several:
                text, ended = self.read(reply.token_ids)
                answers[-1].append(
                    Answer(
                        text=text,
                        num_tokens=len(reply.token_ids),
                        ended=ended,
                        context_tokens=reply.context_tokens,
                        visual_tokens=reply.visual_tokens,
                        num_frames=frames,
                        prepare_seconds=seconds,
                        answer_seconds=reply.seconds,
                        extra=extra,
                    )
                )
        return answers


def expected_lengths(batch: Sequence[PreparedSample]) -> list[list[float]]:
    """How long the answer to each question of each sample is likely to be: as the references of its task, on average.

    In characters, of the longest reference; 0 where a task has none.
    """
    found: dict[str, list[int]] = {}
    for question in (question for prepared in batch for question in prepared.sample.questions):
        found.setdefault(question.task, []).append(max(map(len, question.references), default=0))
    means = {task: sum(lengths) / len(lengths) for task, lengths in found.items()}
    return [[means[question.task] for question in prepared.sample.questions] for prepared in batch]


def longest_first(
    prompts: Sequence[Sequence[str]], expected: Sequence[Sequence[float]] | None = None
) -> list[tuple[int, int]]:
    """Places of all prompts (sample, number), those with the longest expected answers first, else in order.

    A batch goes on until its last answer ends. Cut in this order, few batches have long answers to wait for.
    """
    rows = [(place, number) for place, several in enumerate(prompts) for number in range(len(several))]
    return rows if expected is None else sorted(rows, key=lambda row: -expected[row[0]][row[1]])


def batches_of(lengths: Sequence[int], batch_size: int) -> Iterator[slice]:
    """Consecutive items in batches of at most `batch_size`, with padding at most `CONTEXT_TOKENS_AT_ONCE` tokens.

    Args:
        lengths: tokens of each item; one that is longer than the limit is alone.
        batch_size: items.
    """
    begin = 0
    for end in range(1, len(lengths) + 1):
        longest = max(lengths[begin : end + 1])
        full = end - begin == batch_size or (end - begin + 1) * longest > CONTEXT_TOKENS_AT_ONCE
        if end == len(lengths) or full:
            yield slice(begin, end)
            begin = end
