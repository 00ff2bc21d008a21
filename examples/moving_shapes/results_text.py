"""Moving shapes, stage 3: how numbers, names and tables are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from proof_plots import LABELS
from proof_runs import backwards, segments_of
from train_hypernetwork import HELD_OUT_TASKS

from video2lora.evaluation.statistics import PairedComparison


def pretty(condition: str) -> str:
    """A condition's name for people."""
    if condition == "adapter" or condition in LABELS:
        return LABELS.get(condition, condition)
    segments, kept = segments_of(condition)
    if condition == backwards(segments):
        return f"{segments} segments, backwards"
    if len(kept) == segments:
        return f"{segments} segments"
    return f"segment {', '.join(str(place + 1) for place in kept)} of {segments} alone"


def task_name(task: str) -> str:
    """A task's name, and whether a hypernetwork was ever asked such questions."""
    return task.replace("_", " ") + (" †" if task in HELD_OUT_TASKS else "")


def score(value: float, digits: int = 3) -> str:
    """A share; a dash for nothing."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def difference(effect: PairedComparison) -> str:
    """A difference with its interval."""
    low, high = effect.interval
    return f"{effect.effect:+.3f} [{low:+.3f}, {high:+.3f}]" if not math.isnan(low) else f"{effect.effect:+.3f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1, last: int = 0) -> str:
    """A Markdown table; numbers stand on the right, but for the first `words` and the `last` columns."""
    numbers = range(words, len(header) - last)
    marks = ["---:" if place in numbers else "---" for place in range(len(header))]
    cleaned = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(header), marks, *cleaned])


def check_free(page: Path, overwrite: bool) -> None:
    """Leave a page that is there already as it is.

    Raises:
        SystemExit: there is one, and nobody said that it may be replaced.
    """
    if page.exists() and not overwrite:
        raise SystemExit(f"{page} is there already: name another with -o, or replace it with --overwrite.")
