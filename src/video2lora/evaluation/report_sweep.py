"""Evaluation: reports over several runs: one benchmark with other frames, and several benchmarks side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from . import report_format as form
from .comparison import check_comparable, check_same_judge
from .records import EvaluationError, read_run
from .report import write_document
from .report_document import Block, Document, Figure, Section, Table, Text
from .report_numbers import CLAIMS, RESAMPLES, Effect, RunNumbers, with_holm
from .report_plots import curves, heat_map
from .report_tables import plot_file

__all__ = ["write_summary_report", "write_sweep_report"]

Cell = tuple[int, int | None]
"""Frames asked for, and the longest edge in pixels."""


def write_sweep_report(
    run_dirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, resamples: int = RESAMPLES
) -> list[Path]:
    """Write a report over runs of one benchmark and model that differ in frames or in their size.

    For each metric: scores and intervals over frames x condition, of all questions and each task, as tables, heat maps
    and curves. With one size the x axis is the number of frames, with several the frames are drawn size by size; with
    one number of frames it is the size.

    Args:
        run_dirs: folders of finished runs, each with another `num_frames` or `longest_edge`.
        output: folder of `report.md`, `report.html` and `plots/`.
        resamples: of each bootstrap interval.

    Returns:
        The files written.

    Raises:
        EvaluationError: fewer than two runs, of different benchmarks, rows, models, judges, decoding or declared
            tests, or two with the same frames.
        ImportError: a library of the extra "evaluation" is missing.
    """
    runs = _sweep_runs(run_dirs, resamples)
    folder = Path(output)
    first = next(iter(runs.values()))
    sections = [_sweep_settings(runs)]
    written: list[Path] = []
    for metric in [name for name in first.quality_metrics if all(name in n.run.metrics for n in runs.values())]:
        section, drawn = _sweep_metric(runs, metric, folder)
        sections.append(section)
        written += drawn
    sections.append(_sweep_times(runs))
    title = f"Frames and sizes: {first.settings['benchmark']['title']}"
    return written + write_document(Document(title, sections), folder)


def write_summary_report(
    run_dirs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, resamples: int = RESAMPLES
) -> list[Path]:
    """Write a report over runs of several benchmarks: effects side by side, verdicts with Holm's correction over them.

    Args:
        run_dirs: folders of finished runs, each of another benchmark (or version, or rows).
        output: folder of `report.md` and `report.html`.
        resamples: of each bootstrap interval.

    Raises:
        EvaluationError: fewer than two runs, two of the same rows, or with different alpha.
        ImportError: a library of the extra "evaluation" is missing.
    """
    runs = [RunNumbers(read_run(path), resamples) for path in run_dirs]
    _check_summary(runs)
    titles = _titles(runs)
    metrics = list(dict.fromkeys(metric for numbers in runs for metric in numbers.quality_metrics))
    sections = []
    for metric in metrics:
        conditions = dict.fromkeys(name for n in runs if metric in n.run.metrics for name in n.others)
        blocks: list[Block] = [_summary_table(runs, titles, metric, condition) for condition in conditions]
        if blocks:
            sections.append(Section(f"Scores: {metric}", blocks))
    text = (
        f"Each condition against its run's baseline, over all questions; {runs[0].level} BCa bootstrap intervals over "
        "whole videos. After Holm: what is left when the benchmarks that declared a margin count as one family of "
        "tests. There is no average over benchmarks: it would hide those that fail."
    )
    rows = [
        [title, form.public_name(n.settings["model"].get("id")) or "", _frames(n)]
        for title, n in zip(titles, runs, strict=True)
    ]
    about = Section("What was run", [Text(text), Table(("benchmark", "model", "frames"), rows, numbers_from=3)])
    return write_document(Document("Benchmarks side by side", [about, *sections]), Path(output))


# --- sweep -----------------------------------------------------------------------------------------------------------


def _sweep_runs(run_dirs: Sequence[str | os.PathLike[str]], resamples: int) -> dict[Cell, RunNumbers]:
    """Runs by frames and size, in this order."""
    runs = [read_run(path) for path in run_dirs]
    if len(runs) < 2:
        raise EvaluationError(f"a sweep needs two runs or more, got {len(runs)}.")
    found: dict[Cell, RunNumbers] = {}
    for run in runs:
        check_comparable(runs[0], run)
        for part in ("model", "base"):
            before, now = ({k: v for k, v in r.settings[part].items() if k != "id"} for r in (runs[0], run))
            if before != now:
                raise EvaluationError(f"{runs[0].path} and {run.path} are of different models ({part} in run.json).")
        for part in ("decoding", "alpha", "baseline", "margins"):
            before, now = (r.settings[part] for r in (runs[0], run))
            if before != now:
                raise EvaluationError(
                    f"{runs[0].path} and {run.path} differ in more than their frames: {part} is {before!r} and "
                    f"{now!r}."
                )
        if "judge" in runs[0].metrics and "judge" in run.metrics:
            check_same_judge(runs[0], run)
        sampling = run.settings["sampling"]
        cell = (sampling["num_frames"], sampling.get("longest_edge"))
        if cell in found:
            raise EvaluationError(
                f"{found[cell].run.path} and {run.path} have the same frames ({_cell_name(cell)}): a sweep needs one "
                "of each."
            )
        found[cell] = RunNumbers(run, resamples)
    return dict(sorted(found.items(), key=lambda item: (item[0][1] or 0, item[0][0])))


def _cell_name(cell: Cell) -> str:
    frames, edge = cell
    return f"{frames} frames" if edge is None else f"{frames} frames, {edge} px"


def _order(runs: dict[Cell, RunNumbers]) -> list[str]:
    return list(dict.fromkeys(name for numbers in runs.values() for name in numbers.conditions))


def _frames(numbers: RunNumbers) -> str:
    sampling = numbers.settings["sampling"]
    return _cell_name((sampling["num_frames"], sampling.get("longest_edge")))


def _sweep_settings(runs: dict[Cell, RunNumbers]) -> Section:
    first = next(iter(runs.values()))
    benchmark = first.settings["benchmark"]
    questions, videos = benchmark["num_questions"], benchmark["num_samples"]
    text = (
        f"{benchmark['title']} ({benchmark['name']}, version {benchmark['version']}): "
        f"{form.counted(questions, 'question')} about {form.counted(videos, 'video')}, the same in all runs. "
        f"Intervals are {first.level} BCa bootstrap intervals over whole videos ({first.resamples:,} resamples)."
    )
    rows = []
    for cell, numbers in runs.items():
        name = numbers.baseline if numbers.baseline in numbers.conditions else numbers.conditions[0]
        used, tokens = (form.count_range(numbers.values(name, column)) for column in ("num_frames", "context_tokens"))
        rows.append([_cell_name(cell), used, name, tokens, f"{len(numbers.run.errors):,}"])
    columns = ("run", "frames really used", "condition", "its context tokens", "unreadable videos")
    return Section("What was run", [Text(text), Table(columns, rows)])


def _sweep_metric(runs: dict[Cell, RunNumbers], metric: str, folder: Path) -> tuple[Section, list[Path]]:
    order, first = _order(runs), next(iter(runs.values()))
    margin = first.settings["margins"].get(metric)
    blocks: list[Block] = [
        Text("The declared margin is " + (f"{margin:g}." if margin is not None else "none: there is no verdict."))
    ]
    files = []
    heat, lines = plot_file("heat", metric), plot_file("curves", metric)
    grid = [[_value(numbers, metric, name) for name in order] for numbers in runs.values()]
    heat_map(folder / heat, f"mean {metric}, all questions", [_cell_name(c) for c in runs], order, grid)
    files += [heat]
    blocks.append(Figure(heat, f"{metric} by frames and condition"))
    panels, x_name = _panels(runs, metric, order)
    curves(folder / lines, panels, order, x_name=x_name, y_name=f"mean {metric}, {first.level} interval")
    files += [lines]
    blocks.append(Figure(lines, f"{metric} against {x_name}, with intervals"))
    blocks.append(_sweep_table(runs, metric, order))
    if any(numbers.others for numbers in runs.values()):
        blocks.append(_sweep_effects(runs, metric))
        for condition in order:
            file = _effect_map(runs, metric, condition, folder)
            if file is not None:
                files.append(file)
                blocks.append(Figure(file, f"{condition} minus {first.baseline} by frames and size"))
    return Section(f"Scores: {metric}", blocks), [folder / file for file in files]


def _value(numbers: RunNumbers, metric: str, condition: str, task: str | None = None) -> float:
    return numbers.mean(metric, condition, task).value if condition in numbers.conditions else float("nan")


def _panels(
    runs: dict[Cell, RunNumbers], metric: str, order: Sequence[str]
) -> tuple[dict[str, dict[str, list[tuple[float, float, float, float]]]], str]:
    """A panel for each task (and size), a line for each condition; and what is on the x axis."""
    edges = list(dict.fromkeys(edge for _, edge in runs))
    by_size = len({frames for frames, _ in runs}) == 1 and len(edges) > 1 and None not in edges
    panels: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for cell, numbers in runs.items():
        frames, edge = cell
        for scope in numbers.scopes:
            title = form.task_name(scope)
            if len(edges) > 1 and not by_size:
                title += ", own size" if edge is None else f", {edge} px"
            for name in [name for name in order if name in numbers.conditions]:
                mean = numbers.mean(metric, name, scope)
                x = float(edge or 0) if by_size else float(frames)
                panels.setdefault(title, {}).setdefault(name, []).append((x, mean.value, *mean.interval))
    return panels, "longest edge of frames (px)" if by_size else "frames"


def _sweep_table(runs: dict[Cell, RunNumbers], metric: str, order: Sequence[str]) -> Table:
    rows = []
    for scope in next(iter(runs.values())).scopes:
        for cell, numbers in runs.items():
            cells = [
                form.mean(numbers.mean(metric, name, scope)) if name in numbers.conditions else form.NONE
                for name in order
            ]
            rows.append([form.task_name(scope), _cell_name(cell), *cells])
    return Table(("task", "run", *order), rows, numbers_from=2)


def _sweep_effects(runs: dict[Cell, RunNumbers], metric: str) -> Table:
    rows = []
    for cell, numbers in runs.items():
        for name in numbers.others:
            effect = numbers.effect(metric, name)
            assert effect is not None
            rows.append([_cell_name(cell), name, *_effect_row(effect)])
    return Table(("run", "condition", "baseline", "effect", "interval", "kept", "verdict"), rows, numbers_from=2)


def _effect_row(effect: Effect) -> list[str]:
    c = effect.comparison
    cells = [form.score(c.baseline_mean), form.signed(c.effect), form.interval(c.interval, "+.3f"), form.retention(c)]
    return [*cells, form.verdict(effect)]


def _effect_map(runs: dict[Cell, RunNumbers], metric: str, condition: str, folder: Path) -> str | None:
    """Frames against sizes, as the paper's figure 3a; None without several of both."""
    frames, edges = sorted({f for f, _ in runs}), sorted({e for _, e in runs}, key=lambda edge: edge or 0)
    found = {cell: numbers.effect(metric, condition) for cell, numbers in runs.items() if condition in numbers.others}
    if len(frames) < 2 or len(edges) < 2 or not found:
        return None
    nan = float("nan")
    grid = [
        [effect.comparison.effect if (effect := found.get((count, edge))) else nan for edge in edges]
        for count in frames
    ]
    file = plot_file("effect", f"{metric}_{condition}")
    baseline = next(iter(runs.values())).baseline
    columns = ["own size" if edge is None else f"{edge} px" for edge in edges]
    names = ("longest edge", "frames")
    title = f"{metric}: {condition} - {baseline}"
    heat_map(folder / file, title, list(map(str, frames)), columns, grid, centre=0.0, form="+.3f", axes_names=names)
    return file


