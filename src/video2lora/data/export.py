"""Writes FineVideo to disk as files and a manifest without responses; it can be killed at any moment and goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .errors import DatasetError
from .files import remove_parts, write_atomically
from .finevideo import KINDS, MIXTURE, SpanStatistics, check_mixture, video_spans

FINEVIDEO = "HuggingFaceFV/finevideo"
MANIFEST, STATE, VIDEOS = "manifest.jsonl", "export.json", "videos"
_FORMAT = 1
_STATE_EVERY = 25  # source rows; a resumed export reads at most so many again


@dataclass(frozen=True)
class ExportSummary:
    """What lies in the folder after an export, over all its runs.

    Attributes:
        manifest: the JSONL file: `{"id", "video", "start", "end", "prompt", "task_type", "dataset"}` a line.
        num_rows: its lines.
        num_videos: videos they use.
        num_read: rows of the source that were read.
        statistics: kinds of spans, and what was skipped and why.
        finished: whether the source was read to its end (False: `limit` was reached).
    """

    manifest: Path
    num_rows: int
    num_videos: int
    num_read: int
    statistics: SpanStatistics
    finished: bool

    def __str__(self) -> str:
        spans = ", ".join(f"{self.statistics.spans[kind]} {kind}" for kind in KINDS)
        lines = [f"{self.num_videos} videos, {self.num_rows} rows ({spans}) from {self.num_read} of the source"]
        lines[0] += " (all of it)." if self.finished else " (more to come)."
        for title, counts in (("Skipped", self.statistics.skipped), ("Replaced", self.statistics.fallbacks)):
            if counts:
                lines.append(f"{title}: " + ", ".join(f"{n} {name}" for name, n in counts.most_common()) + ".")
        return "\n".join([*lines, f"Manifest: {self.manifest}"])


def export_finevideo(
    output_dir: str | os.PathLike[str],
    *,
    source: Any = FINEVIDEO,
    revision: str | None = None,
    split: str = "train",
    seed: int = 42,
    mixture: Sequence[float] = MIXTURE,
    spans_per_video: int = 1,
    limit: int | None = None,
) -> ExportSummary:
    """Stream FineVideo into `output_dir`: `videos/<id>.mp4` as they are, and `manifest.jsonl` of spans with prompts.

    The manifest has no responses: a teacher is to fill them. Called again on the same folder it goes on where it was
    stopped, even by kill -9: a video is renamed into place when it is complete, a cut last line of the manifest is
    dropped, no row is repeated or lost, and the summary is that of a run never stopped. One process a folder; several
    machines take a shard of the source each, with a folder of their own.

    Args:
        output_dir: made if missing.
        source: a name for `datasets.load_dataset` (streamed), or a Dataset or IterableDataset with columns `mp4` and
            `json` (`finevideo.py` describes them).
        revision: of a named source; pin it, so that a resumed export reads the same rows.
        split: of a named source.
        seed: of the draws, see `finevideo_spans`.
        mixture: see `finevideo_spans`.
        spans_per_video: see `finevideo_spans`.
        limit: stop when so many videos are in the folder, those of earlier runs included.

    Raises:
        DatasetError: the source cannot be had (FineVideo is gated), or the folder holds an export with other settings,
            or a manifest that is not one of ours.
    """
    shares = check_mixture(mixture, spans_per_video)
    settings = {
        "format": _FORMAT,
        "source": source if isinstance(source, str) else None,
        "revision": revision,
        "split": split if isinstance(source, str) else None,
        "seed": seed,
        "mixture": list(mixture),
        "spans_per_video": spans_per_video,
    }
    folder = _Folder(Path(output_dir), settings)
    if limit is not None and folder.statistics.num_videos >= limit:
        return folder.summary(finished=False)
    rows = _Rows(_open(source, revision, split), folder.position, folder.source_state)
    bar = tqdm(desc="Exporting videos", unit="video", total=limit, initial=folder.statistics.num_videos, disable=None)
    finished = True
    with bar, folder:
        for row in rows:
            before = folder.statistics.num_videos
            folder.take(row, seed, shares, spans_per_video)
            bar.update(folder.statistics.num_videos - before)
            done = limit is not None and folder.statistics.num_videos >= limit
            if done or folder.position % _STATE_EVERY == 0:
                folder.save_state(rows.state())
            if done:
                finished = False
                break
        else:
            folder.save_state(rows.state())
    return folder.summary(finished)


class _Folder:
    """The folder of an export: what is in it, and the place in the source up to which that is certain.

    `export.json` is only ever behind: source rows after its position are read again, and what they gave is recognised.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.manifest, self._state_file = path / MANIFEST, path / STATE
        (path / VIDEOS).mkdir(parents=True, exist_ok=True)
        state = self._read_state()
        remove_parts(path)
        remove_parts(path / VIDEOS)
        lines = self._read_manifest()
        self.position: int = state["position"]
        self.source_state: dict[str, Any] | None = state["source_state"]
        certain: int = state["num_rows"]
        if certain > len(lines) or not self._videos_exist(lines) or state["datasets_version"] != _datasets_version():
            # Somebody took files away, or the place may mean another one: read all again, write what is missing.
            self.position, self.source_state, certain, state["statistics"] = 0, None, 0, {}
        self.statistics = SpanStatistics.from_dict(state["statistics"])
        self._rows = {line["id"] for line in lines}
        self._seen = {line["video"] for line in lines[:certain]}
        if not self._state_file.exists():
            self.save_state(None)
        self._file: Any = None

    def __enter__(self) -> _Folder:
        self._file = self.manifest.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, row: Mapping[str, Any], seed: int, shares: Sequence[float], spans_per_video: int) -> None:
        """Write one row of the source: the video first, then all its lines at once."""
        self.position += 1
        data = _video_bytes(row.get("mp4"))
        if not data:
            self.statistics.skipped["row_without_video"] += 1
            return
        drawn = SpanStatistics()
        spans = video_spans(row.get("json"), seed, shares, spans_per_video, drawn)
        location = f"{VIDEOS}/{spans[0]['video_id']}.mp4" if spans else ""
        if location in self._seen:
            self.statistics.skipped["duplicate_video"] += 1
            return
        self.statistics.add(drawn)
        if not spans:
            return
        self._seen.add(location)
        if not (self.path / location).exists():
            write_atomically(self.path / location, data)
        new = [_manifest_row(span, location) for span in spans if span["id"] not in self._rows]
        if new:
            self._rows.update(line["id"] for line in new)
            self._file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in new))
            self._file.flush()
            os.fsync(self._file.fileno())

    def save_state(self, source_state: dict[str, Any] | None) -> None:
        """Note that everything up to the present position is on disk."""
        state = {
            "settings": self.settings,
            "position": self.position,
            "num_rows": sum(self.statistics.spans.values()),
            "source_state": source_state,
            "datasets_version": _datasets_version(),
            "statistics": self.statistics.to_dict(),
        }
        write_atomically(self._state_file, json.dumps(state, indent=2).encode() + b"\n")

    def summary(self, finished: bool) -> ExportSummary:
        """What lies in the folder."""
        videos, rows = self.statistics.num_videos, sum(self.statistics.spans.values())
        return ExportSummary(self.manifest, rows, videos, self.position, self.statistics, finished)

    def _read_state(self) -> dict[str, Any]:
        if not self._state_file.exists():
            if self.manifest.exists():
                raise DatasetError(
                    f"{self.manifest} is there but no {STATE}, so what made it is not known. Name another folder."
                )
            fresh: dict[str, Any] = {"position": 0, "source_state": None, "num_rows": 0, "statistics": {}}
            return {**fresh, "datasets_version": _datasets_version()}
        state = json.loads(self._state_file.read_text(encoding="utf-8"))
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                there = state["settings"].get(name)
                raise DatasetError(
                    f"{self.path} holds an export with {name}={there!r}, but {value!r} was asked for. Use the same "
                    "settings to go on, or name another folder."
                )
        return state

    def _read_manifest(self) -> list[dict[str, Any]]:
        """The complete lines; what a kill left of a last one is cut off."""
        if not self.manifest.exists():
            return []
        data = self.manifest.read_bytes()
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            os.truncate(self.manifest, complete)
        try:
            return [
                {name: row[name] for name in ("id", "video")} for row in map(json.loads, data[:complete].splitlines())
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{self.manifest} has a line that is no row of ours ({error}). Correct or remove it."
            ) from error

    def _videos_exist(self, lines: list[dict[str, Any]]) -> bool:
        there = set(os.listdir(self.path / VIDEOS))
        return all(os.path.basename(line["video"]) in there for line in lines)


