"""Evaluation: greedy answers to, and likelihoods of, texts about videos, each video read once; without lmms-eval."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import StoppingCriteria

from ..adapters import VideoAdapter, VideoAdapterStore
from ..modeling import stack_lora
from ..modeling.processor import IGNORE_INDEX
from ..pipelines import VideoToLoraPipeline
from ..video import VideoError
from .condition import Condition, Decoding, PreparedSample, Reply, batches_of
from .condition_adapter import NoAdapterCondition
from .condition_video import VideoCondition
from .prepare import prepare_samples
from .samples import Question, Sample

CONDITIONS = ("adapter", "video", "no_adapter")


@dataclass(frozen=True)
class Generation:
    """How a text is to be answered, greedily.

    Attributes:
        max_new_tokens: of the answer.
        until: the answer ends before the first of these strings.
    """

    max_new_tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Query:
    """A text about a video: to be answered, or to be continued.

    Attributes:
        prompt: the text.
        key: of the video, the same for the same video; None for none.
        load: gives the video: anything `load_video` takes. Called again by each pass over the queries.
        generation: how to answer.
        continuation: what is to be scored as the beginning of an answer.
    """

    prompt: str
    key: str | None = None
    load: Callable[[], Any] | None = None
    generation: Generation | None = None
    continuation: str | None = None


@dataclass(frozen=True)
class Text:
    """An answer.

    Attributes:
        text: without special tokens, stripped.
        context_tokens: tokens in the language model's context before it, visual ones included.
        num_tokens: generated.
    """

    text: str
    context_tokens: int
    num_tokens: int


class Answerer:
    """Answers queries in one condition, in any order of videos; each video of a call is read once.

    Args:
        pipeline: on the device to use; its processor's settings decide how videos are sampled.
        condition: `adapter`, `video` (in the context) or `no_adapter` (the text alone, the video is not looked at).
            Queries without a video go to the base by itself in every condition.
        batch_size: texts, and videos, together in one forward pass.
        num_workers: threads that decode ahead.
        store: of adapters, for later calls and runs.
        show_progress: a bar on stderr.

    Raises:
        ValueError: there is no such condition.
    """

    def __init__(
        self,
        pipeline: VideoToLoraPipeline,
        condition: str = "adapter",
        *,
        batch_size: int = 1,
        num_workers: int = 2,
        store: VideoAdapterStore | None = None,
        show_progress: bool = False,
    ) -> None:
        if condition not in CONDITIONS:
            raise ValueError(f"condition={condition}: expected one of {', '.join(CONDITIONS)}.")
        self.pipeline, self.model = pipeline, pipeline.model
        # tokenizers may not be entered by two threads at once, and the pipeline's own decodes ahead
        self.processor = copy.deepcopy(pipeline.processor)
        self.condition, self.batch_size, self.num_workers = condition, batch_size, num_workers
        self.store, self.show_progress = store, show_progress
        self._text = _TextReplies(self.model, self.processor)
        self._video = _VideoReplies(self.model, self.processor)

    def generate(self, queries: Sequence[Query]) -> list[Text]:
        """Answer each query as its `generation` says.

        Raises:
            VideoError: a video cannot be read.
            ValueError: a prompt holds the video's placeholder.
        """
        answers: dict[int, Text] = {}
        for videos, members in self._windows(queries, "answering"):
            kinds = dict.fromkeys(queries[index].generation for several in members for index in several)
            for kind in kinds:
                assert kind is not None
                asked = [[index for index in several if queries[index].generation == kind] for several in members]
                places = [place for place, several in enumerate(asked) if several]
                prompts = [[queries[index].prompt for index in asked[place]] for place in places]
                some = None if videos is None else [videos[place] for place in places]
                for place, replies in zip(places, self._reply(some, prompts, kind), strict=True):
                    for index, reply in zip(asked[place], replies, strict=True):
                        text = _cut(self._text.read(reply.token_ids)[0], kind.until)
                        answers[index] = Text(text, reply.context_tokens, len(reply.token_ids))
        return [answers[index] for index in range(len(queries))]

    def score(self, queries: Sequence[Query]) -> list[tuple[float, bool]]:
        """The log-likelihood of each query's continuation.

        The continuation stands right behind the generation prompt, as it is: a space or the end of the turn counts
        only where it is part of it.

        Returns:
            For each query the sum of its tokens' natural log-probabilities, and whether each is the likeliest one.

        Raises:
            VideoError: a video cannot be read.
            ValueError: a prompt holds the video's placeholder.
        """
        scores: dict[int, tuple[float, bool]] = {}
        for videos, members in self._windows(queries, "scoring"):
            rows = [(place, index) for place, several in enumerate(members) for index in several]
            for batch in self._batches(videos, rows, queries):
                scores |= zip((index for _, index in batch), self._score(videos, batch, queries), strict=True)
        return [scores[index] for index in range(len(queries))]

    # --- videos ----------------------------------------------------------------------------------------------------

    def _windows(self, queries: Sequence[Query], what: str) -> Iterator[tuple[list[Any] | None, list[list[int]]]]:
        """What a few videos became (adapters, or prepared samples; None for none) and the queries about each."""
        members: dict[str, list[int]] = {}
        alone: list[list[int]] = []
        for index, query in enumerate(queries):
            if query.key is None or self.condition == "no_adapter":
                alone.append([index])
            else:
                members.setdefault(query.key, []).append(index)
        _check_files(members)
        firsts = {key: queries[indices[0]] for key, indices in members.items()}
        groups = list(members.values())
        bar = tqdm(desc=what, unit="query", total=len(queries), disable=None if self.show_progress else True)
        with bar, closing(self._read(firsts, groups, queries)) as videos:
            for begin in range(0, len(groups), self.batch_size):
                window = groups[begin : begin + self.batch_size]
                yield list(islice(videos, len(window))), window
                bar.update(sum(map(len, window)))
            for begin in range(0, len(alone), self.batch_size):
                window = alone[begin : begin + self.batch_size]
                yield None, window
                bar.update(len(window))

    def _read(self, firsts: Mapping[str, Query], groups: list[list[int]], queries: Sequence[Query]) -> Any:
        """Every video, read ahead of the model."""
        if self.condition == "video":
            return self._prepare(_Samples(list(firsts.items()), groups, queries))
        return self._internalize(query.load() for query in firsts.values() if query.load is not None)

    def _internalize(self, videos: Iterator[Any]) -> Iterator[Any]:
        options: dict[str, Any] = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        adapters = cast(Iterator[VideoAdapter], self.pipeline(videos, store=self.store, **options))
        for adapter in adapters:
            yield adapter.weights

    def _prepare(self, samples: _Samples) -> Iterator[PreparedSample]:
        with closing(prepare_samples(samples, self.processor, [self._video], self.num_workers)) as prepared:
            for item in prepared:
                if isinstance(item, VideoError):
                    raise item
                yield item

    # --- answers ---------------------------------------------------------------------------------------------------

    def _reply(self, videos: list[Any] | None, prompts: list[list[str]], kind: Generation) -> list[list[Reply]]:
        decoding = Decoding(kind.max_new_tokens, self.batch_size)
        if videos is not None and self.condition == "video":
            self._video.until = kind.until
            return self._video.reply_with_video(videos, prompts, kind.max_new_tokens, self.batch_size)[0]
        self._text.until = kind.until
        return self._text.reply_to_text(prompts, decoding, videos)

    # --- likelihoods -----------------------------------------------------------------------------------------------

    def _batches(
        self, videos: list[Any] | None, rows: list[tuple[int, int]], queries: Sequence[Query]
    ) -> Iterator[list[tuple[int, int]]]:
        lengths = [0] * len(rows)
        if videos is not None and self.condition == "video":
            lengths = [videos[place].turns[queries[index].prompt]["input_ids"].shape[1] for place, index in rows]
        return (rows[part] for part in batches_of(lengths, self.batch_size))

    @torch.no_grad()
    def _score(
        self, videos: list[Any] | None, rows: list[tuple[int, int]], queries: Sequence[Query]
    ) -> list[tuple[float, bool]]:
        turns = [self._turn(queries[index]) for _, index in rows]
        empty = [all(label == IGNORE_INDEX for label in labels) for _, labels, _ in turns]
        if any(empty):  # nothing is certain
            kept = [row for row, is_empty in zip(rows, empty, strict=True) if not is_empty]
            found = iter(self._score(videos, kept, queries) if kept else [])
            return [(0.0, True) if is_empty else next(found) for is_empty in empty]
        device = self.model.vlm.device
        batch = {name: value.to(device) for name, value in self.processor.pad_turns([t[:2] for t in turns]).items()}
        options: dict[str, Any] = {}
        if videos is not None and self.condition == "video":
            inputs = [videos[place].turns[queries[index].prompt] for place, index in rows]
            longer = [_append(turn, *of) for turn, of in zip(inputs, turns, strict=True)]
            options["teacher_inputs"] = self.processor.pad(longer)
        elif videos is not None:
            places = sorted({place for place, _ in rows})
            options["adapters"] = stack_lora([videos[place] for place in places])
            options["queries_per_video"] = [sum(place == other for other, _ in rows) for place in places]
        output = self.model(**batch, **options)
        logits = output.label_logits if output.teacher_logits is None else output.teacher_logits
        labelled = batch["labels"][:, 1:] != IGNORE_INDEX
        targets = batch["labels"][:, 1:][labelled]
        values = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].double()
        greedy = logits.argmax(-1) == targets
        counts = labelled.sum(1).tolist()
        pairs = zip(values.split(counts), greedy.split(counts), strict=True)
        return [(float(value.sum()), bool(same.all())) for value, same in pairs]

    def _turn(self, query: Query) -> tuple[list[int], list[int], list[int]]:
        """Token ids and labels of a prompt with its continuation, and the prompt's own ids."""
        head = self.processor.render(query.prompt)
        encode = self.processor.tokenizer
        head_ids: list[int] = encode(head, add_special_tokens=False)["input_ids"]
        ids: list[int] = encode(head + (query.continuation or ""), add_special_tokens=False)["input_ids"]
        # a tokenizer may merge the prompt's end with the beginning of what follows
        shared = next((i for i, (a, b) in enumerate(zip(ids, head_ids, strict=False)) if a != b), len(head_ids))
        return ids, [IGNORE_INDEX] * shared + ids[shared:], head_ids


