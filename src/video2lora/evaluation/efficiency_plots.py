"""Efficiency: heat maps over frames and resolutions, and what many questions take in all, as PNGs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.files import write_atomically
from .efficiency_report import BEYOND
from .efficiency_results import Cell, Results

CONDITIONS = {
    "video_cold": ("video in the context, cold", "tab:red"),
    "video_cached": ("frame features cached", "tab:orange"),
    "kv_cache": ("KV cache of the video reused", "tab:green"),
    "adapter_attached": ("adapter attached", "tab:blue"),
    "adapter_merged": ("adapter merged", "tab:purple"),
}
QUESTIONS = 50
PANELS = 4


def write_plots(results: Results, output_dir: Path) -> list[Path]:
    """Draw a sweep into a folder.

    Returns:
        The PNGs: `first_token.png`, `speedup.png`, `tokens.png`, `memory.png` (heat maps) and `amortisation.png`;
        without those of which nothing was measured (memory, on a CPU).

    Raises:
        ImportError: matplotlib is not installed.
    """
    attached = results.query_seconds("adapter_attached")

    def gain(cell: Cell) -> float | None:
        cold = results.seconds(cell, "video_cold")
        return None if cold is None or attached is None else cold / attached

    def memory(cell: Cell) -> float | None:
        peak = results.get(cell, "video_cold", "peak_bytes")
        return None if peak is None else peak / 1e9

    maps: dict[str, tuple[str, Callable[[Cell], float | None]]] = {
        "first_token": (
            "Time to the first token, video in the context (s)",
            lambda c: results.seconds(c, "video_cold"),
        ),
        "speedup": ("How many times sooner the first token comes on an attached adapter", gain),
        "tokens": ("Tokens of a question with the video in its context", lambda cell: float(cell.context_tokens)),
        "memory": ("Peak memory above weights and pixels, video in the context (GB)", memory),
    }
    figures = {name: _heat_map(results, title, value) for name, (title, value) in maps.items()}
    figures["amortisation"] = _amortisation(results)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            path = output_dir / f"{name}.png"
            write_atomically(path, buffer.getvalue())
            written.append(path)
    return written


def _heat_map(results: Results, title: str, value: Callable[[Cell], float | None]) -> Any:
    """Frames against resolutions, a logarithmic colour and the number in each cell; None where there is no number."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # not pyplot: it would choose a backend for the whole process
    from matplotlib.ticker import LogFormatter

    columns = list(dict.fromkeys(cell.column for cell in results.cells))
    frames = sorted({cell.frames for cell in results.cells})
    values = {(cell.frames, cell.column): value(cell) for cell in results.cells}
    numbers = [number for number in values.values() if number]
    if not numbers:
        return None
    norm = LogNorm(min(numbers), max(max(numbers), 1.001 * min(numbers)))
    grid = [[values.get((count, column)) or float("nan") for column in columns] for count in frames]
    figure = Figure(figsize=(2.6 + 1.25 * len(columns), 1.8 + 0.5 * len(frames)), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, norm=norm, cmap="viridis", aspect="auto")
    axes.set_facecolor("0.9")
    for cell in results.cells:
        number = values[cell.frames, cell.column]
        place = (columns.index(cell.column), frames.index(cell.frames))
        if number:
            text, colour = _number(number), "white" if norm(number) < 0.6 else "black"
        else:
            text, colour = results.status(cell, "video_cold").replace(" ", "\n", 1), "0.3"
        mark = BEYOND if number and results.beyond_training(cell) else ""
        axes.text(*place, text + mark, ha="center", va="center", color=colour, fontsize=8 if number else 6)
    names = ["video, 1 tile" if column == "video" else column for column in columns]
    axes.set_xticks(range(len(columns)), names)
    axes.set_yticks(range(len(frames)), [f"{count:,}" for count in frames])
    axes.set_xlabel("longest edge of frames as images; video path")
    axes.set_ylabel("frames, all really used")
    axes.set_title(title, fontsize=9)
    bar = figure.colorbar(image, ax=axes, format=LogFormatter())  # 4, not 4 x 10^0
    bar.minorformatter = LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5))
    _sign(figure, results)
    return figure


def _amortisation(results: Results) -> Any:
    """Seconds in all against the number of questions, for a few cases; None where none is complete."""
    from matplotlib.figure import Figure

    complete = [cell for cell in results.cells if {"video_cold", "adapter_attached"} <= set(results.costs(cell))]
    cells = _spread_out(sorted({cell.case: cell for cell in complete}.values(), key=lambda cell: cell.context_tokens))
    if not cells:
        return None
    figure = Figure(figsize=(10, 3.4 * ((len(cells) + 1) // 2)), dpi=120, layout="constrained")
    panels = figure.subplots((len(cells) + 1) // 2, 2, squeeze=False).ravel()
    counts = list(range(1, QUESTIONS + 1))
    for axes, cell in zip(panels, cells, strict=False):
        for condition, (setup, each) in results.costs(cell).items():
            label, colour = CONDITIONS[condition]
            style = "--" if condition == "adapter_merged" else "-"
            axes.plot(counts, [setup + n * each for n in counts], style, color=colour, label=label)
        mark = BEYOND if results.beyond_training(cell) else ""
        where = "video path" if cell.longest_edge is None else f"images of {cell.longest_edge} px"
        axes.set_title(f"{cell.frames:,} frames, {where}: {cell.context_tokens:,} tokens{mark}", fontsize=9)
        axes.set_xlabel("questions about one video")
        axes.set_ylabel("seconds on the device in all")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    for axes in panels[len(cells) :]:
        axes.set_axis_off()
    answer = 1 + results.settings["new_tokens"]
    figure.suptitle(
        f"{results.settings['model']}: answers of {answer} tokens, frames already preprocessed", fontsize=10
    )
    _sign(figure, results)
    return figure


def _spread_out(cells: list[Cell]) -> list[Cell]:
    """A few of `cells`, from the first to the last."""
    if len(cells) <= PANELS:
        return cells
    return [cells[round(i * (len(cells) - 1) / (PANELS - 1))] for i in range(PANELS)]


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _sign(figure: Any, results: Results) -> None:
    """Where the numbers come from, and what the mark means."""
    settings = results.settings
    text = f"{settings['model']} ({settings['weights']}), {settings['device']}, {settings['dtype']}"
    if any(results.beyond_training(cell) for cell in results.cells):
        text += f"   {BEYOND} beyond the {settings['trained_context']:,} trained positions"
    figure.supxlabel(text, fontsize=7, color="0.4")