def _sweep_times(runs: dict[Cell, RunNumbers]) -> Section:
    rows = [
        [
            _cell_name(cell),
            name,
            form.seconds(numbers.prepare_seconds(name)),
            form.seconds(numbers.answer_seconds(name)),
        ]
        for cell, numbers in runs.items()
        for name in numbers.conditions
    ]
    devices = sorted({str(numbers.settings["environment"].get("device_name")) for numbers in runs.values()})
    text = f"Median [quartiles] in seconds on {', '.join(devices)}; decoding and preprocessing are not counted."
    columns = ("run", "condition", "prepare, a video", "answer, a question")
    return Section("Times", [Text(text), Table(columns, rows, numbers_from=2)], timed=True)


# --- summary ---------------------------------------------------------------------------------------------------------


def _check_summary(runs: Sequence[RunNumbers]) -> None:
    if len(runs) < 2:
        raise EvaluationError(f"a summary needs two runs or more, got {len(runs)}.")
    for before, after in pairwise(runs):
        if before.settings["alpha"] != after.settings["alpha"]:
            raise EvaluationError(f"{before.run.path} and {after.run.path} have different alpha: no summary of both.")
    seen: dict[str, RunNumbers] = {}
    for numbers in runs:
        digest = numbers.settings["benchmark"]["digest"]
        if digest in seen:
            raise EvaluationError(
                f"{seen[digest].run.path} and {numbers.run.path} ask the same questions: in a summary each benchmark "
                "counts once. Compare them, or take them as a sweep."
            )
        seen[digest] = numbers


