"""Evaluation: the records of a run, one row for each condition and question, as they lie in its folder."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import write_atomically

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

FORMAT_VERSION = 1
SETTINGS, ANSWERS, RECORDS = "run.json", "answers", "records.parquet"

RECORD_FIELDS = {
    "condition": "string",
    "sample_id": "string",
    "video_id": "string",
    "question_id": "string",
    "task": "string",
    "prompt": "string",
    "question": "string",
    "references": "list<string>",
    "answer": "string",
    "error": "string",
    "num_tokens": "int64",
    "ended": "bool",
    "context_tokens": "int64",
    "visual_tokens": "int64",
    "num_frames": "int64",
    "prepare_seconds": "double",
    "answer_seconds": "double",
    "extra": "string",
}
"""Columns and their Arrow types, in order; a column of float64 for each metric follows them.

`video_id` is what is resampled as a whole: spans of one video are samples of their own, but share it.
Where a video could not be read, `error` says why and `answer` and all that follows it is null.
"""
TIMES = ("prepare_seconds", "answer_seconds")
"""The columns in which two runs of the same settings may differ."""
_JUDGE = b"video2lora.judge"
"""What the metadata of a column of grades calls the settings of their judge."""


class EvaluationError(ValueError):
    """An evaluation cannot be run, gone on with or read; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class EvaluationRun:
    """A finished run.

    Attributes:
        path: its folder.
        settings: what was declared before the first answer (`run.json`).
        records: `RECORD_FIELDS` and a column for each metric that was scored, in the order of the benchmark's
            questions, and for one question in that of the conditions.
    """

    path: Path
    settings: dict[str, Any]
    records: pa.Table

    @property
    def conditions(self) -> list[str]:
        """Names, in the order declared."""
        return [condition["name"] for condition in self.settings["conditions"]]

    @property
    def metrics(self) -> list[str]:
        """Metrics that were scored, declared or not."""
        return [name for name in self.records.column_names if name not in RECORD_FIELDS]

    @property
    def judge(self) -> dict[str, Any] | None:
        """Settings of the judge whose grades are in the records, as the records say; else of the declared one."""
        if "judge" in self.metrics and (told := (self.records.field("judge").metadata or {}).get(_JUDGE)):
            return json.loads(told)
        return self.settings.get("judge")

    @property
    def tasks(self) -> list[str]:
        """Tasks of the questions, in the order in which they first come."""
        return list(dict.fromkeys(self.records["task"].to_pylist()))

    @property
    def num_samples(self) -> int:
        """Videos, or spans of them, that were asked about, unreadable ones included."""
        return len(set(self.records["sample_id"].to_pylist()))

    def num_questions(self, task: str | None = None) -> int:
        """Questions of a task, or all, unanswerable ones included."""
        return self._select(self.conditions[0], task).num_rows

    @property
    def errors(self) -> dict[str, str]:
        """What was wrong with each video that could not be read, by sample id."""
        pairs = zip(self.records["sample_id"].to_pylist(), self.records["error"].to_pylist(), strict=True)
        return {sample: error for sample, error in pairs if error is not None}

    def unscored(self, metric: str) -> int:
        """How many answers have no score in this metric (all of them, if it was never scored)."""
        answered = self.records["error"].to_pylist()
        if metric not in self.metrics:
            return sum(error is None for error in answered)
        scores = self.records[metric].to_pylist()
        return sum(error is None and score is None for error, score in zip(answered, scores, strict=True))

    def scores(self, metric: str, condition: str, task: str | None = None) -> list[float | None]:
        """Scores of a condition's answers, in the order of the questions, one for each question of `task` (or all).

        Raises:
            EvaluationError: there is no such metric or condition in this run.
        """
        for what, name, known in (("metric", metric, self.metrics), ("condition", condition, self.conditions)):
            if name not in known:
                raise EvaluationError(f"{self.path} has no {what} {name!r}: it has {', '.join(known) or 'none'}.")
        return self._select(condition, task)[metric].to_pylist()

    def paired_scores(
        self, metric: str, candidate: str, baseline: str, task: str | None = None
    ) -> tuple[list[float], list[float], list[str]]:
        """Scores of two conditions on the questions that both have one for, and each question's video id."""
        first, second = (self.scores(metric, name, task) for name in (candidate, baseline))
        videos = self._select(baseline, task)["video_id"].to_pylist()
        pairs = [
            (a, b, video) for a, b, video in zip(first, second, videos, strict=True) if a is not None and b is not None
        ]
        return [a for a, _, _ in pairs], [b for _, b, _ in pairs], [video for _, _, video in pairs]

    def _select(self, condition: str, task: str | None) -> pa.Table:
        """Rows of a condition, about questions of a task or all."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        chosen = pc.equal(self.records["condition"], condition)  # a mask, not an expression: it keeps the order
        return self.records.filter(chosen if task is None else pc.and_(chosen, pc.equal(self.records["task"], task)))


def read_run(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> EvaluationRun:
    """Read the folder of a finished run.

    Args:
        path: the folder.
        columns: of the records, where only some are needed; those that are not there are left out.

    Raises:
        EvaluationError: it is no such folder, of another format version, not finished, or damaged.
    """
    folder = Path(path)
    settings = read_settings(folder)
    if settings is None:
        raise EvaluationError(f"{folder} is no folder of an evaluation: there is no {SETTINGS} in it.")
    if not (folder / RECORDS).exists():
        raise EvaluationError(
            f"the evaluation in {folder} is not finished. Start it again with the same settings: it goes on where it "
            "was stopped."
        )
    return EvaluationRun(folder, settings, _read_records(folder / RECORDS, columns))


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What `run.json` declares; None if there is none.

    Raises:
        EvaluationError: it is damaged, or of another format version.
    """
    file = folder / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise EvaluationError(f"{file} is damaged ({error}). Name another folder, or remove this one.") from error
    found = settings.get("format_version") if isinstance(settings, dict) else None
    if found != FORMAT_VERSION:
        raise EvaluationError(
            f"{file} has format_version {found!r}, this version of video2lora reads {FORMAT_VERSION}: use the version "
            "that made it, or run the evaluation again in another folder."
        )
    return settings


