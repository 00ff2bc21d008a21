"""Evaluation: the plots of reports, drawn to be told apart without colour, the same bytes for the same numbers."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.files import write_atomically
from .report_format import task_name
from .report_numbers import RunNumbers

# Okabe and Ito's colours, told apart by all kinds of colour vision; yellow is left out, it is too pale for lines
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.")  # with seven colours, three lines repeat only after 21
HEAT = "cividis"  # lightness alone tells its colours apart
LONGEST_LABEL = 34
MOST_QUESTIONS = 20

Grid = Sequence[Sequence[float]]
Point = tuple[float, float, float, float]
"""x, value, and the ends of its interval."""


def heat_map(
    path: Path,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Grid,
    *,
    centre: float | None = None,
    form: str = ".3f",
    axes_names: tuple[str, str] = ("", ""),
) -> None:
    """Draw numbers in cells; NaN is an empty one.

    Args:
        path: of the PNG.
        title: above it.
        rows, columns: names.
        values: `[rows, columns]`.
        centre: the value of the middle colour of a map of two colours; None for one that goes from low to high.
        form: of the numbers.
        axes_names: of the columns and the rows.
    """
    from matplotlib.colors import Normalize

    known = [value for line in values for value in line if not math.isnan(value)] or [0.0]
    if centre is None:
        low, high = min(known), max(known)
        if high - low < 1e-9:  # one value has no range of its own: that of scores
            low, high = min(low, 0.0), max(high, 1.0)
        norm, colours = Normalize(low, high), HEAT
    else:
        reach = max(*(abs(value - centre) for value in known), 1e-9)
        norm, colours = Normalize(centre - reach, centre + reach), "PuOr"
    width = max(0.95, 0.085 * max(len(f"{value:{form}}") for value in known) + 0.3)
    longest = max(len(_label(name)) for name in rows)
    figure = _figure(2.2 + 0.085 * longest + width * len(columns), 1.5 + _slant(columns) + 0.36 * len(rows))
    axes = figure.subplots()
    image = axes.imshow([list(line) for line in values], norm=norm, cmap=colours, aspect="auto")
    axes.set_facecolor("0.92")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if math.isnan(value):
                axes.text(x, y, "–", ha="center", va="center", color="0.3", fontsize=8)
                continue
            red, green, blue, _ = image.cmap(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = f"{value:{form}}"
            axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
    _name_columns(axes, columns)
    axes.set_yticks(range(len(rows)), [_label(name) for name in rows], fontsize=8)
    axes.set_xlabel(axes_names[0], fontsize=8)
    axes.set_ylabel(axes_names[1], fontsize=8)
    axes.set_title(_label(title, 90), fontsize=9)
    figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    _save(figure, path)


def effect_plot(path: Path, numbers: RunNumbers, metric: str) -> bool:
    """Draw every effect with its interval, and the declared margin; whether there was anything to draw."""
    effects = [effect for effect in numbers.effects(metric) if not math.isnan(effect.comparison.effect)]
    if not effects:
        return False
    scopes = [scope for scope in numbers.scopes if any(effect.task == scope for effect in effects)]
    conditions = [name for name in numbers.others if any(effect.condition == name for effect in effects)]
    step = 0.8 / len(conditions)
    rows = len(scopes) * max(0.42, 0.17 * len(conditions))
    legend = -(-len(conditions) // 3)
    figure = _figure(8.6, 1.3 + rows + 0.24 * legend)
    axes = figure.subplots()
    margin = effects[0].margin
    if margin is not None:
        axes.axvspan(-margin, margin, color="0.93", zorder=0)
        for edge in (-margin, margin):
            axes.axvline(edge, color="0.5", linestyle="--", linewidth=0.8, zorder=1)
    axes.axvline(0, color="0.2", linewidth=0.8, zorder=1)
    for number, condition in enumerate(conditions):
        own = [effect for effect in effects if effect.condition == condition]
        y = [scopes.index(effect.task) + (number + 0.5) * step - 0.4 for effect in own]
        points = [(place, e.comparison.effect, *e.comparison.interval) for place, e in zip(y, own, strict=True)]
        x, errors = [value for _, value, _, _ in points], _errors(points)
        axes.errorbar(x, y, xerr=errors, linestyle="none", capsize=2, markersize=4, linewidth=1.1,
                      **_style(numbers.conditions.index(condition), line=False), label=_label(condition))  # fmt: skip
    axes.set_yticks(range(len(scopes)), [_label(task_name(scope)) for scope in scopes], fontsize=8)
    axes.set_ylim(len(scopes) - 0.5, -0.5)
    for edge in range(1, len(scopes)):
        axes.axhline(edge - 0.5, color="0.88", linewidth=0.6, zorder=0)
    axes.tick_params(axis="x", labelsize=8)
    shaded = "" if margin is None else f"; shaded: within the margin of {margin:g}"
    axes.set_xlabel(
        _label(f"{metric}: condition - {numbers.baseline}, {numbers.level} interval{shaded}", 120), fontsize=8
    )
    figure.legend(loc="outside lower center", ncols=min(3, len(conditions)), fontsize=8, frameon=False)
    _save(figure, path)
    return True


def amortisation_plot(path: Path, costs: Mapping[str, tuple[float, float]], order: Sequence[str]) -> None:
    """Draw seconds for a question, preparation shared, against the number of questions about one video.

    Args:
        path: of the PNG.
        costs: seconds once for a video, and for each question, by condition.
        order: all conditions of the run, which decides on styles.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = _figure(8.6, 4.2)
    axes = figure.subplots()
    counts = list(range(1, MOST_QUESTIONS + 1))
    for condition, (once, each) in costs.items():
        seconds = [once / count + each for count in counts]
        axes.plot(
            counts, seconds, markersize=4, linewidth=1.3, **_style(order.index(condition)), label=_label(condition)
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([1, *range(2, MOST_QUESTIONS + 1, 2)])
    axes.tick_params(labelsize=8)
    axes.set_xlabel("questions about one video", fontsize=8)
    axes.set_ylabel("seconds a question, preparation shared", fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    _save(figure, path)


def curves(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    order: Sequence[str],
    *,
    x_name: str,
    y_name: str,
) -> None:
    """Draw a panel for each name, in it a line with intervals for each condition, on a logarithmic x axis.

    Args:
        path: of the PNG.
        panels: points by panel and condition.
        order: all conditions, which decides on styles.
        x_name, y_name: of the axes.
    """
    from matplotlib.ticker import NullFormatter

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawn = [name for name in order if any(name in lines for lines in panels.values())]
    legend = -(-len(drawn) // 4)
    figure = _figure(max(3.1 * columns, 5.6), 2.5 * rows + 0.5 + 0.24 * legend)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    places = sorted({x for lines in panels.values() for points in lines.values() for x, *_ in points})
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(grid.ravel(), panels.items(), strict=False):
        for number, (condition, points) in enumerate(lines.items()):
            known = [point for point in points if not math.isnan(point[1])]
            if not known:
                continue
            # a little beside each other, or one interval would hide the other
            x = [place * 1.02 ** (number - (len(lines) - 1) / 2) for place, *_ in known]
            handles[condition] = axes.errorbar(
                x, [point[1] for point in known], yerr=_errors(known), capsize=2, markersize=4, linewidth=1.2,
                **_style(order.index(condition)))  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.tick_params(labelsize=8)
        axes.set_title(_label(title), fontsize=9)
        axes.grid(alpha=0.3)
    for axes in grid.ravel()[len(panels) :]:
        axes.set_axis_off()
    for place in range(columns):  # where a column ends above an empty panel its numbers would be missing
        used = [axes for number, axes in enumerate(grid[:, place]) if number * columns + place < len(panels)]
        used[-1].tick_params(labelbottom=True)
        used[-1].set_xlabel(x_name, fontsize=8)  # of the figure's own name constrained layout keeps no legend away
    figure.supylabel(y_name, fontsize=9)
    figure.legend(list(handles.values()), [_label(name) for name in handles], loc="outside lower center",
                  ncols=min(4, max(len(handles), 1)), fontsize=8, frameon=False)  # fmt: skip
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    """A figure of so many inches."""
    try:
        from matplotlib.figure import Figure  # not pyplot: it would choose a backend for the whole process
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "video2lora[evaluation]"') from error

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _style(number: int, line: bool = True) -> dict[str, Any]:
    """Colour, marker and line of the condition at this place of a run."""
    style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
    return style | ({"linestyle": LINES[number % len(LINES)]} if line else {})


def _errors(points: Sequence[Point]) -> list[list[float]]:
    """Lengths of error bars below and above; none where there is no interval."""
    below = [0.0 if math.isnan(low) else max(value - low, 0.0) for _, value, low, _ in points]
    above = [0.0 if math.isnan(high) else max(high - value, 0.0) for _, value, _, high in points]
    return [below, above]


def _label(text: str, longest: int = LONGEST_LABEL) -> str:
    """Text as a plot can hold it: a line, not too long, and no mathematics."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) > longest:
        line = f"{line[: longest // 2]}…{line[-(longest - longest // 2 - 1) :]}"
    return line.replace("$", r"\$")


def _slant(names: Sequence[str]) -> float:
    """Inches that slanted names below a plot need; 0 where they are short enough to stand upright."""
    longest = max(len(_label(name)) for name in names)
    return 0.0 if longest <= 10 else 0.055 * longest


def _name_columns(axes: Any, names: Sequence[str]) -> None:
    slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if _slant(names) else {}
    axes.set_xticks(range(len(names)), [_label(name) for name in names], fontsize=8, **slanted)


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names of tasks are in any script
        figure.savefig(buffer, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
