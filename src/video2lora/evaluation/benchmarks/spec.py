"""What a benchmark is, as data: where it comes from, what is asked, what counts as right, and what it costs to get."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...data.errors import DatasetError

MARGINS: Mapping[str, float] = {"token_f1": 0.05, "judge": 0.15}  # arXiv 2606.04351
METRICS = ("token_f1", "judge", "repetition", "empty", "unended")
QA_PROMPT = "{question}\nAnswer only the question, in one sentence."  # arXiv 2606.04351
ANY_TASK = "*"


class BenchmarkError(DatasetError):
    """A benchmark is not known, not on disk, or not in the form that was expected."""


@dataclass(frozen=True)
class Download:
    """One thing that has to be fetched before a benchmark can run.

    Attributes:
        name: what it is: "annotations", "videos".
        repo: a dataset repository on the Hub, or None where a person has to fetch it from `url`.
        files: glob patterns of the files in the repository.
        bytes: about how much that is; None where it is not known before the repository is asked.
        url: where a person goes, for what no repository holds.
        note: parts, forms to fill in, what to do with it.
        revision: of the repository.
    """

    name: str
    repo: str | None
    files: tuple[str, ...] = ()
    bytes: int | None = None
    url: str | None = None
    note: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        where = f"{self.repo} on the Hub ({', '.join(self.files)})" if self.repo else str(self.url)
        return f"{self.name}: {where}, {size_text(self.bytes)}" + (f"; {self.note}" if self.note else "")


@dataclass(frozen=True)
class BenchmarkSpec:
    """One benchmark, declared.

    Attributes:
        name: what it is called on the command line and in the registry.
        version: goes up when what is asked or what counts as right changes; results of two versions do not compare.
        title: for people.
        schema: which loader reads it.
        dataset: its id on the Hub; None for what no repository holds.
        split: the one that is used unless another is named.
        splits: for each split the glob patterns of its annotation files; the first pattern that matches is used.
        columns: for each role the column names that are understood, in order of preference.
        columns_source: where those names are from, and whether anybody saw them.
        prompts: what the model is asked, by task; "*" is for every task. `{question}` is put in.
        tasks: the tasks that run by default, in the report's order; empty where the rows say.
        optional_tasks: tasks that run only when they are named.
        config: of the repository.
        revision: of the repository; "main" means that nobody pinned one.
        metrics: default metrics.
        margins: default margins, by metric, on its own scale.
        max_new_tokens: of an answer.
        num_frames: sampled uniformly from the video or span.
        num_samples: how many are drawn by default; None for all.
        unit: what is drawn: single questions, or videos with all their questions.
        seed: of the draw.
        num_questions, num_videos: in the default split, where known.
        license, access: under what terms, and how to get it.
        downloads: what has to be fetched.
        region: how a region of the video is given to a model that takes no mask; empty where there is none.
        annotation_fps: frames a second of spans that are written in frames.
        video_prefix: what video files have before the annotated name.
        ids_per_video: whether question ids are unique only together with their video.
        question_mark: whether questions are written without one and get one.
        notes: what a reader of the results should know.
    """

    name: str
    version: int
    title: str
    schema: str
    prompts: Mapping[str, str]
    dataset: str | None = None
    split: str = "test"
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    columns_source: str = ""
    tasks: tuple[str, ...] = ()
    optional_tasks: tuple[str, ...] = ()
    config: str | None = None
    revision: str = "main"
    metrics: tuple[str, ...] = METRICS
    margins: Mapping[str, float] = field(default_factory=lambda: dict(MARGINS))
    max_new_tokens: int = 64
    num_frames: int = 12
    num_samples: int | None = 500
    unit: Literal["question", "video"] = "question"
    seed: int = 42
    num_questions: int | None = None
    num_videos: int | None = None
    license: str = ""
    access: str = ""
    downloads: tuple[Download, ...] = ()
    region: str = ""
    annotation_fps: float | None = None
    video_prefix: str = ""
    ids_per_video: bool = False
    question_mark: bool = False
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over everything that is declared, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def total_bytes(self) -> int | None:
        """About how much has to be fetched, all together; None where a part's size is not known."""
        sizes = [download.bytes for download in self.downloads]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def prompt(self, task: str) -> str:
        """What the model is asked in a task, `{question}` not yet put in."""
        return self.prompts.get(task, self.prompts.get(ANY_TASK, ""))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def instructions(self, data_dir: str | Path | None = None) -> str:
        """What has to be fetched, from where, how big it is, under what terms, and the command that does it."""
        folder = "DIR" if data_dir is None else str(data_dir)
        lines = ["It needs:"] + [f"  - {download}" for download in self.downloads]
        lines.append(f"Licence: {self.license or 'not stated'}. Access: {self.access or 'open'}.")
        if any(download.repo for download in self.downloads):
            python = f"video2lora.evaluation.benchmarks.download({self.name!r}, {folder!r})"
            lines.append(f"Fetch it: video2lora evaluate ... --data-dir {folder} --download; in Python: {python}")
        lines.append(f"What lies in a folder is read from there: --data-dir {folder}; in Python: data_dir={folder!r}")
        return "\n".join(lines)


def size_text(size: int | None) -> str:
    """A number of bytes for people."""
    if size is None:
        return "size not known beforehand"
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= step:
            return f"about {size / step:.3g} {unit}"
    return f"about {size} bytes"
