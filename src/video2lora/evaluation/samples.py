"""Evaluation: what is asked (a video and the questions about it) and what comes back (an answer and what it took)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """One question about a video.

    Attributes:
        id: unique in its benchmark.
        prompt: what the model is asked, to the letter.
        references: right answers, any of which counts.
        task: question type, style or prompt name: one row of the report's tables.
        question: the question by itself, for a judge, where `prompt` says more than that.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    task: str = ""
    question: str | None = None


@dataclass(frozen=True)
class Sample:
    """One video, or a span of it, and all questions about it, so that it is read once for all of them.

    Attributes:
        id: unique in its benchmark.
        video: anything `load_video` takes.
        questions: at least one.
        start, end: seconds of the file's time; None for the video's own start and end.
        video_id: the same for all samples of one video, also where copies of it were drawn into; by default samples
            are of one video when `video` is the same (see `video_ids`).
    """

    id: str
    video: Any
    questions: tuple[Question, ...]
    start: float | None = None
    end: float | None = None
    video_id: str | None = None

    def same_video(self, other: Sample) -> bool:
        """Whether both are known, without reading them, to be about one video."""
        if self.video_id is not None and self.video_id == other.video_id:
            return True
        return _place(self.video) == _place(other.video)


def video_ids(samples: Sequence[Sample]) -> list[str]:
    """The video of each sample, which spans of it share: its `video_id`, or the id of the first sample about it.

    These are what is independent in the statistics: two spans of one video are not.
    """
    firsts: dict[Any, str] = {}
    return [
        firsts.setdefault(_place(sample.video), sample.id) if sample.video_id is None else sample.video_id
        for sample in samples
    ]


def _place(video: Any) -> Any:
    return os.fspath(video) if isinstance(video, (str, os.PathLike)) else id(video)


@dataclass(frozen=True)
class Answer:
    """What a condition said to one question, and what that took.

    Attributes:
        text: without special tokens, stripped.
        num_tokens: tokens generated, the end of the turn included.
        ended: whether the model ended its turn within the limit.
        context_tokens: tokens the language model had in its context before the answer, visual ones included.
        visual_tokens: how many of them stand for pixels.
        num_frames: frames of the video that were really used.
        prepare_seconds: what was done once for the video (adapter, prefix, caption, training); the same number on all
            its questions, an equal share of the batch it was done in.
        answer_seconds: what was done for the question, an equal share of the batch it was answered in.
        extra: what else the condition has to tell: the caption it answered from, its training losses.
    """

    text: str
    num_tokens: int
    ended: bool
    context_tokens: int
    visual_tokens: int
    num_frames: int
    prepare_seconds: float = 0.0
    answer_seconds: float = 0.0
    extra: str | None = None
