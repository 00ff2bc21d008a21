"""Evaluation: the numbers of a report, all of them from a run's settings and records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .records import RECORD_FIELDS, EvaluationRun
from .statistics import HolmResult, PairedComparison, compare, holm

if TYPE_CHECKING:
    from .metrics import MetricSpec

RESAMPLES = 10_000
CLAIMS = {"equivalent": "p_equivalence", "non-inferior": "p_non_inferiority", "superior": "p_superiority"}
"""What can be claimed of an effect, and the p value of it."""


@dataclass(frozen=True)
class Mean:
    """A mean score: of `n` answers to questions about `num_clusters` videos; NaN where there is none."""

    value: float
    interval: tuple[float, float]
    n: int
    num_clusters: int


@dataclass(frozen=True)
class Effect:
    """A condition against the baseline.

    Attributes:
        metric, condition: names.
        task: None for all questions together.
        comparison: its verdicts count only where `margin` is not None.
        margin: as it was declared before the run; None if none was.
        holm: each claim corrected over the run's tasks; empty for all questions together.
    """

    metric: str
    condition: str
    task: str | None
    comparison: PairedComparison
    margin: float | None
    holm: dict[str, HolmResult] = field(default_factory=dict)

    @property
    def claims(self) -> list[str]:
        """What the interval shows at the run's alpha."""
        return [] if self.margin is None else claims_of(self.comparison)

    @property
    def holm_claims(self) -> list[str]:
        """What is left of them after Holm's correction."""
        return _strongest({claim: result.rejected for claim, result in self.holm.items()})


@dataclass(frozen=True)
class Spread:
    """Median and quartiles; NaN of nothing."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        known = [value for value in values if value is not None]
        if not known:
            return cls(math.nan, math.nan, math.nan, 0)
        low, median, high = (float(value) for value in np.percentile(known, [25, 50, 75]))
        return cls(median, low, high, len(known))


class RunNumbers:
    """What a report says of one run; computed when asked for.

    Args:
        run: a finished run.
        resamples: of every bootstrap interval.
    """

    def __init__(self, run: EvaluationRun, resamples: int = RESAMPLES) -> None:
        self.run, self.settings, self.resamples = run, run.settings, resamples
        self.conditions, self.baseline = run.conditions, run.settings["baseline"]
        self._means: dict[tuple[str, str, str | None], Mean] = {}
        self._effects: dict[str, list[Effect]] = {}

    # --- rows --------------------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Rows of each condition, in the order of the questions, which is the same in all."""
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in self.conditions}
        for row in self.run.records.to_pylist():
            rows[row["condition"]].append(row)
        return rows

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks in the benchmark's order."""
        found = self.run.tasks
        declared = [task for task in self.settings["benchmark"].get("tasks") or () if task in found]
        return [*declared, *(task for task in found if task not in declared)]

    @property
    def scopes(self) -> list[str | None]:
        """What tables have rows for: all questions (None), and each task where there are several."""
        return [None, *self.tasks] if len(self.tasks) > 1 else [None]

    @property
    def others(self) -> list[str]:
        """Conditions that are compared with the baseline; none where that was not run."""
        return [name for name in self.conditions if name != self.baseline] if self.baseline in self.conditions else []

    @cached_property
    def specs(self) -> dict[str, MetricSpec]:
        """What is known of the run's metrics."""
        from .metrics import METRICS

        return {name: METRICS[name] for name in self.run.metrics if name in METRICS}

    @property
    def quality_metrics(self) -> list[str]:
        """Metrics in which higher is better, those declared first."""
        return [name for name in self._ordered() if name not in self.specs or self.specs[name].higher_is_better]

    @property
    def degeneration_metrics(self) -> list[str]:
        """Metrics in which lower is better."""
        return [name for name in self._ordered() if name not in self.quality_metrics]

    @property
    def main_metric(self) -> str | None:
        """The first metric with a declared margin, else the first of all."""
        metrics = self.quality_metrics
        return next((name for name in metrics if name in self.settings["margins"]), metrics[0] if metrics else None)

    @property
    def candidate(self) -> str | None:
        """The condition that samples are chosen by: the adapter's, else the first that is not the baseline."""
        names = self.others or self.conditions
        return "adapter" if "adapter" in names else names[0]

    @property
    def level(self) -> str:
        """Of all intervals, such as "95 %"."""
        return f"{100 * (1 - 2 * self.settings['alpha']):g} %"

    def _ordered(self) -> list[str]:
        scored = self.run.metrics
        declared = [name for name in self.settings["metrics"] if name in scored]
        return [*declared, *(name for name in scored if name not in declared)]

    def select(self, condition: str, task: str | None = None) -> list[dict[str, Any]]:
        """Rows of a condition, of one task or all."""
        return [row for row in self.rows[condition] if task in (None, row["task"])]

    # --- scores ------------------------------------------------------------------------------------------------------

    def mean(self, metric: str, condition: str, task: str | None = None) -> Mean:
        """Mean score with its BCa interval; whole videos are resampled."""
        key = (metric, condition, task)
        if key not in self._means:
            rows = [row for row in self.select(condition, task) if row[metric] is not None]
            self._means[key] = mean_of(
                [row[metric] for row in rows],
                [row["video_id"] for row in rows],
                alpha=self.settings["alpha"],
                seed=self.settings["seed"],
                resamples=self.resamples,
            )
        return self._means[key]

    def effects(self, metric: str) -> list[Effect]:
        """Every other condition against the baseline, by condition, all questions and then each task."""
        if metric not in self._effects:
            found = []
            for condition in self.others:
                effects = [self._effect(metric, condition, task) for task in self.scopes]
                found += with_holm(effects, self.settings["alpha"])
            self._effects[metric] = found
        return self._effects[metric]

    def effect(self, metric: str, condition: str, task: str | None = None) -> Effect | None:
        """One of `effects`."""
        found = (e for e in self.effects(metric) if (e.condition, e.task) == (condition, task))
        return next(found, None)

    def _effect(self, metric: str, condition: str, task: str | None) -> Effect:
        ours, theirs = self.select(condition, task), self.select(self.baseline, task)
        margin = self.settings["margins"].get(metric)
        comparison = compare(
            [row[metric] for row in ours],
            [row[metric] for row in theirs],
            margin=1.0 if margin is None else margin,  # not read without a declared one
            alpha=self.settings["alpha"],
            clusters=[row["video_id"] for row in theirs],
            num_resamples=self.resamples,
            seed=self.settings["seed"],
            higher_is_better=metric not in self.specs or self.specs[metric].higher_is_better,
        )
        return Effect(metric, condition, task, comparison, margin)

    # --- the rest ----------------------------------------------------------------------------------------------------

    def answered(self, condition: str) -> list[dict[str, Any]]:
        """Rows of a condition whose video could be read."""
        return [row for row in self.rows[condition] if row["error"] is None]

    def values(self, condition: str, column: str) -> list[Any]:
        """What the answers of a condition have in one of `RECORD_FIELDS`."""
        assert column in RECORD_FIELDS
        return [row[column] for row in self.answered(condition) if row[column] is not None]

    def prepare_seconds(self, condition: str) -> Spread:
        """What is done once for a video, over the videos."""
        first = {row["sample_id"]: row["prepare_seconds"] for row in reversed(self.answered(condition))}
        return Spread.of(first.values())

    def answer_seconds(self, condition: str) -> Spread:
        """What is done for a question, over the questions."""
        return Spread.of(self.values(condition, "answer_seconds"))

    def unscored(self, metric: str, condition: str) -> int:
        """Answers of a condition without a score."""
        return sum(row[metric] is None for row in self.answered(condition))


