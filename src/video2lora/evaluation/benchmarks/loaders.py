"""Reads annotations into questions, one function a schema; what cannot be asked or scored is counted, by reason."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .spec import BenchmarkError, BenchmarkSpec

Row = Mapping[str, Any]
_TEXT_KEYS = ("text", "caption", "description", "event", "action", "object", "name", "content")
_PARTS = "; "


@dataclass(frozen=True)
class Entry:
    """One question as annotated, before questions of one video are put together.

    Attributes:
        id: unique in the benchmark.
        draw: what is drawn: the question's own id, or the video's name.
        video: the file's name as annotated, with or without folders and extension.
        prompt: to the letter.
        references: right answers.
        task: type, style or prompt name.
        question: by itself, where the prompt says more.
        start, end: seconds.
        region: id of the subject that is marked in the frames, or None.
        order: place among the questions of its video.
    """

    id: str
    draw: str
    video: str
    prompt: str
    references: tuple[str, ...]
    task: str = ""
    question: str | None = None
    start: float | None = None
    end: float | None = None
    region: str | None = None
    order: int = 0


@dataclass
class Table:
    """Annotation rows with the names their columns have here."""

    spec: BenchmarkSpec
    rows: Sequence[Row]
    source: str
    skipped: Counter[str]

    def column(self, role: str, *, rows: Sequence[Row] | None = None, required: bool = True) -> str:
        """The column of a role; "" where it is not there and not required.

        Raises:
            BenchmarkError: it is required; names the columns found and those expected.
        """
        expected = self.spec.columns.get(role, ())
        found: dict[str, None] = {}
        for row in self.rows if rows is None else rows:
            found.update(dict.fromkeys(row))
        for name in expected:
            if name in found:
                return name
        if not required:
            return ""
        raise BenchmarkError(
            f"{self.spec.title}: {self.source} has the columns {sorted(name for name in found if name != '_key')}, "
            f"but none of {list(expected)} for the {role} (names {self.spec.columns_source}). If the repository "
            "changed, convert its rows to your own JSONL and give that, or report the new column."
        )

    def complete(self, rows: Iterable[Row], *columns: str) -> Iterator[Row]:
        """The rows that have something in all these columns; the others are counted."""
        for row in rows:
            absent = [column for column in columns if row.get(column) in (None, "", [])]
            if absent:
                self.skipped[f"row without {absent[0]}"] += 1
            else:
                yield row

    def references(self, *values: Any) -> tuple[str, ...]:
        """The texts among values, each once; none of them is counted."""
        texts = tuple(dict.fromkeys(text for value in values if (text := as_text(value))))
        if not texts:
            self.skipped["question without a reference"] += 1
        return texts


def as_text(value: Any) -> str:
    """A reference as text: strings as they are, numbers written out, the parts of a list joined by "; "."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        named = [value[key] for key in _TEXT_KEYS if isinstance(value.get(key), str)]
        return as_text(named[0]) if named else _PARTS.join(filter(None, map(as_text, value.values())))
    if isinstance(value, Sequence):
        return _PARTS.join(filter(None, map(as_text, value)))
    return str(value)


def load_entries(table: Table, tasks: Sequence[str]) -> list[Entry]:
    """The questions of a table, in the tasks that are wanted (all where the spec names none)."""
    entries = list(_SCHEMAS[table.spec.schema](table, tasks))
    if not entries:
        why = f" ({', '.join(f'{n} {reason}' for reason, n in table.skipped.items())})" if table.skipped else ""
        raise BenchmarkError(f"{table.spec.title}: no question in {table.source}{why}.")
    return entries


def _qa(table: Table, tasks: Sequence[str]) -> Iterator[Entry]:
    """A row is one question about one video."""
    spec = table.spec
    video, question, answer = (table.column(role) for role in ("video", "question", "answer"))
    more, task, key = (table.column(role, required=False) for role in ("more_answers", "task", "id"))
    for row in table.complete(table.rows, video, question):
        references = table.references(row.get(answer), row.get(more) if more else None)
        if not references:
            continue
        name, asked = as_text(row[video]), _question(spec, row[question])
        number = as_text(row.get(key)) if key else ""
        number = number or _hash([name, asked])
        id = f"{name}-{number}" if spec.ids_per_video else number
        kind = as_text(row.get(task)) if task else ""
        prompt = spec.prompt(kind).format(question=asked)
        draw = id if spec.unit == "question" else name
        yield Entry(id, draw, name, prompt, references, kind, asked)


def _vidcapbench(table: Table, tasks: Sequence[str]) -> Iterator[Entry]:
    """A row is one video with a list of questions; rows of several files may be about the same video."""
    spec = table.spec
    video, pairs_name = table.column("video"), table.column("pairs")
    pairs = [(row, _as_list(row[pairs_name])) for row in table.complete(table.rows, video, pairs_name)]
    inner = [pair for _, some in pairs for pair in some]
    question, answer = (table.column(role, rows=inner) for role in ("question", "answer"))
    task = table.column("task", rows=inner, required=False)
    for row, some in pairs:
        name = as_text(row[video])
        for index, pair in enumerate(table.complete(some, question)):
            references = table.references(pair.get(answer))
            if not references:
                continue
            asked = _question(spec, pair[question])
            kind = as_text(pair.get(task)) if task else ""
            # From the content: the place in the list is another one in every file.
            id = f"{name}-{_hash([asked, kind, references])}"
            yield Entry(id, name, name, spec.prompt(kind).format(question=asked), references, kind, asked, order=index)


