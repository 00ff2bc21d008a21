"""Evaluation: a language model as judge of answers, text only, with everything it has said kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

from huggingface_hub import cached_assets_path
from tqdm.auto import tqdm

from .judge_cache import JudgmentCache
from .judge_endpoint import Endpoint, EndpointError, RefusedError, UnreachableError
from .judge_rubrics import RUBRICS, UnreadableReplyError, read_reply

__all__ = ["Judge", "JudgeCounts", "JudgeError", "JudgeEstimate", "Judgment"]

logger = logging.getLogger(__name__)

_GIVE_UP = 3  # answers in a row that could not be judged before the endpoint is taken for dead
_INSTRUCTION = "Describe the video."


@dataclass(frozen=True)
class Judgment:
    """A judge's verdict on one answer.

    Attributes:
        score: from 0 to 1, or None without a verdict.
        grade: on the rubric's scale.
        reason: the judge's own words.
        error: why there is no verdict.
    """

    score: float | None
    grade: int | None = None
    reason: str = ""
    error: str | None = None


@dataclass(frozen=True)
class JudgeEstimate:
    """What judging would take before retries; tokens are estimated, so is `cost`, in the currency of the prices.

    Attributes:
        answers: all there are.
        cached: of them, judged already, empty (which needs no judge) or the same as another.
        calls: what is left to ask.
        prompt_tokens, completion_tokens: of these calls together.
        cost: None without prices.
    """

    answers: int
    cached: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None = None

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", about {self.cost:.2f} in the currency of the prices"
        return (
            f"{self.calls:,} calls to the judge ({self.cached:,} of {self.answers:,} answers need none), about "
            f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens{cost}"
        )


@dataclass
class JudgeCounts:
    """What a judge has done since it was made: answers it `judged`, or `failed` to, and tokens the server counted."""

    judged: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class JudgeError(RuntimeError):
    """The judge could not finish; what it has judged is kept, and another call goes on from there.

    Attributes:
        judgments: of all answers of the call, None for those not reached.
    """

    def __init__(self, message: str, judgments: Sequence[Judgment | None] = ()) -> None:
        super().__init__(message)
        self.judgments = list(judgments)


@dataclass(frozen=True)
class _Item:
    key: str
    question: str
    references: tuple[str, ...]
    answer: str


@dataclass
class _Round:
    """What the threads of one call share."""

    stop: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)
    in_a_row: int = 0
    refused: dict[str, tuple[_Item, str]] = field(default_factory=dict)
    problem: str | None = None


class Judge:
    """A language model that grades answers against references; it sees no video.

    Verdicts are cached under (model, rubric and its wording, kind, question, references, answer), so one judge of a
    name must be one model: the cache does not ask where it is served. Threads may share a judge, judges and processes
    a `cache_dir`. An answer without a character is 0 unasked.

    A reply that cannot be read is asked for again, and in the end kept as failed: its score is None, never 0. So is an
    answer the server refuses (a content filter), once it has taken another. Time-outs, 408, 425, 429, 5xx and broken
    connections are retried; what is still not answered then is not kept, and raises.

    Args:
        model: name of the model on the server, or Hub id for a provider.
        base_url: of an OpenAI-compatible server, such as "http://localhost:8000/v1"; None for a provider.
        provider: one of `huggingface_hub.InferenceClient`'s; None for its automatic choice.
        api_key: for either; the Hub token is never sent to a `base_url`.
        rubric: version, one of `judge_rubrics.RUBRICS`.
        kind: "question" or "caption": which of its two texts.
        cache_dir: folder of the verdicts; by default in the assets folder of the Hugging Face cache.
        timeout: seconds to wait for the server's next sign of life.
        retries: tries of a call after the first.
        backoff: seconds before the second try, then doubled up to 60; a longer Retry-After counts, up to 600.
        invalid_retries: how often an unreadable reply is asked for again.
        max_concurrency: calls at a time.
        max_tokens: longest reply, thinking included; None leaves it to the server.
        retry_failed: ask again for answers that were kept as failed.

    Raises:
        ValueError: no such rubric or kind, or a number that makes no sense.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        provider: str | None = None,
        api_key: str | None = None,
        rubric: str = "v1",
        kind: str = "question",
        cache_dir: str | os.PathLike[str] | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
        invalid_retries: int = 2,
        max_concurrency: int = 8,
        max_tokens: int | None = 4096,
        retry_failed: bool = False,
    ) -> None:
        if rubric not in RUBRICS or kind not in RUBRICS[rubric]:
            have = ", ".join(f"{version} ({', '.join(kinds)})" for version, kinds in RUBRICS.items())
            raise ValueError(f"no rubric {rubric!r} for {kind!r}: there is {have}.")
        _check_numbers(timeout, retries, backoff, invalid_retries, max_concurrency, max_tokens)
        self.model, self.provider = model, provider
        self.rubric = RUBRICS[rubric][kind]
        self.invalid_retries, self.max_concurrency, self.retry_failed = invalid_retries, max_concurrency, retry_failed
        self.endpoint = Endpoint(
            model,
            base_url=base_url,
            provider=provider,
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_tokens=max_tokens,
        )
        self.cache = JudgmentCache(cache_dir or cached_assets_path("video2lora", namespace="judge"))
        self.counts = JudgeCounts()
        self._lock = Lock()
        # a judge that has ever given a verdict takes our requests, so a refusal is about the answer
        self._answers = any(self._is_own(record) and record["score"] is not None for record in self.cache.values())

    def settings(self) -> dict[str, Any]:
        """Return what decides verdicts, for the run's record; no address and no key."""
        return {
            "model": self.model,
            "provider": self.provider,
            "rubric": self.rubric.version,
            "rubric_digest": self.rubric.digest,
            "kind": self.rubric.kind,
            "temperature": 0.0,
            "max_tokens": self.endpoint.max_tokens,
            "invalid_retries": self.invalid_retries,
        }

    def judge(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        questions: Sequence[str | None] | None = None,
    ) -> list[Judgment]:
        """Grade every answer; what the cache knows is not asked.

        Args:
            predictions: the answers.
            references: for each of them the right ones, any of which counts.
            questions: what was asked; a judge of captions takes None for "Describe the video."

        Returns:
            One for each prediction.

        Raises:
            JudgeError: the endpoint is dead or misconfigured. All verdicts so far are kept.
            ValueError: sequences of different lengths, no question or no reference.
        """
        items = self._items(predictions, references, questions)
        todo = self._todo(items)
        if todo:
            self._run(items, todo)
        judgments = [self._look_up(item) for item in items]
        found = [judgment for judgment in judgments if judgment is not None]
        failed = sum(judgment.score is None for judgment in found)
        if failed:
            logger.warning("%d of %d answers have no verdict of the judge (score None)", failed, len(items))
        return found

    def score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        questions: Sequence[str | None] | None = None,
    ) -> list[float | None]:
        """Return the scores of `judge`: from 0 to 1, None for answers it could not judge."""
        return [judgment.score for judgment in self.judge(predictions, references, questions)]

    def estimate(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        questions: Sequence[str | None] | None = None,
        *,
        prompt_price: float | None = None,
        completion_price: float | None = None,
        completion_tokens: int = 100,
    ) -> JudgeEstimate:
        """Say what `judge` would take with the same arguments, without asking anybody.

        Args:
            predictions, references, questions: as for `judge`.
            prompt_price, completion_price: of a million tokens; both, for a cost.
            completion_tokens: of a reply, for a model that has not judged yet. Otherwise, what it took so far on
                average counts. A model that thinks needs 10 to 50 times as many.
        """
        items = self._items(predictions, references, questions)
        todo = self._todo(items)
        used = [record for record in self.cache.values() if self._is_own(record) and record.get("completion_tokens")]
        each = sum(record["completion_tokens"] for record in used) / len(used) if used else completion_tokens
        prompt = sum(self._prompt_tokens(item) for item in todo)
        completion = math.ceil(each * len(todo))
        cost = None
        if prompt_price is not None and completion_price is not None:
            cost = (prompt * prompt_price + completion * completion_price) / 1e6
        return JudgeEstimate(len(items), len(items) - len(todo), len(todo), prompt, completion, cost)

    def _prompt_tokens(self, item: _Item) -> int:
        """About 4 ASCII characters a token, one of others, and some for the chat's form."""
        messages = self.rubric.messages(item.question, item.references, item.answer)
        text = "".join(message["content"] for message in messages)
        ascii_characters = sum(map(str.isascii, text))
        return math.ceil(ascii_characters / 4) + len(text) - ascii_characters + 10

    def _items(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        questions: Sequence[str | None] | None,
    ) -> list[_Item]:
        asked: Sequence[str | None] = [None] * len(predictions) if questions is None else questions
        if not len(predictions) == len(references) == len(asked):
            raise ValueError(
                f"there are {len(predictions)} predictions, {len(references)} references and {len(asked)} questions: "
                "one each is needed."
            )
        return [
            self._item(number, *item) for number, item in enumerate(zip(predictions, references, asked, strict=True))
        ]

    def _item(self, number: int, answer: str, references: Sequence[str], question: str | None) -> _Item:
        if isinstance(references, str) or not any(reference.strip() for reference in references):
            raise ValueError(f"references[{number}] must be a list with a right answer in it, got {references!r}.")
        if question is None and self.rubric.kind == "caption":
            question = _INSTRUCTION
        if not question:
            raise ValueError(f"questions[{number}] is {question!r}: a judge of answers has to know the question.")
        answer = answer.strip()
        key = json.dumps(
            [self.model, self.rubric.version, self.rubric.digest, self.rubric.kind, question, list(references), answer]
        )
        return _Item(hashlib.sha256(key.encode()).hexdigest(), question, tuple(references), answer)

    def _todo(self, items: Sequence[_Item]) -> list[_Item]:
        todo: dict[str, _Item] = {}
        for item in items:
            known = self._look_up(item)
            if known is None or (known.score is None and self.retry_failed):
                todo.setdefault(item.key, item)
        return list(todo.values())

    def _look_up(self, item: _Item) -> Judgment | None:
        if not item.answer:
            return Judgment(0.0, self.rubric.lowest, "The answer is empty.")
        record = self.cache.get(item.key)
        if record is None:
            return None
        return Judgment(record["score"], record.get("grade"), record.get("reason") or "", record.get("error"))

    def _is_own(self, record: Mapping[str, Any]) -> bool:
        return record.get("model") == self.model

    def _run(self, items: Sequence[_Item], todo: Sequence[_Item]) -> None:
        """Ask for all in `todo`, or raise with what there is of `items`."""
        state = _Round()
        with (
            tqdm(desc="Judging", unit="answer", total=len(todo), disable=None) as bar,
            ThreadPoolExecutor(min(self.max_concurrency, len(todo)), thread_name_prefix="judge") as pool,
        ):
            futures = [pool.submit(self._work, item, state) for item in todo]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:  # Ctrl-C, a full disk: let calls under way end, but start none
                state.stop.set()
                for future in futures:
                    future.cancel()
                raise
        if state.problem is None and state.refused:
            self._settle_refused(state)
        if state.problem is not None:
            judgments = [self._look_up(item) for item in items]
            left, problem = judgments.count(None), state.problem.rstrip(".")
            raise JudgeError(
                f"the judge {self.model} left {left} of {len(items)} answers without a verdict: {problem}. "
                "What it has judged is kept: put that right and call again, and only the rest is asked.",
                judgments,
            )

    def _work(self, item: _Item, state: _Round) -> None:
        if state.stop.is_set():
            return
        known = self._look_up(item)  # another thread may have been faster
        if known is not None and not (known.score is None and self.retry_failed):
            return
        try:
            record = self._ask(item, state.stop)
        except RefusedError as error:
            with state.lock:
                state.refused[item.key] = (item, str(error))
                if not self._answers and len(state.refused) >= _GIVE_UP:
                    state.problem = state.problem or str(error)
                    state.stop.set()
        except UnreachableError as error:
            with state.lock:
                state.problem = state.problem or str(error)
                state.in_a_row += 1
                if state.in_a_row >= _GIVE_UP:
                    state.stop.set()
        except EndpointError as error:
            with state.lock:
                state.problem = state.problem or str(error)
                state.stop.set()
        else:
            self.cache.put(item.key, record)
            with state.lock:
                state.in_a_row = 0
                self._answers = True

    def _ask(self, item: _Item, stop: Event) -> dict[str, Any]:
        """Return the record of one answer, with a verdict or, after all tries, failed."""
        reply, problem, prompt, completion = None, "", 0, 0
        for _ in range(self.invalid_retries + 1):
            messages = self.rubric.messages(item.question, item.references, item.answer)
            if problem:
                messages[-1]["content"] += f"\nYour last reply could not be used: {problem}. Reply with the JSON only."
            reply = self.endpoint.ask(messages, stop)
            prompt += reply.prompt_tokens or 0
            completion += reply.completion_tokens or 0
            grade = None
            try:
                grade, reason = read_reply(reply.text, self.rubric)
                break
            except UnreadableReplyError as error:
                problem = str(error)
        record = self._record(item, prompt, completion)
        with self._lock:
            self.counts.prompt_tokens += prompt
            self.counts.completion_tokens += completion
            self.counts.judged += grade is not None
            self.counts.failed += grade is None
        if grade is not None:
            return {**record, "score": self.rubric.rescale(grade), "grade": grade, "reason": reason}
        assert reply is not None
        cut = f" (cut off at max_tokens={self.endpoint.max_tokens})" if reply.cut_off else ""
        return {
            **record,
            "score": None,
            "error": f"unreadable reply: {problem}{cut}",
            "reply": (reply.text or "")[-2000:],
        }

    def _settle_refused(self, state: _Round) -> None:
        if not self._answers:
            state.problem = next(iter(state.refused.values()))[1]
            return
        for item, problem in state.refused.values():
            self.cache.put(item.key, {**self._record(item, 0, 0), "score": None, "error": f"refused: {problem}"})
            with self._lock:
                self.counts.failed += 1

    def _record(self, item: _Item, prompt: int, completion: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "rubric": self.rubric.version,
            "kind": self.rubric.kind,
            "question": item.question,
            "references": list(item.references),
            "answer": item.answer,
            "prompt_tokens": prompt or None,
            "completion_tokens": completion or None,
        }


def _check_numbers(
    timeout: float, retries: int, backoff: float, invalid_retries: int, max_concurrency: int, max_tokens: int | None
) -> None:
    for name, value, least in (
        ("retries", retries, 0),
        ("invalid_retries", invalid_retries, 0),
        ("backoff", backoff, 0),
        ("max_concurrency", max_concurrency, 1),
        ("max_tokens", 1 if max_tokens is None else max_tokens, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout}.")