def claims_of(comparison: PairedComparison) -> list[str]:
    """What a comparison's interval shows; what follows from another claim is not repeated."""
    return _strongest({claim: getattr(comparison, claim.replace("-", "_")) for claim in CLAIMS})


def _strongest(shown: Mapping[str, bool]) -> list[str]:
    claims = [claim for claim in ("superior", "equivalent") if shown.get(claim)]
    return claims or (["non-inferior"] if shown.get("non-inferior") else [])


def with_holm(effects: Sequence[Effect], alpha: float) -> list[Effect]:
    """Effects with each claim corrected over those that are of one task; an effect of all tasks is no test of its own.

    Without a declared margin, or with fewer than two tasks, nothing is corrected.
    """
    family = [effect for effect in effects if effect.task is not None and effect.margin is not None]
    if len(family) < 2:
        return list(effects)
    corrected = {
        claim: holm({str(e.task): getattr(e.comparison, p_value) for e in family}, alpha)
        for claim, p_value in CLAIMS.items()
    }
    return [
        Effect(
            e.metric, e.condition, e.task, e.comparison, e.margin, {c: h[str(e.task)] for c, h in corrected.items()}
        )
        if e in family
        else e
        for e in effects
    ]


def mean_of(
    scores: Sequence[float], clusters: Sequence[str], *, alpha: float, seed: int, resamples: int = RESAMPLES
) -> Mean:
    """Mean of scores and its BCa interval at level 1 - 2 alpha, with whole clusters resampled."""
    # a mean is an effect against nothing, and one piece of code makes all intervals
    found = compare(
        scores, [0.0] * len(scores), margin=1.0, alpha=alpha, clusters=clusters, num_resamples=resamples, seed=seed
    )
    return Mean(found.effect, found.interval, found.n, found.num_clusters)
