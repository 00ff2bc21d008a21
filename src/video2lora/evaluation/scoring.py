"""Evaluation: scores of a run's answers, now or later, and the verdicts that its declared margins give."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .records import EvaluationError, EvaluationRun, read_run, with_scores, write_records
from .samples import Answer

if TYPE_CHECKING:
    from .judge import Judge
    from .statistics import PairedComparison

WITHOUT_THE_VIDEO = ("no_adapter", "other_adapter")
"""Conditions that know nothing of the video asked about."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """How a condition compares with the baseline in one metric that has a declared margin, over all questions.

    Attributes:
        metric, condition, baseline: names.
        comparison: effect, interval and verdicts.
    """

    metric: str
    condition: str
    baseline: str
    comparison: PairedComparison


def score_run(
    run_dir: str | os.PathLike[str], metrics: Sequence[str] | None = None, *, judge: Judge | None = None
) -> EvaluationRun:
    """Score a finished run's answers, also by metrics that were not declared; nothing is answered again.

    `records.parquet` is replaced after each metric. A judge that cannot be reached, or gives no grade, leaves nulls,
    which `EvaluationRun.unscored` counts; called again it goes on from its cache. Grades of another judge than before
    replace those of that one: no column has grades of two, and `EvaluationRun.judge` tells whose they are.

    Args:
        run_dir: the folder.
        metrics: names in `METRICS`; by default those that were declared.
        judge: for the metric "judge".

    Raises:
        EvaluationError: the folder holds no finished run, or there is no such metric, judge or library.
    """
    run = read_run(run_dir)
    names = run.settings["metrics"] if metrics is None else metrics
    check_metrics(names, judge)
    for name in names:
        before = run.records[name].to_pylist() if name in run.metrics else None
        scores = _scores(run.records, name, judge)
        told = _judge_settings(name, judge)
        if before is not None and told != (run.judge if told is not None else None):
            if not any(score is not None for score in scores):
                logger.warning("%s: this judge gave no grade, so those of the one before stay.", name)
                continue
            before = None
        if before is not None:  # a judge that was there before and is not now takes nothing away
            scores = [old if new is None else new for old, new in zip(before, scores, strict=True)]
        if scores != before:
            run = EvaluationRun(run.path, run.settings, with_scores(run.records, name, scores, told))
            write_records(run.path, run.records)
    return run


def check_metrics(metrics: Sequence[str], judge: Judge | None, margins: Mapping[str, float] | None = None) -> None:
    """Refuse, before anything is answered, what could not be scored for want of a name, a judge or a library.

    Raises:
        EvaluationError: it names the metric.
    """
    from .metrics import METRICS, score

    for name in metrics:
        if name not in METRICS:
            raise EvaluationError(f"there is no metric {name!r}: there are {', '.join(METRICS)}.")
        low, high = METRICS[name].range
        if margins is not None and margins.get(name, 0) >= high - low:
            raise EvaluationError(
                f"the margin of {name} is {margins[name]:g}, but its scores are from {low:g} to {high:g}: any two "
                "models would be equivalent. The paper's margins are 0.05 (token_f1) and 0.15 (judge)."
            )
        if "judge" not in METRICS[name].needs:
            try:
                score(name, ["a"], [["a"]], questions=["a"], answers=[Answer("a", 1, True, 0, 0, 0)])
            except ImportError as error:
                raise EvaluationError(str(error)) from error
        elif judge is None:
            raise EvaluationError(f"the metric {name!r} needs judge=Judge(...), a model and its endpoint.")


def verdicts(run: EvaluationRun) -> list[Verdict]:
    """Compare every condition with the baseline in every metric that has a declared margin.

    Whole videos are resampled. Nothing is said where fewer than two of them have a score in both.
    """
    from .metrics import METRICS
    from .statistics import compare

    baseline, found = run.settings["baseline"], []
    if baseline not in run.conditions:
        return []
    for metric, margin in run.settings["margins"].items():
        for condition in run.conditions if metric in run.metrics else ():
            candidate, reference, videos = run.paired_scores(metric, condition, baseline)
            if condition == baseline or len(set(videos)) < 2:
                continue
            comparison = compare(
                candidate,
                reference,
                margin=margin,
                alpha=run.settings["alpha"],
                clusters=videos,
                seed=run.settings["seed"],
                higher_is_better=METRICS[metric].higher_is_better,
            )
            found.append(Verdict(metric, condition, baseline, comparison))
    return found


def remarks(found: Sequence[Verdict]) -> list[str]:
    """What verdicts do not show: a metric in which conditions without the video lose nothing tells nothing of it."""
    said = []
    for metric in dict.fromkeys(verdict.metric for verdict in found):
        own = [verdict for verdict in found if verdict.metric == metric and verdict.comparison.higher_is_better]
        blind = [v.condition for v in own if v.condition in WITHOUT_THE_VIDEO and v.comparison.non_inferior]
        if blind:
            said.append(
                f"{metric}: {' and '.join(blind)} saw nothing of the video, and no loss beyond the margin against "
                f"{own[0].baseline} is there either. So no verdict in {metric} shows that anything of a video is kept."
            )
    return said


def _scores(records: Any, metric: str, judge: Judge | None) -> list[float | None]:
    """A score for each row; None where there is no answer, no reference though one is needed, or no grade."""
    from .judge import JudgeError
    from .metrics import METRICS, score

    columns = {name: records[name].to_pylist() for name in ("answer", "references", "question", "prompt", "error")}
    needs = METRICS[metric].needs
    places = [
        place
        for place, (error, right) in enumerate(zip(columns["error"], columns["references"], strict=True))
        if error is None and ("references" not in needs or any(text.strip() for text in right))
    ]
    said, references, questions, prompts, _ = ([values[place] for place in places] for values in columns.values())
    try:
        found = score(
            metric,
            said,
            references,
            questions=[prompt if asked is None else asked for asked, prompt in zip(questions, prompts, strict=True)],
            answers=_answers(records.take(places)) if "answers" in needs else None,
            judge=judge,
        )
    except JudgeError as error:
        found = [None if judgment is None else judgment.score for judgment in error.judgments]
        found = found or [None] * len(places)
        logger.warning(
            "%s: %d of %d answers have no score: %s",
            metric,
            found.count(None),
            len(found),
            error,
        )
    scores: list[float | None] = [None] * len(records)
    for place, value in zip(places, found, strict=True):
        scores[place] = value
    return scores


def _judge_settings(metric: str, judge: Judge | None) -> dict[str, Any] | None:
    """What decides a judge's grades, as JSON gives it back; None for metrics without a judge."""
    from .metrics import METRICS

    if judge is None or "judge" not in METRICS[metric].needs:
        return None
    return json.loads(json.dumps(judge.settings()))


def _answers(records: Any) -> list[Answer]:
    names = [name for name in Answer.__dataclass_fields__ if name != "text"]
    columns = (records[name].to_pylist() for name in ("answer", *names))
    return [Answer(text, **dict(zip(names, rest, strict=True))) for text, *rest in zip(*columns, strict=True)]
