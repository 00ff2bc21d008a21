"""Evaluation: the bootstrap under the statistics: units that are resampled as a whole, BCa intervals, their inverse.

`scipy.stats.bootstrap` draws and corrects; what is added here is memory bounded by batches, p values from the very
interval that decides, and a short cut where many units are alike, as those of right and wrong answers are: how often
each kind of unit comes in a resample is multinomial, and drawing that is the same bootstrap at a fraction of the work.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BATCH_ELEMENTS = 2**20  # numbers resampled at once: bounds memory to tens of MB whatever the number of samples
ALIKE = 8  # units of a kind, on average, from which on kinds are drawn instead of units


@dataclass(frozen=True)
class Kinds:
    """Units that have the same sums and size: the first one of each kind, and how many there are: each [num_kinds]."""

    first: NDArray[np.int64]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """Sums of scores and numbers of pairs of what is resampled as a whole: each [num_units]."""

    candidate: Array
    baseline: Array
    sizes: Array

    @classmethod
    def of(cls, candidate: Array, baseline: Array, codes: NDArray[np.int64]) -> Units:
        _, codes = np.unique(codes, return_inverse=True)  # a cluster with no pair left is no unit
        return cls(
            *(np.bincount(codes, weights=weights).astype(np.float64) for weights in (candidate, baseline, None))
        )

    @property
    def count(self) -> int:
        return len(self.sizes)

    @cached_property
    def kinds(self) -> Kinds | None:
        """The units by kind, in the order in which these first come; None where few are alike."""
        rows = np.stack([self.candidate, self.baseline, self.sizes], axis=1)
        _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
        order = np.argsort(first)  # not by value, so that exchanging the two sides, or another scale, changes no draw
        return Kinds(first[order], counts[order]) if ALIKE * len(first) <= self.count else None

    def mean(self, sums: Array) -> float:
        return float(sums.sum() / self.sizes.sum()) if self.count else math.nan

    def residuals(self, sums: Array) -> Array:
        """What each unit adds to the deviation of the mean, and to its standard error."""
        return sums - self.mean(sums) * self.sizes

    def standard_error(self, sums: Array) -> float:
        """Of the mean: sd / sqrt(n) for units of one pair, the cluster-robust one (Liang & Zeger) else."""
        if self.count < 2:
            return math.nan
        if constant(self.residuals(sums), sums):
            return 0.0
        spread = (self.residuals(sums) ** 2).sum() * self.count / (self.count - 1)
        return float(math.sqrt(spread) / self.sizes.sum())


@dataclass(frozen=True)
class Draws:
    """A bootstrap distribution (sorted), its interval, and what BCa corrects by: bias z0 and acceleration a."""

    interval: tuple[float, float]
    values: Array
    z0: float = 0.0
    a: float = 0.0

    def p_above(self, bound: float) -> float:
        """Smallest alpha at which the interval's lower end is above `bound`: 1 where nothing is known."""
        return self._p(self.values, bound, self.z0, self.a)

    def p_below(self, bound: float) -> float:
        return self._p(-self.values[::-1], -bound, -self.z0, -self.a)

    @staticmethod
    def _p(values: Array, bound: float, z0: float, a: float) -> float:
        """Invert alpha -> quantile(values, ndtr(z0 + (z0 + z) / (1 - a (z0 + z)))), z = ndtri(alpha), at `bound`."""
        if not len(values):
            return 1.0
        special, floor, last = library("scipy.special"), 1 / (len(values) + 1), len(values) - 1
        if bound >= values[last]:
            return 1.0
        if bound < values[0]:
            return floor
        i = int(np.searchsorted(values, bound, side="right")) - 1  # linear between order statistics, as quantile is
        fraction = (i + (bound - values[i]) / (values[i + 1] - values[i])) / last
        w = float(special.ndtri(fraction)) - z0
        if math.isinf(w) or 1 + a * w <= 0:
            return floor if w < 0 else 1.0
        return max(float(special.ndtr(w / (1 + a * w) - z0)), floor)


@dataclass(frozen=True)
class Bootstrap:
    level: float
    num_resamples: int
    seed: int

    def __call__(self, statistic: Callable[..., Any], *data: Array) -> tuple[tuple[float, float], Array]:
        """Interval and distribution of `statistic` over units resampled together; NaN ends where BCa is undefined."""
        stats = library("scipy.stats")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the caller looks for NaN
            result = stats.bootstrap(
                data,
                statistic,
                n_resamples=self.num_resamples,
                batch=max(1, BATCH_ELEMENTS // len(data[0])),
                vectorized=True,
                paired=True,
                confidence_level=self.level,
                method="BCa",
                rng=np.random.default_rng(self.seed),
            )
        low, high = result.confidence_interval
        return (float(low), float(high)), result.bootstrap_distribution

    def by_kind(self, kinds: Kinds, numerator: Array, denominator: Array) -> tuple[tuple[float, float], Array]:
        """The same of the ratio of two sums over units, drawn by kind; in batches, which change no draw."""
        rng, number = np.random.default_rng(self.seed), int(kinds.counts.sum())
        columns = np.stack([numerator[kinds.first], denominator[kinds.first]], axis=1)
        batch, sums = max(1, BATCH_ELEMENTS // len(columns)), []
        for start in range(0, self.num_resamples, batch):
            drawn = rng.multinomial(number, kinds.counts / number, min(batch, self.num_resamples - start))
            sums.append(drawn.astype(np.float64) @ columns)
        tops, bottoms = np.concatenate(sums).T
        values = tops / bottoms
        z0, a = correction(values, float(ratio(numerator, denominator)), numerator, denominator)
        z = library("scipy.special").ndtri((1 - self.level) / 2)
        shifted = z0 + np.array([z, -z])
        with np.errstate(invalid="ignore"):  # of an infinite bias: the caller looks for NaN
            ends = library("scipy.special").ndtr(z0 + shifted / (1 - a * shifted))
        low, high = (math.nan, math.nan) if np.isnan(ends).any() else np.quantile(values, ends)
        return (float(low), float(high)), values

    def percentiles(self, values: Array) -> tuple[float, float]:
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)


def correction(values: Array, observed: float, numerator: Array, denominator: Array) -> tuple[float, float]:
    """What BCa corrects the distribution of a ratio of sums by: bias z0, and acceleration a from the jackknife."""
    below = (np.count_nonzero(values < observed) + np.count_nonzero(values <= observed)) / (2 * len(values))
    left_out = (numerator.sum() - numerator) / (denominator.sum() - denominator)
    influence = left_out.mean() - left_out
    a = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    return float(library("scipy.special").ndtri(below)), float(a)


def ratio(numerator: Array, denominator: Array, axis: int = -1) -> Array:
    return numerator.sum(axis=axis) / denominator.sum(axis=axis)


def constant(residuals: Array, *scores: Array) -> bool:
    """Whether residuals are nothing but rounding errors of the scores they came from."""
    return bool(np.abs(residuals).max() <= 1e-12 * max(np.abs(score).max() for score in scores))


def library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f'statistics need {package}: pip install "video2lora[evaluation]"') from error
