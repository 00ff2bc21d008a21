"""Evaluation: what paired scores of two conditions allow to say: equivalent, not worse, better, and how sure.

One rule decides: the two-sided 1 - 2 alpha BCa bootstrap interval of the mean difference, and where it lies. With the
default alpha = 0.025 that is the paper's rule: its 95 % interval inside the margin. (The usual 90 % interval of a TOST
would be alpha = 0.05.) A margin is worth something only if it was declared before the scores were seen.

scipy and statsmodels come with the extra `evaluation`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from .bootstrap import Array, Bootstrap, Draws, Units, constant, correction, library, ratio

__all__ = [
    "HolmResult",
    "PairedComparison",
    "Verdicts",
    "achieved_power",
    "compare",
    "holm",
    "interval_verdicts",
    "required_samples",
]

FEW_UNITS = 20  # below, BCa intervals are noticeably too short
CLEAR_OF_ZERO = 4.0  # standard errors a baseline's mean has to be above 0 for a ratio to it to mean anything
MAX_PAIRS = 10**8


class Verdicts(NamedTuple):
    """What an interval of candidate - baseline shows. False means not shown, which is not the same as refuted."""

    equivalent: bool
    non_inferior: bool
    superior: bool


def interval_verdicts(interval: tuple[float, float], margin: float, *, higher_is_better: bool = True) -> Verdicts:
    """Read an interval of candidate - baseline: inside (-margin, margin), above -margin, above 0.

    Bounds on the margin itself do not count as inside; an unknown (NaN) interval shows nothing. With
    `higher_is_better=False` non-inferior is below margin and superior below 0.
    """
    low, high = interval
    worst, best = (low, high) if higher_is_better else (-high, -low)
    return Verdicts(
        equivalent=-margin < low and high < margin and low <= high,
        non_inferior=worst > -margin,
        superior=0 < worst <= best,
    )


@dataclass(frozen=True)
class PairedComparison:
    """Candidate against baseline on the same questions. Unknown numbers are NaN here and null in `to_dict`.

    Attributes:
        n: pairs compared.
        num_left_out: pairs without a score on one side or both; they count in nothing else.
        num_clusters: independent units that were resampled: clusters, or pairs where no clusters were given.
        candidate_mean, baseline_mean: over the n pairs.
        effect: candidate_mean - baseline_mean, whichever direction is better.
        interval: BCa bootstrap interval of the effect at level 1 - 2 alpha. All verdicts come from it.
        standard_error: of the effect, from the spread between units (linearised where clusters differ in size).
        equivalent: the interval lies inside (-margin, margin), i.e. both one-sided tests at alpha succeed (TOST).
        non_inferior: the interval's worse end is better than a loss of `margin`.
        superior: the whole interval is better than 0.
        p_equivalence, p_non_inferiority, p_superiority: the smallest alpha that would still give the verdict, that is
            the BCa interval inverted (p < alpha is the verdict, for this alpha). Never below 1 / (num_resamples + 1).
        p_equivalence_t, p_non_inferiority_t, p_superiority_t: the same from the paired t statistic, as in
            statsmodels' `ttost_paired`; with clusters from the cluster-robust standard error and num_clusters - 1
            degrees of freedom. For comparison: no verdict depends on them.
        retention: candidate_mean / baseline_mean, NaN where the baseline's mean is not clearly above 0.
        retention_interval: its own BCa interval at the same level, from the same resamples.
        margin, alpha, higher_is_better, num_resamples, seed: as given.
        notes: what a reader has to know before trusting the numbers; empty if nothing.
    """

    n: int
    num_left_out: int
    num_clusters: int
    candidate_mean: float
    baseline_mean: float
    effect: float
    interval: tuple[float, float]
    standard_error: float
    equivalent: bool
    non_inferior: bool
    superior: bool
    p_equivalence: float
    p_non_inferiority: float
    p_superiority: float
    p_equivalence_t: float
    p_non_inferiority_t: float
    p_superiority_t: float
    retention: float
    retention_interval: tuple[float, float]
    margin: float
    alpha: float
    higher_is_better: bool
    num_resamples: int
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def sd(self) -> float:
        """Standard deviation per independent unit, as `required_samples` takes it (it then counts such units)."""
        return self.standard_error * math.sqrt(self.num_clusters)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them: tuples as lists, NaN as null."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def compare(
    candidate: Sequence[float | None] | Array,
    baseline: Sequence[float | None] | Array,
    *,
    margin: float,
    alpha: float = 0.025,
    clusters: Sequence[Hashable] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    higher_is_better: bool = True,
) -> PairedComparison:
    """Compare two conditions' scores of the same questions by a paired BCa bootstrap (`scipy.stats.bootstrap`).

    With `clusters`, whole clusters are resampled: the effect of a resample is its sum of differences over its number
    of pairs. Questions about one video are not independent, and resampling them singly gives intervals that are too
    short. The same input and seed give the same numbers. Where units come in few kinds, such as those of right and
    wrong answers, it is drawn how often each kind comes (`bootstrap.Kinds`), not which unit: the same distribution.

    No interval, no verdict and p = 1 where fewer than two units are left. Where all differences are equal the interval
    has no width, and the verdicts are what that number gives: a model compared with itself is equivalent.

    Args:
        candidate, baseline: one score per question, in the same order; None or NaN where there is none, which leaves
            the pair out.
        margin: largest difference that does not matter, > 0, in units of the score.
        alpha: level of each one-sided test.
        clusters: per question what it shares with others: the video's id.
        num_resamples: bootstrap resamples, more than 1 / alpha.
        seed: of the resampling.
        higher_is_better: False for scores such as a rate of repetitions.

    Raises:
        ValueError: lengths differ, a score is infinite, or a number makes no sense.
        ImportError: scipy is not installed.
    """
    _check_test(margin, alpha)
    if num_resamples + 1 <= 1 / alpha:
        raise ValueError(
            f"num_resamples={num_resamples} can show nothing at alpha={alpha:g}: more than {1 / alpha:g} are needed."
        )
    x, y = _scores(candidate, "candidate"), _scores(baseline, "baseline")
    codes = list(range(len(x))) if clusters is None else _codes(clusters)
    if not len(x) == len(y) == len(codes):
        given = "" if clusters is None else f" and {len(codes)} clusters"
        raise ValueError(
            f"{len(x)} candidate scores, {len(y)} baseline scores{given}: one of each per question, in one order."
        )
    kept = ~(np.isnan(x) | np.isnan(y))
    units = Units.of(x[kept], y[kept], np.asarray(codes, dtype=np.int64)[kept])
    notes = [f"pairs left out because a score is missing: {(~kept).sum()} of {len(x)}"] if not kept.all() else []
    bootstrap = Bootstrap(1 - 2 * alpha, num_resamples, seed)

    effect = units.mean(units.candidate - units.baseline)
    error = units.standard_error(units.candidate - units.baseline)
    draws = _effect_draws(units, effect, bootstrap, notes)
    interval = draws.interval
    verdicts = interval_verdicts(interval, margin, higher_is_better=higher_is_better)
    sign = 1 if higher_is_better else -1
    p_low, p_high = draws.p_above(-margin), draws.p_below(margin)
    t_low, t_high = (_t_p(s * effect + margin, error, units.count - 1) for s in (1, -1))
    retention, retention_interval = _retention(units, bootstrap, notes)
    return PairedComparison(
        n=int(kept.sum()),
        num_left_out=int((~kept).sum()),
        num_clusters=units.count,
        candidate_mean=units.mean(units.candidate),
        baseline_mean=units.mean(units.baseline),
        effect=effect,
        interval=interval,
        standard_error=error,
        equivalent=verdicts.equivalent,
        non_inferior=verdicts.non_inferior,
        superior=verdicts.superior,
        p_equivalence=max(p_low, p_high),
        p_non_inferiority=p_low if higher_is_better else p_high,
        p_superiority=draws.p_above(0.0) if higher_is_better else draws.p_below(0.0),
        p_equivalence_t=max(t_low, t_high),
        p_non_inferiority_t=t_low if higher_is_better else t_high,
        p_superiority_t=_t_p(sign * effect, error, units.count - 1),
        retention=retention,
        retention_interval=retention_interval,
        margin=float(margin),
        alpha=float(alpha),
        higher_is_better=higher_is_better,
        num_resamples=num_resamples,
        seed=seed,
        notes=tuple(notes),
    )


class HolmResult(NamedTuple):
    """One test of a family: its p value, that adjusted for the family, and whether it holds at the family's alpha."""

    p_value: float
    adjusted: float
    rejected: bool


