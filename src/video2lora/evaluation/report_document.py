"""Evaluation: a report as data, and its two forms, Markdown and one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

TIMES_BEGIN, TIMES_END = "<!-- times -->", "<!-- end of times -->"
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_SPECIAL = re.compile(r"[\\`*<>|~&$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[])")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; columns from `numbers_from` on stand to the right."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers_from: int = 1


@dataclass(frozen=True)
class Figure:
    """A picture beside the report."""

    kind: ClassVar[str] = "figure"
    file: str
    alt: str


@dataclass(frozen=True)
class Link:
    """A file beside the report."""

    kind: ClassVar[str] = "link"
    file: str
    text: str


@dataclass(frozen=True)
class Case:
    """One question with what every condition answered.

    Attributes:
        title: which case this is.
        frames: contact sheet beside the report; None where there is none, and `note` says why.
        note: what the frames are.
        question, references: of the benchmark.
        answers: condition, answer, score.
    """

    kind: ClassVar[str] = "case"
    title: str
    frames: str | None
    note: str
    question: str
    references: Sequence[str]
    answers: Sequence[tuple[str, str, str]]


Block = Text | Heading | Bullets | Table | Figure | Link | Case


@dataclass(frozen=True)
class Section:
    """A part of a report; `timed` where its numbers are times, which no two runs share."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    timed: bool = False


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    sections: Sequence[Section]


def to_markdown(document: Document) -> str:
    """Markdown as GitHub and the Hub read it; pictures stay beside it."""
    return _template("report.md").render(document=document, begin=TIMES_BEGIN, end=TIMES_END)


def to_html(document: Document, folder: Path) -> str:
    """One HTML file; pictures, taken from `folder`, are inside."""

    def embed(file: str) -> Markup:
        kind = "png" if file.endswith(".png") else "jpeg"
        return Markup(f"data:image/{kind};base64,") + base64.b64encode((folder / file).read_bytes()).decode()

    return _template("report.html").render(
        document=document, embed=embed, begin=Markup(TIMES_BEGIN), end=Markup(TIMES_END)
    )


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None) -> str:
    """A table of Markdown, of cells that are Markdown; columns from `numbers_from` on stand to the right."""
    left = len(columns) if numbers_from is None else numbers_from
    marks = ["---" if place < left else "---:" for place in range(len(columns))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, marks, *rows))


def without_times(text: str) -> str:
    """A report, Markdown or HTML, without the parts whose numbers are times."""
    return re.sub(f"{re.escape(TIMES_BEGIN)}.*?{re.escape(TIMES_END)}", "", text, flags=re.DOTALL)


def escape_markdown(text: str) -> str:
    """Text that means nothing but itself in a line or a table cell of Markdown."""
    escaped = _SPECIAL.sub(r"\\\g<0>", _clean(text))
    # of lines there is one, and what stands at its ends is seen
    return "<br>".join(line.strip() for line in escaped.split("\n")).replace("\t", " ")


def _clean(text: str) -> str:
    return _CONTROLS.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


@cache
def _template(name: str) -> Any:
    markdown = name.endswith(".md")

    def safe(value: Any) -> Any:
        if isinstance(value, Markup) or not isinstance(value, str):
            return value
        return escape_markdown(value) if markdown else _clean(value)

    environment = Environment(
        autoescape=not markdown,  # Markdown is escaped by `safe`
        finalize=safe,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    source = (files("video2lora.evaluation") / "templates" / name).read_text(encoding="utf-8")
    return environment.from_string(source)
