"""Evaluation: the report of a finished run, from its folder alone: Markdown, one HTML file, plots, frames."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..data.files import write_atomically
from . import report_tables as tables
from .paper import paper_verdicts_markdown
from .records import read_run
from .report_document import Document, Section, to_html, to_markdown, without_times
from .report_format import task_name
from .report_frames import ClipFrames
from .report_numbers import RESAMPLES, RunNumbers
from .report_plots import amortisation_plot, effect_plot, heat_map
from .samples import Sample

__all__ = ["write_report", "without_times"]

MARKDOWN, HTML = "report.md", "report.html"
AMORTISATION = "plots/amortisation.png"
"""The only plot of times."""


def write_report(
    run_dir: str | os.PathLike[str], *, samples: Iterable[Sample] | None = None, resamples: int = RESAMPLES
) -> list[Path]:
    """Write, or write again, the report of a finished run into its folder.

    `report.md` with `plots/` and `frames/` beside it; `report.html` is one file that holds all pictures. Everything is
    computed from `run.json` and `records.parquet`: the same records give the same bytes. Between two runs of the same
    settings only times differ: the section "Times" (cut out by `without_times`) and `plots/amortisation.png`.

    Args:
        run_dir: the folder.
        samples: the benchmark, which knows where the videos are, for the frames beside best, worst and median answers.
            Frames that an earlier report drew are kept in the folder; a video that is missing is said in the report.
        resamples: of each bootstrap interval.

    Returns:
        The files written.

    Raises:
        EvaluationError: the folder holds no finished run.
        ImportError: a library of the extra "evaluation" is missing.
    """
    run = read_run(run_dir)
    numbers = RunNumbers(run, resamples)
    plots = _plots(numbers, run.path)
    frames = ClipFrames(run.path, run.settings["sampling"], samples)
    paper = tables.paper(numbers)
    sections: list[Section | None] = [
        tables.in_short(numbers),
        tables.what_was_run(numbers),
        *tables.scores(numbers),
        tables.degeneration(numbers),
        tables.context(numbers),
        tables.errors(numbers),
        tables.samples(numbers, frames),
        paper,
        tables.times(numbers, AMORTISATION if AMORTISATION in plots else None),
    ]
    benchmark = run.settings["benchmark"]
    kept = [_without_missing(section, run.path) for section in sections if section is not None]
    document = Document(f"Evaluation: {benchmark['title']}", kept)
    written = [run.path / plot for plot in plots]
    if paper is not None:
        written.append(run.path / tables.PAPER_FILE)
        write_atomically(written[-1], paper_verdicts_markdown().encode())
    return written + write_document(document, run.path)


def write_document(document: Document, folder: Path) -> list[Path]:
    """Write both forms of a document into a folder that holds its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MARKDOWN, to_markdown(document).encode())
    write_atomically(folder / HTML, to_html(document, folder).encode())
    return [folder / MARKDOWN, folder / HTML]


def _plots(numbers: RunNumbers, folder: Path) -> list[str]:
    """Draw the plots; names relative to the folder. Plots of an earlier report that are no more are removed."""
    drawn = []
    for metric in numbers.quality_metrics:
        grid = [[numbers.mean(metric, c, scope).value for c in numbers.conditions] for scope in numbers.scopes]
        file = tables.plot_file("heat", metric)
        names = [task_name(scope) for scope in numbers.scopes]
        heat_map(folder / file, f"mean {metric}", names, numbers.conditions, grid)
        drawn.append(file)
        file = tables.plot_file("effects", metric)
        if effect_plot(folder / file, numbers, metric):
            drawn.append(file)
    if costs := tables.costs(numbers):
        amortisation_plot(folder / AMORTISATION, costs, numbers.conditions)
        drawn.append(AMORTISATION)
    for kind in ("heat_*.png", "effects_*.png", "amortisation.png"):
        for path in (folder / "plots").glob(kind):
            if f"plots/{path.name}" not in drawn:
                path.unlink()
    return drawn


def _without_missing(section: Section, folder: Path) -> Section:
    """A section without figures that there was nothing to draw for."""
    blocks = [block for block in section.blocks if block.kind != "figure" or (folder / block.file).exists()]  # type: ignore[union-attr]
    return Section(section.title, blocks, section.timed)