def holm(p_values: Mapping[str, float], alpha: float = 0.025) -> dict[str, HolmResult]:
    """Correct a family of tests, such as one verdict over all benchmarks, by Holm's step-down method (statsmodels).

    `rejected` means that the null hypothesis is, so the claim stands; the chance that any such claim is wrong is at
    most `alpha`, however the benchmarks depend on each other. Average rows are no tests of their own: leave them out.

    Raises:
        ValueError: a p value is not in [0, 1], or alpha makes no sense.
        ImportError: statsmodels is not installed.
    """
    _check_test(1.0, alpha)
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"p value of {name!r} is {p!r}, expected a number from 0 to 1.")
    if not p_values:
        return {}
    multipletests = library("statsmodels.stats.multitest").multipletests
    with _cheap_collections():
        rejected, adjusted, *_ = multipletests(list(p_values.values()), alpha=alpha, method="holm")
    rows = zip(p_values.items(), adjusted, rejected, strict=True)
    return {name: HolmResult(float(p), float(corrected), bool(yes)) for (name, p), corrected, yes in rows}


@contextmanager
def _cheap_collections() -> Iterator[None]:
    """Leave what is there out of garbage collection: multipletests collects, most of a second each time with torch."""
    frozen = gc.get_freeze_count() > 0  # by somebody else, who wants it so
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