def _styled(table: Table, tasks: Sequence[str]) -> Iterator[Entry]:
    """A row is one video with a caption in each style, a column a style."""
    spec = table.spec
    video, columns = table.column("video"), {task: table.column(task) for task in tasks}
    for row in table.complete(table.rows, video):
        name = as_text(row[video])
        for task, column in columns.items():
            if references := table.references(row.get(column)):
                order = spec.tasks.index(task)
                yield Entry(f"{name}-{task}", name, name, spec.prompt(task), references, task, order=order)


def _activitynet_captions(table: Table, tasks: Sequence[str]) -> Iterator[Entry]:
    """A row is one video with event sentences and their spans."""
    spec = table.spec
    video, sentences = table.column("video"), table.column("sentences")
    timestamps = table.column("timestamps", required="event" in tasks)
    for row in table.complete(table.rows, video, sentences):
        name, events = as_text(row[video]), [as_text(sentence) for sentence in row[sentences]]
        if "paragraph" in tasks and (references := table.references(" ".join(filter(None, events)))):
            yield Entry(name, name, name, spec.prompt("paragraph"), references, "paragraph")
        if "event" not in tasks:
            continue
        for index, (sentence, span) in enumerate(zip(events, row.get(timestamps) or (), strict=False)):
            start, end = float(span[0]), float(span[1])
            if not 0 <= start < end:
                table.skipped["event without length"] += 1
            elif references := table.references(sentence):
                prompt = spec.prompt("event")
                yield Entry(f"{name}-{index}", name, name, prompt, references, "event", start=start, end=end)


def _plm_rcap(table: Table, tasks: Sequence[str]) -> Iterator[Entry]:
    """A row is one subject in one span."""
    video, key, region, caption = (table.column(role) for role in ("video", "id", "region", "caption"))
    first, last = table.column("start_frame"), table.column("end_frame")
    for row in table.complete(table.rows, video, key, region, first, last):
        name, id = as_text(row[video]), as_text(row[key])
        yield from _region_entries(table, tasks, id, name, row[region], row[first], row[last], row.get(caption))


def _plm_rdcap(table: Table, tasks: Sequence[str]) -> Iterator[Entry]:
    """A row is one subject with a caption for each span of the video."""
    video, key, region, dense = (table.column(role) for role in ("video", "id", "region", "captions"))
    segments = [(row, _as_list(row[dense])) for row in table.complete(table.rows, video, key, region, dense)]
    inner = [segment for _, some in segments for segment in some]
    first, last, caption = (table.column(role, rows=inner) for role in ("start_frame", "end_frame", "caption"))
    for row, some in segments:
        name = as_text(row[video])
        for index, segment in enumerate(table.complete(some, first, last, caption)):
            if as_text(segment[caption]).rstrip(".").lower() in ("out of frame", "out of view"):
                table.skipped["span with the subject out of frame"] += 1
                continue
            id, span = f"{as_text(row[key])}-{index}", (segment[first], segment[last])
            yield from _region_entries(table, tasks, id, name, row[region], *span, segment[caption])


def _region_entries(
    table: Table, tasks: Sequence[str], id: str, video: str, region: Any, first: Any, last: Any, caption: Any
) -> Iterator[Entry]:
    fps = table.spec.annotation_fps
    assert fps is not None
    start, end = int(first) / fps, (int(last) + 1) / fps
    if not 0 <= start < end:
        table.skipped["span without length"] += 1
        return
    if not (references := table.references(caption)):
        return
    for task in tasks:
        marked = as_text(region) if task == "marked" else None
        name = f"{id}-marked" if marked is not None else id
        prompt = table.spec.prompt(task)
        yield Entry(name, id, video, prompt, references, task, start=start, end=end, region=marked)


def _question(spec: BenchmarkSpec, value: Any) -> str:
    text = as_text(value)
    return text + "?" if spec.question_mark and text and text[-1] not in "?.!" else text


def _as_list(value: Any) -> list[Mapping[str, Any]]:
    """A list of objects, also one written as a JSON string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
        raise BenchmarkError(f"expected a list of objects, not {type(value).__name__} {str(value)[:80]!r}.")
    return list(value)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:12]


_SCHEMAS: Mapping[str, Callable[[Table, Sequence[str]], Iterator[Entry]]] = {
    "activitynet_captions": _activitynet_captions,
    "plm_rcap": _plm_rcap,
    "plm_rdcap": _plm_rdcap,
    "qa": _qa,
    "styled": _styled,
    "vidcapbench": _vidcapbench,
}