class _Samples(Sequence[Sample]):
    """Videos and the prompts about them as samples whose videos are loaded when they are asked for."""

    def __init__(self, firsts: list[tuple[str, Query]], groups: list[list[int]], queries: Sequence[Query]) -> None:
        self._firsts, self._groups, self._queries = firsts, groups, queries

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, place: Any) -> Any:
        key, first = self._firsts[place]
        assert first.load is not None
        prompts = dict.fromkeys(self._queries[index].prompt for index in self._groups[place])
        return Sample(key, first.load(), tuple(Question(prompt, prompt, ()) for prompt in prompts))


class _Stopping(Condition):
    """A condition whose answers end with any of some strings."""

    until: tuple[str, ...] = ()

    def generate(
        self, inputs: Mapping[str, Tensor], max_new_tokens: int, **options: Any
    ) -> tuple[list[list[int]], float]:
        if self.until:
            stop = _StopAtText(self.processor.tokenizer, self.until, inputs["input_ids"].shape[1])
            options["stopping_criteria"] = [stop]
        rows, seconds = super().generate(inputs, max_new_tokens, **options)
        for row in rows:
            while self.until and row and row[-1] == self.processor.pad_token_id:
                row.pop()  # another row went on
        return rows, seconds


class _TextReplies(_Stopping, NoAdapterCondition):
    """Text without a video in the context."""