Test = Literal["equivalence", "non_inferiority"]


def required_samples(
    sd: float,
    margin: float,
    alpha: float = 0.025,
    power: float = 0.8,
    effect: float = 0.0,
    *,
    test: Test = "equivalence",
) -> int:
    """Pairs needed for the verdict to be reached with probability `power` (see `achieved_power`).

    Args:
        sd: standard deviation of the differences. With several questions per video take `PairedComparison.sd` of a
            pilot with clusters; the result then counts videos with as many questions each.
        margin: as in `compare`.
        alpha: level of each one-sided test.
        power: probability to aim at.
        effect: the true difference that is assumed; positive is better.
        test: "equivalence" or "non_inferiority".

    Raises:
        ValueError: with this effect no number of pairs is enough, or a number makes no sense.
        ImportError: scipy is not installed.
    """
    if not 0 < power < 1:
        raise ValueError(f"power={power!r}, expected a number between 0 and 1.")
    if effect <= -margin or (test == "equivalence" and effect >= margin):
        raise ValueError(
            f"a true effect of {effect:g} is not within the margin of {margin:g}: no number of pairs will show {test}."
        )

    def enough(n: int) -> bool:
        return achieved_power(n, sd, margin, alpha, effect, test=test) >= power

    high = 2
    while not enough(high):
        high *= 2
        if high > MAX_PAIRS:
            raise ValueError(
                f"more than {MAX_PAIRS:g} pairs would be needed for effect={effect:g}, margin={margin:g}, sd={sd:g}."
            )
    low = high // 2  # not enough, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def achieved_power(
    n: int, sd: float, margin: float, alpha: float = 0.025, effect: float = 0.0, *, test: Test = "equivalence"
) -> float:
    """Probability that n pairs with normal differences show equivalence or non-inferiority.

    Exact for the paired t test (the integral behind Owen's Q, Phillips 1990), a very good approximation for the
    bootstrap interval of `compare` from some tens of pairs on. Arguments as in `required_samples`.
    """
    _check_test(margin, alpha)
    if test not in ("equivalence", "non_inferiority"):
        raise ValueError(f"test={test!r}, expected 'equivalence' or 'non_inferiority'.")
    if n < 2 or not 0 <= sd < math.inf or not math.isfinite(effect):
        raise ValueError(
            f"n={n}, sd={sd!r}, effect={effect!r}: at least 2 pairs, sd from 0 and finite numbers are needed."
        )
    if sd == 0:
        return float(effect > -margin and (effect < margin or test == "non_inferiority"))
    error = sd / math.sqrt(n)
    upper = (margin - effect) / error if test == "equivalence" else math.inf
    return _t_power((-margin - effect) / error, upper, n - 1, alpha)


