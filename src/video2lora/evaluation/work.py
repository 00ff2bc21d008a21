"""Evaluation: the work of a run, group of samples by group: videos are read once, then every condition answers."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from typing import Any

from tqdm.auto import tqdm

from ..data.forms import PLACEHOLDERS
from ..modeling.processor import Video2LoraProcessor
from ..video import VideoError
from .conditions import Condition, Decoding, PreparedSample, prepare_samples
from .journal import Attempt, RunFolder
from .records import EvaluationError
from .samples import Sample, video_ids

logger = logging.getLogger(__name__)


def plan_groups(counts: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut samples into groups: consecutive ones with up to `batch_size` questions together, or one with more."""
    groups: list[list[int]] = []
    size = 0
    for sample, count in enumerate(counts):
        if not groups or size + count > batch_size:
            groups.append([])
            size = 0
        groups[-1].append(sample)
        size += count
    return groups


class Work:
    """The work of one run.

    Args:
        processor: of the model; its settings decide the frames.
        samples: in the order of the benchmark.
        conditions: in the order in which they answer.
        decoding: of all conditions.

    Raises:
        EvaluationError: samples that make no sense, told before anything is decoded.
    """

    def __init__(
        self,
        processor: Video2LoraProcessor,
        samples: Sequence[Sample],
        conditions: Sequence[Condition],
        decoding: Decoding,
    ) -> None:
        _check_samples(samples)
        if any(condition.needs_partner for condition in conditions) and len(set(video_ids(samples))) < 2:
            raise EvaluationError(
                "all samples are about one video, and there is no other whose adapter could be tried: leave out the "
                "condition other_adapter, or take more samples."
            )
        self.processor, self.samples, self.conditions, self.decoding = processor, samples, conditions, decoding
        self.groups = plan_groups([len(sample.questions) for sample in samples], decoding.batch_size)

    def run(
        self,
        folder: RunFolder,
        done: Mapping[int, Attempt],
        own: Sequence[int],
        num_workers: int,
        limit: float,
        show: bool,
    ) -> None:
        """Do this process's units that are not done, and look again for the videos that could not be read."""
        names = [condition.name for condition in self.conditions]
        complete = {group for group in own if group in done and set(names) <= set(done[group].answers)}
        bad = {index for attempt in done.values() for index in attempt.errors}
        tried = {g: self._doubtful(done[g], bad) if g in complete else self.groups[g] for g in own}
        tried = {group: part for group, part in tried.items() if part}
        ahead = num_workers + max(map(len, tried.values()), default=0)
        indices = [index for part in tried.values() for index in part]
        prepared = prepare_samples(
            self.samples, self.processor, self.conditions, num_workers, indices=indices, ahead=ahead
        )
        total = sum(len(self.groups[group]) for group in own) * len(names)
        left = sum(len(self.groups[group]) for group in own if group not in complete)
        start, hide = total - left * len(names), None if show else True  # None: unless stderr is a terminal
        bar = tqdm(desc="Evaluating", unit="sample", total=total, initial=start, disable=hide)
        with closing(prepared), bar:
            for group, part in tried.items():
                if folder.count_bad(0) > limit:
                    break  # of other processes, too: all come to the end
                found = dict(zip(part, islice(prepared, len(part)), strict=True))
                if group in complete:
                    if done[group].same_videos(found, *_seen(found)):
                        folder.count_bad(len(done[group].errors))
                        continue
                    whole = self.groups[group]
                    again = prepare_samples(self.samples, self.processor, self.conditions, 0, indices=whole)
                    found = dict(zip(whole, again, strict=True))
                attempt = done.get(group)
                if attempt is None or not attempt.same_videos(found, *_seen(found)):
                    attempt = Attempt(0 if attempt is None else attempt.number + 1, *_seen(found))
                for index, error in attempt.errors.items():
                    logger.warning("sample %s cannot be read: %s", self.samples[index].id, error)
                folder.count_bad(len(attempt.errors))
                for condition in self.conditions:
                    if condition.name not in attempt.answers:
                        self._answer(condition, found, attempt)
                        folder.append(group, condition.name, attempt)
                        bar.update(len(found))

    def _doubtful(self, attempt: Attempt, bad: Collection[int]) -> list[int]:
        """Samples of an attempt to look at again: a video could not be read, its own or that of its first partner."""
        doubtful = set(attempt.errors)
        for index, partner in attempt.partners.items():
            passed_over = index + 1
            while self.samples[passed_over % len(self.samples)].id != partner:  # the order of `prepare_samples`
                if passed_over % len(self.samples) in bad:
                    doubtful.add(index)
                passed_over += 1
        return sorted(doubtful)

    def _answer(
        self, condition: Condition, found: Mapping[int, PreparedSample | VideoError], attempt: Attempt
    ) -> None:
        batch = {index: item for index, item in found.items() if not isinstance(item, VideoError)}
        try:
            answers = condition.answer(list(batch.values()), self.decoding) if batch else []
        except Exception:
            samples = ", ".join(item.sample.id for item in batch.values())
            logger.error("condition %s failed on %s; what was answered before is kept.", condition.name, samples)
            raise
        for index, given in zip(batch, answers, strict=True):
            if len(given) != (expected := len(self.samples[index].questions)):
                raise RuntimeError(
                    f"condition {condition.name} gave {len(given)} answers to the {expected} questions of sample "
                    f"{self.samples[index].id}."
                )
        attempt.answers[condition.name] = {
            index: [asdict(answer) for answer in given] for index, given in zip(batch, answers, strict=True)
        }

    def stop_if_bad(self, folder: RunFolder, limit: float, max_bad_fraction: float) -> None:
        """Raise `EvaluationError` if more videos than `limit` could not be read."""
        if (bad := folder.count_bad(0)) <= limit:
            return
        errors = {index: error for attempt in folder.attempts().values() for index, error in attempt.errors.items()}
        first = min(errors)
        raise EvaluationError(
            f"{bad} of {len(self.samples)} videos cannot be read, more than max_bad_fraction={max_bad_fraction:g}, "
            f"such as that of sample {self.samples[first].id!r}: {errors[first]} Correct them and start again: what "
            "is done is kept."
        )

    def rows(self, folder: RunFolder) -> list[dict[str, Any]]:
        """The records, in order."""
        names = [condition.name for condition in self.conditions]
        attempts = folder.complete(len(self.groups), names)
        rows, videos = [], video_ids(self.samples)
        for group, indices in enumerate(self.groups):
            attempt = attempts[group]
            for index in indices:
                sample = self.samples[index]
                for number, question in enumerate(sample.questions):
                    asked = {
                        "sample_id": sample.id,
                        "video_id": videos[index],
                        "question_id": question.id,
                        "task": question.task,
                        "prompt": question.prompt,
                        "question": question.question,
                        "references": list(question.references),
                    }
                    for name in names:
                        row: dict[str, Any] = {"condition": name} | asked
                        if index in attempt.errors:
                            row["error"] = attempt.errors[index]
                        else:
                            answer = dict(attempt.answers[name][index][number])
                            row |= {"answer": answer.pop("text"), **answer}
                        rows.append(row)
        return rows


def _seen(found: Mapping[int, PreparedSample | VideoError]) -> tuple[dict[int, str], dict[int, str]]:
    """What was wrong with videos, and whose were shown as another's, by sample."""
    errors = {index: str(item) for index, item in found.items() if isinstance(item, VideoError)}
    good = {index: item for index, item in found.items() if not isinstance(item, VideoError)}
    return errors, {index: item.partner.sample.id for index, item in good.items() if item.partner is not None}


def _check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise EvaluationError("the benchmark has no samples.")
    for what, ids in (
        ("sample", [sample.id for sample in samples]),
        ("question", [question.id for sample in samples for question in sample.questions]),
    ):
        seen: set[str] = set()
        for name in ids:
            if name in seen:
                raise EvaluationError(f"the benchmark has two {what}s with the id {name!r}: each needs its own.")
            seen.add(name)
    for sample in samples:
        if not sample.questions:
            raise EvaluationError(f"sample {sample.id!r} has no question.")
        for question in sample.questions:
            if found := [mark for mark in PLACEHOLDERS if mark in question.prompt]:
                raise EvaluationError(
                    f"question {question.id!r} has {found[0]} in its prompt, but the video has its own place: take it "
                    "out."
                )
