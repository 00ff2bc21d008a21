"""Evaluation: two runs of one benchmark compared, question by question."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import report_format as form
from .records import EvaluationError, EvaluationRun, read_run
from .report_document import escape_markdown, markdown_table
from .report_numbers import RESAMPLES, Effect, RunNumbers, with_holm
from .statistics import PairedComparison, compare

__all__ = ["RunComparison", "check_comparable", "compare_runs"]

SAME = ("name", "version", "split", "digest")
"""What two runs of one benchmark have in common."""
_OTHERWISE = ("format_version", "benchmark", "environment", "metrics", "margins", "alpha", "conditions", "seed")


@dataclass(frozen=True)
class RunComparison:
    """One condition's scores in two runs, B minus A.

    Attributes:
        name_a, name_b: folders of the runs; A is the baseline.
        condition, metric: compared.
        effects: all questions, and then each task where there are several, with Holm's correction over these. `margin`
            is None where none is declared, and then there is no verdict.
        differences: settings that are not the same, by dotted name, with A's and B's value.
        level: of the intervals, "95 %".
    """

    name_a: str
    name_b: str
    condition: str
    metric: str
    effects: list[Effect]
    differences: dict[str, tuple[Any, Any]]
    level: str

    @property
    def comparison(self) -> PairedComparison:
        """Of all questions."""
        return self.effects[0].comparison

    def to_markdown(self) -> str:
        """A table of the effects with their verdicts, and the settings that differ."""
        margin = self.effects[0].margin
        lines = [
            f"## {escape_markdown(self.condition)} in {escape_markdown(self.metric)}: B against A",
            "",
            f"A is {escape_markdown(self.name_a)}, B is {escape_markdown(self.name_b)}. B minus A, paired by "
            f"question; {self.level} BCa bootstrap interval over whole videos. "
            + ("No margin, so no verdict." if margin is None else f"Margin {margin:g}."),
            "",
        ]
        rows = []
        for effect in self.effects:
            c = effect.comparison
            cells = [escape_markdown(form.task_name(effect.task)), f"{c.n:,} ({c.num_clusters:,})"]
            cells += [form.score(c.baseline_mean), form.score(c.candidate_mean), form.signed(c.effect)]
            cells += [form.interval(c.interval, "+.3f"), form.retention(c), form.verdict(effect)]
            rows.append([*cells, form.holm_verdict(effect)])
        lines += [markdown_table(_COLUMNS, rows, numbers_from=2)]
        lines += ["", "Settings that differ:" if self.differences else "All settings are the same.", ""]
        for name, values in self.differences.items():
            a, b = (escape_markdown(str(value)) for value in values)
            lines.append(f"- {escape_markdown(name)}: {a} in A, {b} in B")
        return "\n".join(lines).rstrip() + "\n"


_COLUMNS = ("task", "questions (videos)", "A", "B", "effect", "interval", "kept", "verdict", "after Holm")


def compare_runs(
    run_a: str | os.PathLike[str],
    run_b: str | os.PathLike[str],
    *,
    condition: str = "adapter",
    metric: str,
    margin: float | None = None,
    resamples: int = RESAMPLES,
) -> RunComparison:
    """Compare one condition of two finished runs, paired by the questions' ids; whole videos are resampled.

    Args:
        run_a, run_b: folders; B is measured against A.
        condition, metric: in both runs.
        margin: largest difference that does not matter; by default that which both runs declared, if they did.
        resamples: of the bootstrap.

    Raises:
        EvaluationError: the runs are of different benchmarks, versions or rows, judged by different judges, or one has
            no such condition or metric.
        ValueError: a margin that is not positive.
    """
    a, b = read_run(run_a), read_run(run_b)
    check_comparable(a, b)
    for run in (a, b):
        run.scores(metric, condition)  # refuses what is not there
    if metric == "judge":
        check_same_judge(a, b)
    declared = {run.settings["margins"].get(metric) for run in (a, b)}
    if margin is None and len(declared) == 1:
        margin = declared.pop()
    numbers_a, numbers_b = RunNumbers(a, resamples), RunNumbers(b, resamples)
    theirs = {row["question_id"]: row for row in numbers_a.rows[condition]}
    ours = {row["question_id"]: row for row in numbers_b.rows[condition]}
    if set(theirs) != set(ours):
        odd = min(set(theirs) ^ set(ours))
        raise EvaluationError(f"{a.path} and {b.path} do not ask the same questions: only one has {odd!r}.")
    spec = numbers_a.specs.get(metric)
    effects = []
    for task in numbers_a.scopes:
        ids = [name for name, row in theirs.items() if task in (None, row["task"])]
        comparison = compare(
            [ours[name][metric] for name in ids],
            [theirs[name][metric] for name in ids],
            margin=1.0 if margin is None else margin,
            alpha=a.settings["alpha"],
            clusters=[theirs[name]["video_id"] for name in ids],
            num_resamples=resamples,
            seed=a.settings["seed"],
            higher_is_better=spec is None or spec.higher_is_better,
        )
        effects.append(Effect(metric, condition, task, comparison, margin))
    return RunComparison(
        name_a=a.path.name,
        name_b=b.path.name,
        condition=condition,
        metric=metric,
        effects=with_holm(effects, a.settings["alpha"]),
        differences=_differences(a, b, condition),
        level=numbers_a.level,
    )


def check_comparable(a: EvaluationRun, b: EvaluationRun) -> None:
    """Refuse runs that did not ask the same questions.

    Raises:
        EvaluationError: it names both runs, and what is not the same.
    """
    for name in SAME:
        first, second = (run.settings["benchmark"].get(name) for run in (a, b))
        if first != second and name == "digest":
            raise EvaluationError(
                f"{a.path} and {b.path} do not compare: their rows differ, {rows_told(a.settings)} and "
                f"{rows_told(b.settings)}{why_rows_differ(a.settings, b.settings)}. Runs of one benchmark, version "
                "and draw are needed: give both the same --num-samples and --tasks."
            )
        if first != second:
            what = "benchmark" if name == "name" else f"benchmark {name}"
            raise EvaluationError(
                f"{a.path} and {b.path} do not compare: their {what} is {first!r} and {second!r}. Runs of one "
                "benchmark, version and draw are needed."
            )


def rows_told(settings: Mapping[str, Any]) -> str:
    """How many questions a run asks, about how many videos and in how many frames."""
    questions = form.counted(settings["benchmark"]["num_questions"], "question")
    videos = form.counted(settings["benchmark"]["num_samples"], "video")
    return f"{questions} about {videos} in {form.counted(settings['sampling']['num_frames'], 'frame')}"


def why_rows_differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What makes the rows of two runs of one benchmark differ, as far as it is known; to follow `rows_told`."""
    if a["benchmark"]["name"] == "moving_shapes" and a["sampling"]["num_frames"] != b["sampling"]["num_frames"]:
        return (
            " (the moving-shapes benchmark leaves out what few frames cannot show; with 12 or more its questions are "
            "the same)"
        )
    if all(a["benchmark"][name] == b["benchmark"][name] for name in ("num_questions", "num_samples")):
        return " (as many, but others, or in another order)"
    return ""


def check_same_judge(a: EvaluationRun, b: EvaluationRun) -> None:
    """Refuse grades of two judges, which do not compare.

    Raises:
        EvaluationError: it names both runs and judges.
    """
    if a.judge != b.judge:
        raise EvaluationError(
            f"{a.path} and {b.path} were graded by different judges ({a.judge} and {b.judge}), so their grades do not "
            "compare: score both again by one (`score_run`)."
        )


def _differences(a: EvaluationRun, b: EvaluationRun, condition: str) -> dict[str, tuple[Any, Any]]:
    """Settings with different values, without those that say nothing about the answers of this condition."""
    first, second = (
        _flat({name: value for name, value in run.settings.items() if name not in _OTHERWISE})
        | _flat({"condition": next(c["settings"] for c in run.settings["conditions"] if c["name"] == condition)})
        | _flat({"versions": run.settings["environment"].get("versions", {})})
        for run in (a, b)
    )
    first["model.id"], second["model.id"] = (form.public_name(one.get("model.id")) for one in (first, second))
    names = [*first, *(name for name in second if name not in first)]
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
