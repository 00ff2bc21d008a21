"""Trainer: the learning curve of a run as a picture, from what the run logged."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.files import write_atomically

CURVE_FILE = "learning_curve.png"
_EVAL_LOSS = re.compile(r"eval_(?:(.+)_)?loss")

Points = list[tuple[int, float]]


def logged(history: Sequence[Mapping[str, Any]], name: str) -> Points:
    """The finite values logged under `name`, as (step, value), the last one of each step."""
    values = {int(entry["step"]): float(entry[name]) for entry in history if name in entry and "step" in entry}
    return [(step, value) for step, value in sorted(values.items()) if math.isfinite(value)]


def eval_losses(history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """The losses of each evaluation set; the name of the only one is empty."""
    keys = {key: match for entry in history for key in entry if (match := _EVAL_LOSS.fullmatch(key))}
    series = {match.group(1) or "": logged(history, key) for key, match in sorted(keys.items())}
    return {name: points for name, points in series.items() if points}


def draw_learning_curve(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw training loss, evaluation losses and learning rate against steps as a PNG.

    Args:
        history: `trainer.state.log_history`.
        path: where to; written under another name and renamed.

    Returns:
        Whether there was anything to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # not pyplot: it would choose a backend for the whole process
    from matplotlib.ticker import MaxNLocator

    train, evals, rates = logged(history, "loss"), eval_losses(history), logged(history, "learning_rate")
    if not train and not evals:
        return False
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    losses, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    if train:
        losses.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1, marker=_marker(train), label="training")
    for number, (name, points) in enumerate(evals.items()):
        label = f"evaluation, {name}" if name else "evaluation"
        losses.plot(*zip(*points, strict=True), color=f"C{number + 1}", marker="o", markersize=3, label=label)
    losses.set_ylabel("loss")
    losses.grid(alpha=0.3)
    losses.legend()
    if rates:
        below.plot(*zip(*rates, strict=True), color="tab:gray", linewidth=1, marker=_marker(rates))
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
    return True


def _marker(points: Points) -> str:
    """A line of one point would not be seen."""
    return "." if len(points) < 20 else ""
