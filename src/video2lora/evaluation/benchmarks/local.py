"""A user's own benchmark: a JSONL file in the form of the training rows, whose responses are the right answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.rows import load_rows
from ...data.sources import open_source
from .loaders import Entry
from .spec import ANY_TASK, BenchmarkError, BenchmarkSpec

if TYPE_CHECKING:
    from .benchmark import Benchmark, NumSamples

_CONVERSATIONS = ("queries", "conversations", "messages")
_EXTRAS = ("references", "task", "question")


def local_spec(path: Path) -> BenchmarkSpec:
    """What a user's own JSONL is, declared: the prompts are the rows' own, all of them are used, no judge."""
    return BenchmarkSpec(
        name=path.stem,
        version=1,
        title=path.name,
        schema="local",
        split="",
        prompts={ANY_TASK: "{question}"},
        metrics=("token_f1", "repetition", "empty", "unended"),
        num_samples=None,
        unit="video",
        access="a local file",
    )


def load_local(
    path: Path,
    data_dir: str | Path | None = None,
    *,
    split: str | None = None,
    num_samples: NumSamples = None,
    seed: int | None = None,
    tasks: Sequence[str] | None = None,
) -> Benchmark:
    """Load a JSONL file as a benchmark; rows of the same video and span become one sample.

    A row is as `video2lora.data.load_rows` has it (`video`, optional `start` and `end`, `prompt` with `response`, or
    several under `conversations`). The response is a right answer. Further fields, of a row with one prompt or of an
    item of `conversations` with `prompt` and `response`: `references`, a list of answers that are right too; `task`
    (of the row it holds for all its prompts), a row of the report's tables; `question`, for a judge, where the prompt
    says more than that. A draw (`num_samples`) takes videos with all their questions.

    Raises:
        BenchmarkError: there is no such file, it has no rows, or a question has no right answer.
        DatasetError: a row is in none of the forms of `load_rows`.
    """
    from .benchmark import assemble, missing_videos, only_tasks

    if not path.is_file():
        raise BenchmarkError(f"{path}: there is no such file. Give a .jsonl file or a name of describe_benchmarks().")
    if tasks is not None and (isinstance(tasks, str) or not tasks):
        raise BenchmarkError(f"tasks={tasks!r}: expected a list of at least one task.")
    spec, rows = local_spec(path), list(_entries(path, split, data_dir))
    if not rows:
        raise BenchmarkError(f"{path.name}: there are no rows in it.")
    # What is drawn is a video and span; its name is the smallest id of its rows. Not the path: the same file elsewhere
    # has the same ids.
    names: dict[tuple[Any, ...], str] = {}
    for row_id, entry, _ in rows:
        key = (entry.video, entry.start, entry.end)
        names[key] = min(names.get(key, row_id), row_id)
    entries = [replace(entry, draw=names[entry.video, entry.start, entry.end]) for _, entry, _ in rows]
    if tasks is not None:
        entries = only_tasks(spec, entries, tasks)
    videos = {entry.video: video for _, entry, video in rows}
    benchmark = assemble(
        spec,
        entries,
        lambda entry: videos[entry.video],
        split=split or "",
        num_samples=num_samples,
        seed=seed,
        skipped=Counter(),
        sample_id=lambda group: group[0].draw,
        video_id=lambda entry: None,  # its location, which no record should tell
    )
    return replace(benchmark, missing=missing_videos(benchmark, path.parent if data_dir is None else Path(data_dir)))


def _entries(path: Path, split: str | None, data_dir: str | Path | None) -> Iterator[tuple[str, Entry, str]]:
    """Each question with the id of its row and its video's location."""
    rows: Any = load_rows(str(path), split=split, video_root=data_dir)
    records = open_source(str(path), split=split, video_root=data_dir).records()
    for row, record in zip(rows, records, strict=True):
        video = row["video"] if isinstance(row["video"], str) else row["video"]["path"]
        extras = _extras(record.row, len(row["queries"]), record.where)
        for index, (query, extra) in enumerate(zip(row["queries"], extras, strict=True)):
            id = row["id"] if len(row["queries"]) == 1 else f"{row['id']}-{index}"
            references = _references(query["response"], extra.get("references"), record.where)
            task, question = _string(extra, "task", record.where) or "", _string(extra, "question", record.where)
            span = (row["start"], row["end"])
            yield (
                row["id"],
                Entry(id, id, video, query["prompt"], references, task, question, *span, order=index),
                video,
            )


def _extras(row: Mapping[str, Any], count: int, where: str) -> list[Mapping[str, Any]]:
    """What each prompt of a row has beside prompt and response."""
    turns = next((row[name] for name in _CONVERSATIONS if row.get(name) is not None), None)
    if turns is None:
        return [{name: row.get(name) for name in _EXTRAS}]
    shared = {"task": row.get("task")}
    if row.get("references") is not None and count > 1:
        raise BenchmarkError(
            f"{where}: references of the row, which has {count} prompts; put them into the items of the conversation."
        )
    if len(turns) != count:  # turns of a chat: nothing of their own
        return [{**shared, "references": row.get("references")}] * count
    own = [{name: turn.get(name) for name in _EXTRAS if turn.get(name) is not None} for turn in turns]
    return [{**shared, "references": row.get("references"), **one} for one in own]


def _references(response: str | None, more: Any, where: str) -> tuple[str, ...]:
    more = [] if more is None else more
    if isinstance(more, str) or not isinstance(more, Sequence) or not all(isinstance(one, str) for one in more):
        raise BenchmarkError(f"{where}: references is {more!r}, expected a list of strings.")
    texts = tuple(dict.fromkeys(text.strip() for text in (response, *more) if text and text.strip()))
    if not texts:
        raise BenchmarkError(
            f"{where}: a prompt without a right answer; give it a response or references (a teacher's, from "
            "`video2lora teach`, measure how much the adapter differs from the video in context)."
        )
    return texts


def _string(extra: Mapping[str, Any], name: str, where: str) -> str | None:
    value = extra.get(name)
    if value is not None and not isinstance(value, str):
        raise BenchmarkError(f"{where}: {name} is {value!r}, expected a string.")
    return value
