"""Moving shapes, stage 3: the results away from 12 frames: other numbers of frames and pixels, composition, order."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from proof_numbers import NOT_RUN, Claim, Numbers, mean
from proof_runs import COMPOSED, ENOUGH, KEPT, LOSS, MARGIN, backwards
from results_main import DAGGER, degeneration_table
from results_text import difference, pretty, score, table, task_name

from video2lora.evaluation.statistics import PairedComparison

PUBLISHED = "93 and 86 % for 2 segments"


@lru_cache(maxsize=64)
def losses(run: Numbers, base: Numbers, condition: str) -> dict[str, PairedComparison]:
    """By task, a condition against itself at 12 frames, on the questions that these frames decide."""
    mine, theirs = run.scores(condition), run.aligned(base, condition)
    found = {}
    for task in run.tasks:
        kept = run.of_task(task) & run.decided & ~np.isnan(theirs)
        if kept.any():
            found[task] = run.against(mine, theirs, kept, LOSS)
    return found


def loss_claims(runs: Mapping[int, Numbers], base: Numbers, title: str) -> list[Claim]:
    """What the adapter loses from its accuracy at 12 frames where it can know the answer: measured, and shown."""
    cells = {(n, task): loss for n, run in runs.items() for task, loss in losses(run, base, "adapter").items()}
    claimed = {cell: loss for cell, loss in cells.items() if loss.n >= ENOUGH} or cells  # a trial has few of all
    if not claimed:
        return [Claim(f"{title}: adapter's loss", None, NOT_RUN)]
    worst = min(claimed, key=lambda cell: claimed[cell].effect)
    told = f"largest {difference(claimed[worst])} ({task_name(worst[1])}, {worst[0]}); {len(claimed)} cells"
    over = [_cell(cell, loss) for cell, loss in claimed.items() if loss.effect < -LOSS]
    open_ = [_cell(cell, loss) for cell, loss in claimed.items() if not loss.non_inferior]
    shown = f"{len(claimed) - len(open_)} of {len(claimed)} cells"
    lost = any(loss.interval[1] < -LOSS for loss in claimed.values())
    name = f"{title}: the adapter loses at most {LOSS} from its accuracy at 12 frames on decided questions"
    name += f" (tasks with at least {ENOUGH})"
    return [
        Claim(f"{name}, measured", not over, told, over),
        Claim(f"{name}, shown at 95 %", not open_, shown, open_, lost),
    ]


def _cell(cell: tuple[int, str], loss: PairedComparison) -> str:
    return (
        f"{cell[0]}, {task_name(cell[1])}: {loss.baseline_mean:.3f} to {loss.candidate_mean:.3f}, {difference(loss)}"
    )


def sweep_section(title: str, told: str, runs: Mapping[int, Numbers], base: Numbers, plot: Path) -> list[str]:
    """Accuracy of video and adapter, of all and of decided questions, and losses from 12 frames."""
    tasks, header = base.tasks, ["task", "condition", *map(str, runs)]
    clips = ["clips", "", *(f"{run.num_clips:,}" for run in runs.values())]
    accuracy, decided, lost = [clips], [], []
    few = {n: run for n, run in runs.items() if not run.decided.all()}
    effects = {
        (n, c): losses(run, base, c) for n, run in runs.items() for c in ("video", "adapter") if run is not base
    }
    for task in tasks:
        if few:
            shares = [f"{run.decided[run.of_task(task)].mean():.2f}" for run in few.values()]
            decided.append([task_name(task), "share decided", *shares])
        for condition in ("video", "adapter"):
            name = [task_name(task), pretty(condition)]
            accuracy.append([*name, *(score(run.mean(condition, task)) for run in runs.values())])
            decided.append([*name, *(score(run.mean(condition, task, kept=run.decided)) for run in few.values())])
            cells = [effects[n, condition].get(task) if (n, condition) in effects else None for n in runs]
            lost.append([*name, *("" if e is None else difference(e) for e in cells)])
    parts = [
        f"## {title}",
        told,
        f"![{title}]({plot.name})",
        "### Exact match, all questions",
        table(header, accuracy, 2),
    ]
    if few:
        parts += ["### Questions that the frames decide", table(["task", "condition", *map(str, few)], decided, 2)]
    return [*parts, "### Change from 12 frames of video, decided questions, 95 %", table(header, lost, 2), DAGGER]


def degeneration_section(runs: Mapping[int, Numbers]) -> list[str]:
    """How answers degenerate with more or fewer frames, of video in context and of adapters."""
    rows = [
        [pretty(condition), name, *(score(run.mean(condition, metric=metric), 4) for run in runs.values())]
        for metric, name in (("repetition", "repeated 4-grams"), ("empty", "empty"), ("unended", "not ended"))
        for condition in ("video", "adapter")
    ]
    return ["### Degeneration by frames", table(["condition", "share of answers", *map(str, runs)], rows, 2)]


def composed(run: Numbers) -> list[str]:
    """Conditions of a run whose segments are composed in order."""
    return [name for name in run.conditions if name in COMPOSED]


def what_is_asked(run: Numbers) -> str:
    """For titles."""
    across = run.run.across
    return "questions of all tasks" if across is None else f"order across {across} segments"


def composition_kept(run: Numbers) -> dict[tuple[str, int], tuple[float, float, float]]:
    """By kind of question and number of segments, what is kept of the whole video's adapter's accuracy."""
    found = {}
    for name in composed(run):
        effect = run.against(run.scores(name), run.scores("adapter"), run.of_task(None))
        what = "all tasks" if run.run.across is None else "order across segments"
        found[what, int(name.split("_")[1])] = (effect.retention, *effect.retention_interval)
    return {key: value for key, value in found.items() if not np.isnan(value).any()}


def composition_claims(run: Numbers) -> list[Claim]:
    """The declared share is kept: over all questions, and by how much each task falls short."""
    claims = []
    for name in composed(run):
        effect = run.against(run.scores(name), run.scores("adapter"), run.of_task(None))
        low, high = effect.retention_interval
        told = f"keeps {effect.retention:.1%} [{low:.1%}, {high:.1%}]: "
        told += f"{effect.candidate_mean:.3f} of {effect.baseline_mean:.3f}"
        failures = []
        for task in run.tasks if run.run.across is None else ():
            whole, mine = run.mean("adapter", task), run.mean(name, task)
            if mine < KEPT * whole:
                failures.append(f"{task_name(task)}: {mine:.3f} of {whole:.3f}, {mine / whole:.1%}")
        what = f"Composition, {what_is_asked(run)}: {pretty(name)} keep {KEPT:.0%} of the whole video's adapter"
        holds = None if np.isnan(effect.retention) else bool(low >= KEPT)
        claims.append(Claim(what, holds, told, failures, refuted=bool(high < KEPT)))
    return claims


def composition_section(run: Numbers) -> list[str]:
    """Composed adapters and single segments against the whole video's adapter."""
    rows = []
    for task in [*run.tasks, *([None] if len(run.tasks) > 1 else [])]:
        whole = run.mean("adapter", task)
        row = ["*all*" if task is None else task_name(task), f"{run.of_task(task).sum():,}"]
        for condition in run.conditions:
            value = run.mean(condition, task)
            kept = f" ({value / whole:.0%})" if condition.startswith("adapter_") and whole else ""
            row.append(f"{score(value)}{kept}")
        rows.append(row)
    names = [pretty(condition) for condition in run.conditions]
    told = (
        f"In brackets: of the whole video's adapter (published: {PUBLISHED}). Clips of {run.run.length} frames; the "
        f"whole and every segment are shown in {run.run.num_frames}. One segment alone is the control: what it keeps "
        "needs no composition."
    )
    parts = [f"### {what_is_asked(run).capitalize()}", table(["task", "questions", *names], rows)]
    return [*parts, told, degeneration_table(run)] if run.run.across is None else parts