class _Rows:
    """The source's rows from a position on, and a state that finds the next one without reading from the start."""

    def __init__(self, dataset: Any, position: int, state: dict[str, Any] | None):
        self.dataset, self._state = dataset, state
        self._streams = hasattr(dataset, "load_state_dict")
        if self._streams and state is not None:
            dataset.load_state_dict(state)
        elif position:
            self.dataset = dataset.skip(position)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset)

    def state(self) -> dict[str, Any] | None:
        return self.dataset.state_dict() if self._streams else None


def _datasets_version() -> str:
    return version("datasets")


def _open(source: Any, revision: str | None, split: str) -> Any:
    from datasets import Dataset, IterableDataset, load_dataset

    if isinstance(source, str):
        try:
            source = load_dataset(source, revision=revision, split=split, streaming=True)
        except Exception as error:  # the Hub client, fsspec and the builders each raise errors of their own
            raise DatasetError(
                f"{source!r} cannot be streamed ({type(error).__name__}: {error}). FineVideo is gated: accept its "
                f"terms at https://huggingface.co/datasets/{FINEVIDEO} and log in with `hf auth login`."
            ) from error
    if not isinstance(source, (Dataset, IterableDataset)):
        raise DatasetError(f"source is {type(source).__name__}, expected a name, a Dataset or an IterableDataset.")
    missing = {"mp4", "json"} - set(source.column_names or ("mp4", "json"))
    if missing:
        raise DatasetError(f"the source has no column {sorted(missing)}; its columns are {source.column_names}.")
    from .sources import undecoded

    return undecoded(source)


def _video_bytes(value: Any) -> bytes | None:
    data = value.get("bytes") if isinstance(value, Mapping) else value
    return bytes(data) if isinstance(data, (bytes, bytearray, memoryview)) else None


def _manifest_row(span: Mapping[str, Any], location: str) -> dict[str, Any]:
    kept = {name: span[name] for name in ("start", "end", "prompt", "task_type")}
    return {"id": span["id"], "video": location, **kept, "dataset": "finevideo"}
