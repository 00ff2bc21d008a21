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
"""Tokens of long contexts that may share a batch; with a small model more, `CACHE_AT_ONCE` bytes of KV cache."""

CACHE_AT_ONCE = 2**31

MASK_AT_ONCE = 2**30
"""Entries of the mask (tokens squared, for each row) of a batch with padding; one without needs no mask."""

ROWS_FOR_FREE = 64
"""Rows that take hardly longer to generate for than one: a small model's steps are bound by launches."""


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
        self.tokens_at_once = cached_tokens(self.vlm)

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
        for part in batches_of([1] * len(flat), decoding.batch_size, lengths_of(flat, expected)):
            rows = sorted(flat[part])
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
    prompts: Sequence[Sequence[str]],
    expected: Sequence[Sequence[float]] | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
) -> list[tuple[int, int]]:
    """Places of all prompts (sample, number), those with the longest expected answers first, then the longest prompts.

    A batch goes on until its last answer ends. Cut in this order, few batches have long answers to wait for, and of
    those with long contexts many have no padding.

    Args:
        prompts: for each sample.
        expected: for each sample, how long the answers will be; all the same without.
        lengths: for each sample, tokens of its prompts; those alike stay in order.
    """
    rows = [(place, number) for place, several in enumerate(prompts) for number in range(len(several))]
    for values in (lengths, expected):  # sorting keeps the order of what is alike
        if values is not None:
            rows.sort(key=lambda row: -values[row[0]][row[1]])
    return rows


def lengths_of(rows: Sequence[tuple[int, int]], expected: Sequence[Sequence[float]] | None) -> list[float] | None:
    """How long the answer to each of the prompts at `rows` (sample, number) is likely to be."""
    return None if expected is None else [expected[place][number] for place, number in rows]


def batches_of(
    lengths: Sequence[int],
    batch_size: int,
    expected: Sequence[float] | None = None,
    tokens_at_once: int | None = None,
) -> Iterator[slice]:
    """Consecutive items in batches: at most `batch_size`, and no more than memory allows.

    Where answers are likely to take half as long as the batch's first, another batch begins, once there are so many
    rows that each costs something: a row whose answer has ended is computed until the last one's has.

    Args:
        lengths: tokens of each item; one that is longer than the limits is alone.
        batch_size: items.
        expected: how long each item's answer will be, the longest first.
        tokens_at_once: with padding; `CONTEXT_TOKENS_AT_ONCE` by default.
    """
    limit = CONTEXT_TOKENS_AT_ONCE if tokens_at_once is None else tokens_at_once
    if not lengths:
        return
    begin, shortest, longest = 0, lengths[0], lengths[0]
    for end, length in enumerate(lengths[1:], start=1):
        size, low, high = end - begin, min(shortest, length), max(longest, length)
        full = size == batch_size or (size + 1) * high > limit
        masked = low < high and (size + 1) * high**2 > MASK_AT_ONCE
        shorter = expected is not None and 2 * expected[end] <= expected[begin] and size >= ROWS_FOR_FREE
        if full or masked or shorter:
            yield slice(begin, end)
            begin, low, high = end, length, length
        shortest, longest = low, high
    yield slice(begin, len(lengths))


def cached_tokens(vlm: Any) -> int:
    """How many tokens of contexts may share a batch, by what the KV cache of one takes."""
    config = vlm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_a_token = 2 * config.num_hidden_layers * heads * width * vlm.dtype.itemsize
    return max(CONTEXT_TOKENS_AT_ONCE, CACHE_AT_ONCE // bytes_a_token)