def order_section(runs: Mapping[str, Numbers]) -> list[str]:
    """Whether it matters in which order segments are composed."""
    rows = []
    for run in runs.values():
        for forwards in composed(run):
            wrong = backwards(int(forwards.split("_")[1]))
            if wrong not in run.conditions:
                continue
            effect = run.against(run.scores(forwards), run.scores(wrong), run.of_task(None))
            pairs = zip(run.column("answer", forwards), run.column("answer", wrong), strict=True)
            same = mean([float(a == b) for a, b in pairs])
            numbers = [score(effect.candidate_mean), score(effect.baseline_mean), difference(effect), f"{same:.1%}"]
            kept = "order matters" if effect.superior else "no difference" if effect.equivalent else "open"
            rows.append([what_is_asked(run), pretty(forwards), *numbers, kept])
    if not rows:
        return []
    header = ["questions", "composed of", "in order", "backwards", "difference, 95 %", "same answer", "shown"]
    told = (
        "A composed adapter is the sum of its segments' updates, and a sum has no order: composing backwards can "
        "change answers by rounding alone. What order a composed adapter knows, its segments must have been told, "
        f'such as by the times of their frames. "No difference": the interval lies within {MARGIN}.'
    )
    return ["### Exactness of order", table(header, rows, 2, 1), told]
