"""Evaluation: the model of lmms-eval; imported by lmms-eval alone, which has to be installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from ..adapters import VideoAdapterStore
from ..modeling import Video2LoraModel, Video2LoraProcessor
from ..pipelines import VideoToLoraPipeline
from .lmms_eval_answers import Answerer, Text
from .lmms_eval_requests import answer_rounds, generation_queries, scoring_queries


class Video2Lora(lmms):
    """A video2lora checkpoint that answers the tasks of lmms-eval: `--model video2lora --model_args pretrained=...`.

    Tasks need no change: their video (a path, or pictures taken for frames one second apart) becomes an adapter once,
    and their text goes to the base with that adapter and no visual token. Answers are greedy.

    Args:
        pretrained: directory or Hub id of a checkpoint.
        revision: of it on the Hub.
        condition: `adapter`; `video` for the frozen base with the video in its context; `no_adapter` for the base that
            sees the text alone.
        num_frames, longest_edge: how videos are sampled; the checkpoint's settings by default.
        store: directory of a [`VideoAdapterStore`], for runs to come and for videos that later rounds of a task show
            again.
        dtype: of the base (`bfloat16`); that of its files by default.
        batch_size: texts, and videos, together in one forward pass.
        num_workers: threads that decode ahead.
        device: by default an accelerator if there is one; of several processes each takes its own.
        max_batch_size: lmms-eval hands it over; not used.

    Raises:
        ValueError: an argument that makes no sense.
        OSError: there is no such checkpoint.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        revision: str | None = None,
        condition: str = "adapter",
        num_frames: int | None = None,
        longest_edge: int | None = None,
        store: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        num_workers: int = 2,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not pretrained:
            raise ValueError("which checkpoint? Say it with --model_args pretrained=user/repo (or a directory).")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"--batch_size {batch_size}: expected a positive number; `auto` is not supported.")
        if store is not None and condition != "adapter":
            raise ValueError(f"store={store}: a store holds adapters, but condition={condition} makes none.")
        self.accelerator = Accelerator()
        several = self.accelerator.num_processes > 1
        self._device = self.accelerator.device if several or device is None else device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        model = Video2LoraModel.from_pretrained(pretrained, revision=revision, **arguments)
        processor = Video2LoraProcessor.from_pretrained(pretrained, revision=revision)
        processor.num_frames = num_frames or processor.num_frames
        processor.longest_edge = longest_edge or processor.longest_edge
        self.answerer: Answerer | None = Answerer(
            VideoToLoraPipeline(model=model, processor=processor, device=self._device),
            condition,
            batch_size=int(batch_size),
            num_workers=num_workers,
            store=None if store is None else VideoAdapterStore(store),
            show_progress=self._rank == 0,
        )

    @property
    def device(self) -> Any:
        """Where the model is; lmms-eval gathers counts there."""
        return self._device

    def clean(self) -> None:
        """Let go of the model, whose memory a judge may want."""
        self.answerer = None
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """An answer to each request, with the tokens that went in and came out."""
        return [_result(text) for text in self._loaded().generate(generation_queries(requests, self.task_dict))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request."""
        return answer_rounds(self._loaded(), requests, self.task_dict)

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Each continuation's value and whether greedy decoding would give it.

        The value is the sum of its tokens' log-probabilities; of the choices of a multiple-choice task it is minus
        that sum, since lmms-eval takes the choice with the smallest value: its own models return losses. The pair is
        wrapped because lmms-eval turns any other result that is not text into text.
        """
        queries = scoring_queries(requests, self.task_dict)
        scores = self._loaded().score(queries)
        signs = [-1.0 if isinstance(request.args[1], str) else 1.0 for request in requests]
        pairs = [(sign * value, greedy) for sign, (value, greedy) in zip(signs, scores, strict=True)]
        return [GenerationResult(text=pair) for pair in pairs]

    def _loaded(self) -> Answerer:
        if self.answerer is None:
            raise RuntimeError("the model was let go after an evaluation (clean()): make a new one.")
        return self.answerer


def _result(text: Text) -> GenerationResult:
    return GenerationResult(text.text, TokenCounts(input_tokens=text.context_tokens, output_tokens=text.num_tokens))