def make_records(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table of `RECORD_FIELDS`."""
    import pyarrow as pa

    return pa.Table.from_pylist([dict(row) for row in rows], schema=_schema())


def with_scores(
    records: pa.Table, metric: str, scores: Sequence[float | None], judge: Mapping[str, Any] | None = None
) -> pa.Table:
    """The table with this metric's column set, behind those that are there; what is no number is null.

    Args:
        records: the table.
        metric: the column's name.
        scores: one for each row.
        judge: settings of the judge whose grades these are; kept in the column's metadata.

    Raises:
        EvaluationError: the metric has the name of another column.
    """
    import pyarrow as pa

    if metric in RECORD_FIELDS:
        raise EvaluationError(f"a metric cannot be called {metric!r}: records have a column of that name.")
    values = [None if score is None or math.isnan(score) else float(score) for score in scores]
    column = pa.array(values, pa.float64())
    told = None if judge is None else {_JUDGE: json.dumps(judge, sort_keys=True).encode()}
    field = pa.field(metric, pa.float64(), metadata=told)
    if metric in records.column_names:
        return records.set_column(records.column_names.index(metric), field, column)
    return records.append_column(field, column)


def write_records(folder: Path, records: pa.Table) -> None:
    """Write `records.parquet` so that a kill leaves the old file or the new one."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    buffer = io.BytesIO()
    pq.write_table(records, buffer)
    write_atomically(folder / RECORDS, buffer.getvalue())


def _read_records(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # from memory: a file that is replaced while a table of it is in use does no harm
        stored = pq.ParquetFile(pa.BufferReader(file.read_bytes()))
        records = stored.read([name for name in stored.schema_arrow.names if columns is None or name in columns])
    except (pa.ArrowException, OSError) as error:
        raise EvaluationError(
            f"{file} is damaged or cut short ({error}). Remove it and start the evaluation again with the same "
            f"settings: the answers are taken from {ANSWERS}/, nothing is answered again."
        ) from error
    expected = [field for field in _schema() if columns is None or field.name in columns]
    found = records.schema
    for field in expected:
        if field.name not in found.names or found.field(field.name).type != field.type:
            there = found.field(field.name).type if field.name in found.names else "missing"
            raise EvaluationError(
                f"{file}: column {field.name} should be {field.type}, but is {there}. Of another version? Remove the "
                f"file and start the evaluation again with the same settings: the answers are taken from {ANSWERS}/."
            )
    rest = [field for field in found if field.name not in RECORD_FIELDS]
    # Parquet calls the items of lists otherwise; written again, a table must give the same bytes
    schema = pa.schema([*expected, *rest])
    return records.select(schema.names).cast(schema)


def _schema() -> pa.Schema:
    import pyarrow as pa

    fields = [
        (name, pa.list_(pa.string()) if kind == "list<string>" else pa.type_for_alias(kind))
        for name, kind in RECORD_FIELDS.items()
    ]
    return pa.schema(fields)
