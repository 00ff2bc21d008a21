"""Evaluation: how a report writes numbers; what is not known is a dash."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence

from .report_numbers import Effect, Mean, Spread
from .statistics import PairedComparison

NONE = "–"
ALL = "all questions"


def task_name(task: str | None) -> str:
    """A task as tables have it."""
    return ALL if task is None else task or "(no task)"


def score(value: float | None) -> str:
    """A score, 0 to 1."""
    return NONE if value is None or math.isnan(value) else f"{value:.3f}"


def signed(value: float) -> str:
    """A difference of scores."""
    return NONE if math.isnan(value) else f"{value:+.3f}"


def interval(bounds: tuple[float, float], form: str = ".3f") -> str:
    """An interval's two ends."""
    low, high = bounds
    return NONE if math.isnan(low) or math.isnan(high) else f"[{low:{form}}, {high:{form}}]"


def mean(value: Mean) -> str:
    """A mean with its interval, where there is one."""
    bounds = interval(value.interval)
    return score(value.value) if bounds == NONE else f"{score(value.value)} {bounds}"


def retention(comparison: PairedComparison) -> str:
    """The part of the baseline's score that is kept, with its interval."""
    bounds = interval(comparison.retention_interval, ".1%")
    return NONE if math.isnan(comparison.retention) else f"{comparison.retention:.1%} {bounds}"


def verdict(effect: Effect) -> str:
    """What the interval shows with the declared margin; a clear difference within the margin is told too."""
    if effect.margin is None:
        return "no margin declared"
    if math.isnan(effect.comparison.interval[0]):
        return "too few videos"
    text = ", ".join(effect.claims) or "none"
    low, high = effect.comparison.interval
    worse, better = (high < 0, low > 0) if effect.comparison.higher_is_better else (low > 0, high < 0)
    if worse:
        return f"{text} (worse)"
    return f"{text} (better)" if better and "superior" not in effect.claims else text


def holm_verdict(effect: Effect) -> str:
    """What is left of the verdict when all tasks count as one family, and the corrected p values."""
    if not effect.holm:
        return NONE
    return ", ".join(effect.holm_claims) or "none"


def p_values(effect: Effect) -> str:
    """p values of equivalent / non-inferior / superior; corrected ones where there are any."""
    if effect.margin is None:
        return NONE
    if effect.holm:
        return " / ".join(_p(result.adjusted) for result in effect.holm.values())
    c = effect.comparison
    return " / ".join(map(_p, (c.p_equivalence, c.p_non_inferiority, c.p_superiority)))


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def seconds(spread: Spread) -> str:
    """Median and quartiles in seconds."""
    if not spread.n:
        return NONE
    return f"{_seconds(spread.median)} [{_seconds(spread.low)}, {_seconds(spread.high)}]"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def count_range(values: Sequence[int]) -> str:
    """Median, least and most of whole numbers."""
    if not values:
        return NONE
    ordered = sorted(values)
    low, high, middle = ordered[0], ordered[-1], ordered[len(ordered) // 2]
    return f"{low:,}" if low == high else f"{middle:,} ({low:,} to {high:,})"


def share(values: Sequence[bool]) -> str:
    """Part of the values that are true."""
    return f"{sum(values) / len(values):.1%}" if values else NONE


def counted(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def public_name(name: str | None) -> str | None:
    """A Hub id as it is; of a folder's path only the last part: it is nowhere but on one machine."""
    if name is None:
        return None
    local = name.count("/") > 1 or name.startswith((".", "/", "~")) or os.sep != "/" and os.sep in name
    return os.path.basename(name.rstrip("/\\")) if local else name


def without_folders(message: str) -> str:
    """A message whose paths have only their last part: folders are those of one machine."""
    return re.sub(r"(?<![\w:/.])/(?:[^\s/:]+/)+", "", message)
