"""Command line: tables where people look, plain columns where programs do, JSON where asked; and where files go."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from ._errors import CommandError
from ._terminal import printable

_BLOCKS = "▁▂▃▄▅▆▇█"


def print_json(document: Any) -> None:
    """Print the one JSON document of a command."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def note(message: str) -> None:
    """Tell on stderr what is going on, where somebody is looking."""
    if sys.stderr.isatty():
        typer.echo(message, err=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table: drawn on a terminal, plain aligned columns elsewhere; numbers stand to the right."""
    cells = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    title = None if title is None else printable(title)
    right = [bool(cells) and all(_is_number(row[i]) for row in cells if row[i]) for i in range(len(columns))]
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
        for name, to_the_right in zip(columns, right, strict=True):
            table.add_column(name, justify="right" if to_the_right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a name are no markup
        Console().print(table)
        return
    widths = [max(len(name), *(len(row[i]) for row in cells), 0) for i, name in enumerate(columns)]
    if title:
        typer.echo(title)
    for row in [list(columns), *cells] if any(columns) else cells:
        line = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        typer.echo("  ".join(line).rstrip())


def print_fields(fields: dict[str, object], title: str | None = None) -> None:
    """Print names and values, leaving out what is not known."""
    print_table(["", ""], [(name, value) for name, value in fields.items() if value is not None], title)


def _is_number(text: str) -> bool:
    """Whether a cell begins with a number, whatever its unit, or says that there is none."""
    return text == "-" or re.match(r"-?\d", text) is not None


def sparkline(values: Sequence[float]) -> str:
    """Values, 0 or more, as blocks of up to eight heights."""
    top = max(values, default=0.0) or 1.0
    return "".join(_BLOCKS[min(int(value / top * len(_BLOCKS)), len(_BLOCKS) - 1)] for value in values)


def human_bytes(size: int) -> str:
    """A size for people, in units of 1,000 bytes, as file managers and the Hub have it."""
    if size < 1000:
        return f"{size} B"
    value, units = float(size), iter(("kB", "MB", "GB", "TB"))
    unit = ""
    while value >= 1000 and (following := next(units, None)):
        value, unit = value / 1000, following
    return f"{value:.1f} {unit}"


def directory_bytes(directory: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr if that is a terminal; gives the function that advances it by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def check_output(
    output: Path, *, overwrite: bool = False, replaceable: Callable[[Path], bool] | None = None, kind: str = ""
) -> None:
    """Refuse an output directory that could not be written in the end, before anything expensive.

    Args:
        output: the directory.
        overwrite: whether it may be replaced.
        replaceable: tells whether an existing directory holds nothing but `kind`; a command without replaces nothing.
        kind: what may be replaced.

    Raises:
        CommandError: it exists and may not be replaced, or nothing can be written there.
    """
    if output.exists() or output.is_symlink():
        if replaceable is None:
            raise CommandError(f"{output} exists already: choose another --output.")
        if not overwrite:
            raise CommandError(f"{output} exists already: choose another --output, or pass --overwrite.")
        if not output.is_dir() or not replaceable(output):
            raise CommandError(
                f"{output} holds something other than {kind}, and replacing it would delete that: choose another "
                "--output."
            )
    parent = next(path for path in output.absolute().parents if path.exists())
    if not parent.is_dir():
        raise CommandError(f"{output} cannot be made: {parent} is a file. Choose another --output.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CommandError(f"{output} cannot be made: {parent} is not writable. Choose another --output.")


@contextmanager
def removed_on_failure(directory: Path) -> Iterator[Path]:
    """Make a new directory, and remove it again if the body does not come to its end."""
    directory.mkdir(parents=True)
    try:
        yield directory
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