class _VideoReplies(_Stopping, VideoCondition):
    """Text behind the video."""


class _StopAtText(StoppingCriteria):
    """Ends a row once what was generated, the prompt apart, holds one of some strings."""

    def __init__(self, tokenizer: Any, until: tuple[str, ...], prompt_tokens: int) -> None:
        self.tokenizer, self.until, self.prompt_tokens = tokenizer, until, prompt_tokens
        self.num_tokens = max(len(text.encode()) for text in until)  # of text, no token is less than a byte

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        last = input_ids[:, self.prompt_tokens :][:, -self.num_tokens :]
        texts = self.tokenizer.batch_decode(last, skip_special_tokens=True)  # whose names may hold anything
        ended = [any(text in tail for text in self.until) for tail in texts]
        return torch.tensor(ended, device=input_ids.device)


def _cut(text: str, until: Sequence[str]) -> str:
    return text[: min([len(text), *(text.index(end) for end in until if end in text)])].strip()


def _append(turn: Mapping[str, Tensor], ids: list[int], labels: list[int], head_ids: list[int]) -> dict[str, Tensor]:
    """The turn with the video in its context, with the continuation behind it and `labels` `[1, tokens]`."""
    shared = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    length = turn["input_ids"].shape[1]
    kept = length - (len(head_ids) - shared)
    if turn["input_ids"][0, kept:].tolist() != head_ids[shared:]:
        raise ValueError("the prompt is rendered to another end with the video than without it.")
    tokens = torch.tensor([ids[shared:]])
    longer = dict(turn)
    for name, value in turn.items():
        if value.shape == (1, length):  # one number a token
            tail = tokens if name == "input_ids" else torch.full_like(tokens, int(name == "attention_mask"))
            longer[name] = torch.cat([value[:, :kept], tail.to(value.dtype)], dim=1)
    return longer | {"labels": torch.cat([torch.full((1, kept), IGNORE_INDEX), tokens], dim=1)}


def _check_files(keys: Mapping[str, Any]) -> None:
    """Tell before the first video is read which files are missing."""
    missing = [key for key in keys if os.path.isabs(key) and not Path(key).exists()]
    if missing:
        raise VideoError(
            f"{len(missing)} of {len(keys)} videos are not there: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. Let the task fetch its videos first."
        )
