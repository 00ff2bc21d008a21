"""Moving shapes, stage 3: the plots of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.ticker import MultipleLocator  # noqa: E402
from proof_numbers import Numbers, wilson  # noqa: E402
from proof_runs import KEPT  # noqa: E402

COLOURS = {"video": "#5b6770", "adapter": "#1f77b4", "caption": "#2a9d55", "other_adapter": "#e3a14f",
           "no_adapter": "#c8ccd0"}  # fmt: skip
LABELS = {"video": "video in context", "no_adapter": "no adapter", "other_adapter": "another video's adapter",
          "caption": "own caption as text"}  # fmt: skip


def draw_bars(run: Numbers, plot: Path) -> None:
    """Accuracy of every condition, task by task, with 95 % intervals and the answer prior."""
    tasks, conditions = run.tasks, [name for name in COLOURS if name in run.conditions]
    figure, axis = plt.subplots(figsize=(12, 4.4))
    width, places = 0.84 / len(conditions), np.arange(len(tasks))
    for number, condition in enumerate(conditions):
        values = np.array([run.mean(condition, task) for task in tasks])
        counts = [int(run.of_task(task).sum()) for task in tasks]
        bounds = np.array([wilson(value, count) for value, count in zip(values, counts, strict=True)]).T
        at = places + (number - (len(conditions) - 1) / 2) * width
        axis.bar(at, values, width, color=COLOURS[condition], label=LABELS.get(condition, condition), zorder=2)
        axis.errorbar(at, values, np.abs(bounds - values), fmt="none", ecolor="#333333", elinewidth=0.8, zorder=3)
    priors = [float(run.guesses[run.of_task(task)].mean()) for task in tasks]
    axis.hlines(priors, places - 0.45, places + 0.45, color="#c0392b", linestyle="--", linewidth=1.2, zorder=4,
                label="answer prior")  # fmt: skip
    axis.set_xticks(places, labels=[task.replace("_", " ") for task in tasks])
    axis.set(ylabel="exact match", ylim=(0, 1.03), xlim=(-0.6, len(tasks) - 0.4))
    axis.legend(ncols=6, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _plain(axis)
    _save(figure, plot)


def draw_sweep(label: str, runs: Mapping[int, Numbers], trained: Sequence[int], plot: Path) -> None:
    """A small plot a task: video and adapter; empty marks where only some of the questions are decided."""
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run.tasks))
    columns, xs = 4, np.array(list(runs))
    figure, axes = plt.subplots(-(-len(tasks) // columns), columns, figsize=(12, 7.6), sharex=True, sharey=True)
    lines: dict[str, Any] = {}
    for task, axis in zip(tasks, axes.flat, strict=False):
        if len(trained) > 1:
            axis.axvspan(min(trained), max(trained), color="#1f77b4", alpha=0.07, lw=0)
        for condition, mark in (("video", "o"), ("adapter", "s")):
            style = {"color": COLOURS[condition], "marker": mark, "markersize": 4.5}
            whole = [run.mean(condition, task) for run in runs.values()]
            decided = [run.mean(condition, task, kept=run.decided) for run in runs.values()]
            bounds = np.array([wilson(m, int((run.of_task(task) & run.decided).sum()))
                               for m, run in zip(decided, runs.values(), strict=True)]).T  # fmt: skip
            (lines[LABELS.get(condition, condition)],) = axis.plot(xs, decided, "-", **style, zorder=3)
            axis.fill_between(xs, *bounds, color=COLOURS[condition], alpha=0.18, lw=0)
            if any(abs(a - b) > 1e-9 for a, b in zip(whole, decided, strict=True)):
                (lines["undecided questions too"],) = axis.plot(xs, whole, ":", markerfacecolor="white", **style)
        axis.set_title(task.replace("_", " "), fontsize=10)
        axis.set(xscale="log", ylim=(0, 1.03))
        axis.set_xticks(xs, labels=[str(x) for x in xs], fontsize=7)
        axis.minorticks_off()
        _plain(axis)
    for axis in list(axes.flat)[len(tasks) :]:
        axis.axis("off")
    for axis in list(axes.flat)[: len(tasks)][-columns:]:
        axis.tick_params(labelbottom=True)
    figure.legend(lines.values(), lines.keys(), ncols=3, frameon=False, loc="upper center", fontsize=9)
    figure.supxlabel(label, fontsize=10)
    figure.supylabel("exact match", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    _save(figure, plot, tight=False)


def draw_composition(kept: Mapping[str, Mapping[int, tuple[float, float, float]]], plot: Path) -> None:
    """What composed adapters keep of the whole video's adapter's accuracy, by number of segments.

    Args:
        kept: by what is asked and the number of segments: share, and its interval.
        plot: the file.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    colours = ["#1f77b4", "#e3a14f", "#2a9d55", "#8e5ea2"]
    for number, (name, values) in enumerate(kept.items()):
        xs = np.arange(len(values)) + (number - (len(kept) - 1) / 2) * 0.12
        shares, low, high = np.array(list(values.values())).T
        axis.errorbar(xs, shares, [shares - low, high - shares], fmt="o", capsize=3, label=name,
                      color=colours[number % len(colours)])  # fmt: skip
    axis.axhline(KEPT, color="#c0392b", linestyle="--", linewidth=1.2, label=f"declared: {KEPT:.0%}")
    axis.plot([0], [0.93], "x", color="#333333", label="published, 2 segments: 93 and 86 %")
    axis.plot([0], [0.86], "x", color="#333333")
    axis.axhline(1, color="#5b6770", linewidth=0.8)
    segments = list(next(iter(kept.values())))
    axis.set_xticks(range(len(segments)), labels=[f"{n} segments" for n in segments])
    axis.set(ylabel="of the whole video's adapter's accuracy", xlim=(-0.5, len(segments) - 0.5))
    axis.yaxis.set_major_locator(MultipleLocator(0.02 if axis.get_ylim()[0] > 0.8 else 0.1))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _plain(axis)
    _save(figure, plot)


def _plain(axis: Any) -> None:
    axis.grid(axis="y", alpha=0.25, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, plot: Path, tight: bool = True) -> None:
    more = {"bbox_inches": "tight"} if tight else {}
    figure.savefig(plot, dpi=110, metadata={"Software": None}, **more)
    plt.close(figure)
