"""Draws a benchmark's questions, puts those of one video together, and names what is missing."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

from ..samples import Question, Sample
from .catalog import BENCHMARKS
from .files import VideoIndex, find_annotations, read_rows
from .loaders import Entry, Table, load_entries
from .spec import BenchmarkError, BenchmarkSpec

NumSamples = int | Literal["all"] | None
_SHOWN = 5  # missing videos that a warning names


@dataclass(frozen=True, eq=False)
class Benchmark(Sequence[Sample]):
    """The samples of one benchmark, in a fixed order that depends on the seed and their ids alone.

    Attributes:
        spec: what was declared.
        samples: a video or span each, with all questions drawn about it.
        split: which split they are from.
        seed: of the draw.
        num_available: questions before the draw.
        missing: names of videos that are not in the folder; their samples are kept, with the path where the file
            would be, so that they show up as errors and not as fewer samples.
        skipped: questions that cannot be asked or scored, by reason.
    """

    spec: BenchmarkSpec
    samples: tuple[Sample, ...] = field(repr=False)
    split: str
    seed: int
    num_available: int
    missing: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, index: int | slice) -> Sample | tuple[Sample, ...]:
        return self.samples[index]

    @property
    def num_questions(self) -> int:
        """Questions that were drawn."""
        return sum(len(sample.questions) for sample in self.samples)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the questions drawn, in the spec's order, then in alphabetical order."""
        found = {question.task for sample in self.samples for question in sample.questions}
        declared = [task for task in (*self.spec.tasks, *self.spec.optional_tasks) if task in found]
        return (*declared, *sorted(found - set(declared)))

    @property
    def digest(self) -> str:
        """SHA-256 over the samples, what is asked and what counts as right, in hexadecimal; not where files lie."""
        digest = hashlib.sha256()
        for sample in self.samples:
            questions = [[q.id, q.task, q.prompt, q.question, q.references] for q in sample.questions]
            digest.update(json.dumps([sample.id, sample.start, sample.end, questions]).encode() + b"\n")
        return digest.hexdigest()

    def __str__(self) -> str:
        lines = [
            f"{self.spec.title} ({self.spec.name} version {self.spec.version}), split {self.split}: "
            f"{self.num_questions} of {self.num_available} questions about {len(self)} videos or spans, "
            f"seed {self.seed}."
        ]
        if self.missing:
            shown = ", ".join(self.missing[:_SHOWN]) + (", ..." if len(self.missing) > _SHOWN else "")
            lines.append(f"{len(self.missing)} videos are missing: {shown}.")
        if self.skipped:
            lines.append("Skipped: " + ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) + ".")
        return "\n".join(lines)


def load_benchmark(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    split: str | None = None,
    num_samples: NumSamples = None,
    seed: int | None = None,
    tasks: Sequence[str] | None = None,
    num_frames: int | None = None,
) -> Benchmark:
    """Load a benchmark from a local folder, or a user's own JSONL; nothing is downloaded.

    Args:
        name_or_path: a name of `BENCHMARKS`, or a JSONL file in the form of the training rows (see `local.py`).
        data_dir: folder with annotations and videos: the Hub repository as it is, or unpacked in any way. Of a JSONL
            file, the folder that relative video paths start from (default: the file's own).
        split: default: the spec's; of a JSONL file, rows whose `split` says so.
        num_samples: how many questions, or videos with all their questions (`spec.unit`), are drawn; "all", or None
            for the spec's number. The draw takes those with the smallest hash of seed and id, so it does not depend on
            the order of rows, and a smaller draw is part of a larger one.
        seed: of the draw; default: the spec's.
        tasks: only these; default: the spec's own, without the optional ones.
        num_frames: frames that will be sampled, which moving shapes are made for; others do not need to know.

    Raises:
        BenchmarkError: there is no such benchmark, split, task or file, columns are not those expected, or no video is
            in the folder; the message says what to download, from where, how big it is, and how.

    Warns:
        UserWarning: some videos are missing (they stay in the benchmark, see `Benchmark.missing`).
    """
    name = os.fspath(name_or_path)
    if name not in BENCHMARKS:
        if name.lower().endswith((".jsonl", ".ndjson", ".json")):
            from .local import load_local

            return load_local(
                Path(name),
                None if data_dir is None else Path(data_dir),
                split=split,
                num_samples=num_samples,
                seed=seed,
                tasks=tasks,
            )
        close = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.5)
        raise BenchmarkError(
            f"there is no benchmark {name!r}{f'; did you mean {close[0]!r}?' if close else '.'} There are "
            f"{', '.join(sorted(BENCHMARKS))}, or the path of your own .jsonl file."
        )
    spec = BENCHMARKS[name]
    wanted = _check_tasks(spec, tasks)
    if spec.schema == "moving_shapes":
        from .shapes import load_shapes

        return load_shapes(spec, split=split, num_samples=num_samples, seed=seed, tasks=wanted, num_frames=num_frames)
    return _load_declared(spec, data_dir, split, num_samples, seed, wanted)