def _effect_draws(units: Units, effect: float, bootstrap: Bootstrap, notes: list[str]) -> Draws:
    if units.count < 2:
        notes.append(f"independent units: {units.count}, so no interval and no verdict")
        return Draws((math.nan, math.nan), np.empty(0))
    sums = units.candidate - units.baseline
    if constant(units.residuals(sums), units.candidate, units.baseline):
        notes.append("all differences are equal: the interval has no width")
        return Draws((effect, effect), np.full(bootstrap.num_resamples, effect))
    if units.count < FEW_UNITS:
        notes.append(f"independent units: {units.count}; bootstrap intervals of fewer than {FEW_UNITS} are too short")
    if units.kinds is not None:
        interval, values = bootstrap.by_kind(units.kinds, sums, units.sizes)
        observed = ratio(sums, units.sizes)
    elif np.all(units.sizes == units.sizes[0]):  # the same number, at half the work
        interval, values = bootstrap(np.mean, sums / units.sizes[0])
        observed = np.mean(sums / units.sizes[0])
    else:
        interval, values = bootstrap(ratio, sums, units.sizes)
        observed = ratio(sums, units.sizes)
    if math.isnan(interval[0] + interval[1]):
        notes.append("the BCa interval is undefined here: a percentile interval instead")
        return Draws(bootstrap.percentiles(values), np.sort(values))
    return Draws(interval, np.sort(values), *correction(values, float(observed), sums, units.sizes))


def _retention(units: Units, bootstrap: Bootstrap, notes: list[str]) -> tuple[float, tuple[float, float]]:
    """Candidate / baseline and its interval, if the baseline's mean is so far above 0 that no resample comes near."""
    unknown = (math.nan, math.nan)
    mean, error = units.mean(units.baseline), units.standard_error(units.baseline)
    if not mean > (CLEAR_OF_ZERO * error if units.count > 1 else 0):
        notes.append("the baseline's mean is not clearly above 0: no retention")
        return math.nan, unknown
    retention = units.mean(units.candidate) / mean
    if units.count < 2:
        return retention, unknown
    if constant(units.candidate - retention * units.baseline, units.candidate, units.baseline):
        return retention, (retention, retention)
    if units.kinds is not None:
        interval, values = bootstrap.by_kind(units.kinds, units.candidate, units.baseline)
    else:
        interval, values = bootstrap(ratio, units.candidate, units.baseline)
    return retention, bootstrap.percentiles(values) if math.isnan(interval[0] + interval[1]) else interval


def _t_p(gap: float, error: float, df: int) -> float:
    """One-sided p value of the t statistic gap / error; 1 where nothing is known."""
    if df < 1:
        return 1.0
    if error == 0:
        return 0.0 if gap > 0 else 1.0
    return float(library("scipy.stats").t.sf(gap / error, df))


def _t_power(lower: float, upper: float, df: int, alpha: float) -> float:
    """Probability that an estimate is more than t standard errors above `lower` and below `upper`.

    Bounds are distances from the true value in true standard errors; the estimated one, s, is integrated out.
    """
    stats, special = library("scipy.stats"), library("scipy.special")
    t = float(stats.t.isf(alpha, df))
    s = stats.chi(df, scale=1 / math.sqrt(df))
    end = min(float(s.isf(1e-13)), (upper - lower) / (2 * t))
    start = float(s.ppf(1e-13))
    if end <= start:
        return 0.0
    integral, _ = library("scipy.integrate").quad(
        lambda x: (special.ndtr(upper - t * x) - special.ndtr(lower + t * x)) * s.pdf(x), start, end, epsabs=1e-10
    )
    return min(max(float(integral), 0.0), 1.0)


def _scores(values: Sequence[float | None] | Array, name: str) -> Array:
    scores = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"{name} has shape {list(scores.shape)}, expected one score per question.")
    if np.isinf(scores).any():
        raise ValueError(f"{name} score {int(np.isinf(scores).argmax())} is infinite; a missing score is None or NaN.")
    return scores


def _codes(clusters: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]


def _check_test(margin: float, alpha: float) -> None:
    if not 0 < margin < math.inf:
        raise ValueError(
            f"margin={margin!r}, expected a positive number: the largest difference that does not matter."
        )
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha={alpha!r}, expected the level of a one-sided test, such as 0.025.")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