def _titles(runs: Sequence[RunNumbers]) -> list[str]:
    """A name for each run's benchmark, none twice."""
    titles = [numbers.settings["benchmark"]["title"] for numbers in runs]
    if len(set(titles)) == len(titles):
        return titles
    return [f"{title} ({numbers.run.path.name})" for title, numbers in zip(titles, runs, strict=True)]


def _summary_table(runs: Sequence[RunNumbers], titles: Sequence[str], metric: str, condition: str) -> Table:
    found = []
    for title, numbers in zip(titles, runs, strict=True):
        effect = numbers.effect(metric, condition) if metric in numbers.run.metrics else None
        if effect is not None:
            found.append(replace(effect, task=title))  # the family: one test of each benchmark
    rows = []
    for effect in with_holm(found, runs[0].settings["alpha"]):
        c = effect.comparison
        first = [str(effect.task), f"{c.n:,} ({c.num_clusters:,})", form.score(c.candidate_mean), *_effect_row(effect)]
        rows.append([*first, form.holm_verdict(effect), form.p_values(effect)])
    p = f"p {' / '.join(CLAIMS)} (after Holm)"
    columns = (f"{condition} on", "questions (videos)", "mean", "baseline", "effect", "interval", "kept", "verdict")
    return Table((*columns, "after Holm", p), rows)