def assemble(
    spec: BenchmarkSpec,
    entries: Iterable[Entry],
    locate: Callable[[Entry], Any],
    *,
    split: str,
    num_samples: NumSamples,
    seed: int | None,
    skipped: Counter[str],
    sample_id: Callable[[Sequence[Entry]], str] | None = None,
    video_id: Callable[[Entry], str | None] = lambda entry: entry.video,
) -> Benchmark:
    """Draw from the questions and put those of one video and span together; see `load_benchmark`.

    Args:
        locate: the video of a question that was drawn: anything `load_video` takes.
        sample_id: of the questions of one sample; default: from the video's name, span and region.
        video_id: what spans and regions of one video share; None where its place says it.
    """
    seed = spec.seed if seed is None else seed
    unique = _unique(entries, skipped)
    drawn = _draw(spec, unique, num_samples, seed)
    groups: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in drawn:
        groups[entry.video, entry.start, entry.end, entry.region].append(entry)
    ranked = []
    for group in groups.values():
        group.sort(key=lambda entry: (entry.order, _natural(entry.id)))
        id = _sample_id(group) if sample_id is None else sample_id(group)
        questions = tuple(Question(one.id, one.prompt, one.references, one.task, one.question) for one in group)
        sample = Sample(id, locate(group[0]), questions, group[0].start, group[0].end, video_id(group[0]))
        rank = min(_rank(seed, spec.name, entry.draw) for entry in group)
        ranked.append(((rank, _natural(id)), sample))
    ranked.sort(key=lambda pair: pair[0])
    return Benchmark(spec, tuple(sample for _, sample in ranked), split, seed, len(unique), skipped=dict(skipped))


def only_tasks(spec: BenchmarkSpec, entries: list[Entry], tasks: Sequence[str]) -> list[Entry]:
    """The questions of these tasks, where the rows say which tasks there are.

    Raises:
        BenchmarkError: no row has one of them.
    """
    found = {entry.task for entry in entries}
    if unknown := [task for task in tasks if task not in found]:
        raise BenchmarkError(f"{spec.title}: no question has the task {unknown[0]!r}; there are {sorted(found)}.")
    return [entry for entry in entries if entry.task in tasks] if tasks else entries


def _load_declared(
    spec: BenchmarkSpec,
    data_dir: str | os.PathLike[str] | None,
    split: str | None,
    num_samples: NumSamples,
    seed: int | None,
    tasks: Sequence[str],
) -> Benchmark:
    split = spec.split if split is None else split
    if split not in spec.splits:
        raise BenchmarkError(f"{spec.title} has the splits {sorted(spec.splits)}, not {split!r}.")
    if data_dir is None:
        raise BenchmarkError(f"{spec.title}: give data_dir, the folder it lies in. {spec.instructions()}")
    folder = Path(data_dir)
    files = find_annotations(folder, spec.splits[split]) if folder.is_dir() else []
    if not files:
        missing = f"has no annotations ({' or '.join(spec.splits[split])})" if folder.is_dir() else "does not exist"
        raise BenchmarkError(f"{spec.title}: {folder} {missing}. {spec.instructions(folder)}")
    skipped: Counter[str] = Counter()
    table = Table(spec, [row for file in files for row in read_rows(file)], _names(files), skipped)
    entries = load_entries(table, tasks)
    if not spec.tasks:
        entries = only_tasks(spec, entries, tasks)
    index = VideoIndex(folder, spec.video_prefix)
    if not index:
        archives = [path.name for path in sorted(folder.iterdir()) if re.search(r"\.(zip|tar)\b", path.name)]
        hint = (
            f"There are archives: unpack them with unpack({str(folder)!r}) of video2lora.evaluation.benchmarks. "
            if archives
            else ""
        )
        raise BenchmarkError(f"{spec.title}: no video file below {folder}. {hint}{spec.instructions(folder)}")
    locate = _Locate(spec, index, split)
    benchmark = assemble(spec, entries, locate, split=split, num_samples=num_samples, seed=seed, skipped=skipped)
    return replace(benchmark, missing=missing_videos(benchmark, folder))


class _Locate:
    """The video file of a question; with the region marked in it, where that is asked for."""

    def __init__(self, spec: BenchmarkSpec, index: VideoIndex, split: str):
        self.spec, self.index, self.split = spec, index, split
        self._regions: Any = None

    def __call__(self, entry: Entry) -> str:
        found = self.index.find(entry.video)
        if found is None or entry.region is None:
            return str(self.index.expected(entry.video) if found is None else found)
        if self._regions is None:
            from .regions import Regions

            self._regions = Regions(self.spec, self.index.data_dir, self.split)
        return str(self._regions.clip(found, entry.video, entry.region))


def missing_videos(benchmark: Benchmark, folder: Path) -> tuple[str, ...]:
    """Names of the files that are not there (addresses are not looked up); with a warning, or an error for all."""
    spec = benchmark.spec
    videos = {sample.video for sample in benchmark}
    absent = [video for video in videos if "://" not in video and not os.path.exists(video)]
    missing = sorted(Path(video).name for video in absent)
    if len(missing) == len(videos):
        raise BenchmarkError(
            f"{spec.title}: none of the {len(videos)} videos drawn is below {folder} (for example {missing[0]}). "
            f"{spec.instructions(folder)}"
        )
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        warnings.warn(
            f"{spec.title}: {len(missing)} of {len(videos)} videos drawn are not below {folder} ({shown}); their "
            "questions will be reported as errors. Benchmark.missing names them all.",
            stacklevel=4,
        )
    return tuple(missing)


def _check_tasks(spec: BenchmarkSpec, tasks: Sequence[str] | None) -> tuple[str, ...]:
    if tasks is None:
        return spec.tasks
    if isinstance(tasks, str) or not tasks:
        raise BenchmarkError(f"tasks={tasks!r}: expected a list of at least one task.")
    known = (*spec.tasks, *spec.optional_tasks)
    if known and (unknown := [task for task in tasks if task not in known]):
        raise BenchmarkError(f"{spec.title} has no task {unknown[0]!r}; there are {list(known)}.")
    return tuple(task for task in known if task in tasks) if known else tuple(tasks)


def _unique(entries: Iterable[Entry], skipped: Counter[str]) -> list[Entry]:
    """Questions with ids of their own: the same row twice counts once, another one of the same id gets a hash."""
    by_id: dict[str, dict[Entry, Entry]] = defaultdict(dict)
    for entry in entries:
        content_alone = replace(entry, order=0)
        if content_alone in by_id[entry.id]:
            skipped["row that is there twice"] += 1
        by_id[entry.id].setdefault(content_alone, entry)
    unique = []
    for id, same in by_id.items():
        for entry in same.values():
            content = json.dumps([entry.start, entry.end, entry.prompt, entry.references, entry.task, entry.region])
            suffix = f"-{hashlib.sha256(content.encode()).hexdigest()[:8]}" if len(same) > 1 else ""
            own_draw = entry.draw == entry.id
            unique.append(replace(entry, id=id + suffix, draw=entry.draw + suffix if own_draw else entry.draw))
    return unique


def _draw(spec: BenchmarkSpec, entries: list[Entry], num_samples: NumSamples, seed: int) -> list[Entry]:
    number = spec.num_samples if num_samples is None else num_samples
    if number is None or number == "all":
        return entries
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise BenchmarkError(f"num_samples={number!r}: expected a number of at least 1, or 'all'.")
    names = sorted({entry.draw for entry in entries}, key=lambda name: _rank(seed, spec.name, name))
    chosen = set(names[:number])
    return [entry for entry in entries if entry.draw in chosen]


def _rank(seed: int, benchmark: str, name: str) -> str:
    return hashlib.sha256(f"{seed}/{benchmark}/{name}".encode()).hexdigest()


def _sample_id(group: Sequence[Entry]) -> str:
    first = group[0]
    span = "" if first.start is None and first.end is None else f"@{first.start or 0:.3f}-{first.end or 0:.3f}"
    return first.video + span + ("" if first.region is None else f"#{first.region}")


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A key by which "2" comes before "10"."""
    parts = re.split(r"([0-9]+)", text)
    return [(1, int(part), part) if index % 2 else (0, 0, part) for index, part in enumerate(parts)]


def _names(files: Sequence[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
