"""Pipelines: the folder a bulk run writes: adapters, what made them, a journal of each process, and the index."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .. import __version__
from ..adapters import AdapterError, VideoAdapter, storage
from ..adapters.errors import OutputExistsError
from ..data import DatasetError
from ..data.files import cut_torn_line, write_atomically
from .bulk_videos import BulkItem
from .video_to_lora import count_decode_errors

INDEX, SKIPPED, STATE, JOURNAL = "index.jsonl", "skipped.jsonl", "internalize.json", "journal"
FORMAT = 1
_LEFTOVER = re.compile(r"\..+\.(?:(?:tmp|old)-[0-9a-f]{12}|\d+\.part)")
_LEFTOVER_SECONDS = 3600  # a writer takes milliseconds
_DIGITS = 16  # of a directory's name; the whole key stands in the index
_STEM = 60  # characters; file systems take 255 bytes
IN_INDEX = (
    "adapter",
    "key",
    "content_hash",
    "sha256",
    "num_frames",
    "num_decode_errors",
    "seconds",
    "segments",
    "rank",
    "bytes",
)

logger = logging.getLogger(__name__)

Entry = dict[str, Any]


class BulkFolder:
    """The output folder as one process sees it.

    Each process appends to a journal of its own, a line for every unit of work whose adapters all lie on the disk; so
    a unit that a kill interrupted is done again as a whole, and by the same batch gets the same adapters. An entry
    tells the video (with its signature), the settings' hash, and what was made; or the error. Of several about one
    video the one with the highest `attempt` counts.

    Args:
        path: the folder.
        settings: all that decides the adapters but the video; another run's must be the same.

    Raises:
        DatasetError: `path` is a file.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path).expanduser().absolute()
        self.settings = json.loads(json.dumps(settings))  # as they will be read again
        self.index, self._journal = self.path / INDEX, self.path / JOURNAL
        self.newest: dict[tuple[Any, ...], Entry] = {}
        self.by_key: dict[str, Entry] = {}
        self._file: Any = None
        self._own_lock: FileLock | None = None

    def prepare(self, name: str, *, overwrite: bool) -> None:
        """Make the folder, note what it is for, and remove what killed writers left. For one process of a launch.

        Args:
            name: of this process's journal, which is taken first: what another run is writing is not touched.
            overwrite: also if it was begun with other settings.

        Raises:
            DatasetError: it was begun with other settings, holds something else, or another run is writing to it.
        """
        check_folder(self.path)
        self._take_journal(name)
        with self._lock():
            file = self.path / STATE
            if file.exists():
                there = json.loads(file.read_text(encoding="utf-8"))
                if there["settings"] == self.settings:
                    self.settings = there["settings"]  # as older versions wrote them: 1 for 1.0
                elif not overwrite:
                    raise DatasetError(_difference(self.path, there["settings"], self.settings))
            state = {"format": FORMAT, "settings": self.settings, "video2lora": __version__}
            data = json.dumps(state, indent=2, ensure_ascii=False).encode() + b"\n"
            _write_if_new(file, data)
        alone = self._is_alone()
        for path in self.path.glob(".*"):
            with suppress(FileNotFoundError):  # another shard was at its end
                if _LEFTOVER.fullmatch(path.name) and (alone or _age(path) > _LEFTOVER_SECONDS):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def open(self, name: str) -> None:
        """Open this process's journal, and read all of them.

        Raises:
            DatasetError: another process is writing it.
        """
        if self._own_lock is None:
            self._take_journal(name)
        path = self._journal / f"{name}.jsonl"
        there = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        if there["settings"] == self.settings:
            self.settings = there["settings"]  # in the very words of the process that prepared it
        cut_torn_line(path)
        self._file = path.open("ab")
        self.read()

    @property
    def digest(self) -> str:
        """What the entries call the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def close(self) -> None:
        """Close this process's journal."""
        if self._file is not None:
            self._file.close()
        if self._own_lock is not None:
            self._own_lock.release()

    def read(self) -> None:
        """Read what all processes have done with these settings, in this run and in earlier ones."""
        self.newest.clear()
        self.by_key.clear()
        digest = self.digest
        for entry in self._entries():
            if entry["settings"] == digest:
                self._take(entry)

    def append(self, entries: Iterable[Entry]) -> None:
        """Bring a unit to the disk."""
        entries = [entry for entry in entries if not self._known(entry)]
        if not entries:
            return
        digest = self.digest
        for entry in entries:
            known = self.newest.get(_identity(entry))
            entry |= {"settings": digest, "attempt": 1 + (known["attempt"] if known else 0)}
            self._take(entry)
        self._file.write(json.dumps(entries, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def done(self, item: BulkItem, signature: Any) -> Entry | None:
        """The entry of an item whose video has not changed since, and whose adapter is whole."""
        entry = self.newest.get(item.identity)
        if entry is None or "error" in entry or entry["signature"] != signature:
            return None
        return self._checked(entry)

    def find(self, key: str) -> Entry | None:
        """What is to be said of the adapter of this key, if it is there and whole, whatever its video was called."""
        entry = self.by_key.get(key)
        return None if entry is None else self._checked(entry)

    def save(self, adapter: VideoAdapter, key: str, layout: str, dtype: Any) -> Entry:
        """Write an adapter, unless a whole one of the same key lies there, and describe it.

        Raises:
            OSError: it cannot be written.
            OutputExistsError: something else has its name.
        """
        segments = adapter.segments
        stem = re.sub(r"[^\w.-]+", "_", Path(segments[0].source or "").stem).lstrip(".")[:_STEM]
        # the key does not tell how the file is written
        digits = hashlib.sha256(f"{key} {layout} {dtype}".encode()).hexdigest()[:_DIGITS]
        directory = self.path / f"{stem.strip('_') or 'video'}-{digits}"
        if _content_hash(directory, whole=True) is None:
            try:
                _remove_fragments(directory)
                adapter.save_pretrained(directory, layout=layout, dtype=dtype, overwrite=directory.exists())  # type: ignore[arg-type]
            except (OutputExistsError, OSError, SafetensorError) as error:
                if _content_hash(directory, whole=True) is None:  # another process was not faster
                    if isinstance(error, OutputExistsError):
                        raise
                    raise OSError(
                        f"{directory} cannot be written ({error}). What is done is kept: start again to go on."
                    ) from error
        stamp = _stamp(directory)
        return {
            "key": key,
            "adapter": directory.name,
            "content_hash": _content_hash(directory),
            "sha256": segments[0].sha256,
            "source": segments[0].source,
            "num_frames": sum(segment.num_frames or 0 for segment in segments),
            "num_decode_errors": count_decode_errors(segments),
            "seconds": round(sum((s.end or 0.0) - (s.start or 0.0) for s in segments), 6),
            "segments": len(segments),
            "rank": adapter.rank,
            "bytes": sum(size for size, _ in stamp.values()),
            "stamp": stamp,
        }

    def merge(self, items: Sequence[BulkItem], *, remove_replaced: bool) -> None:
        """Write the index and what was skipped, in the order of the items, of all that has been done until now.

        Args:
            items: of the whole run, all shards.
            remove_replaced: also remove the adapters that other settings or changed videos have replaced.
        """
        with self._lock():  # who comes last has seen everything
            self.read()
            lines, skipped = [], []
            for item in items:
                entry = self.newest.get(item.identity)
                line: Entry = {"video": item.video, "start": item.start, "end": item.end}
                if item.where is not None:
                    line |= {"row": item.where}
                if item.ids:
                    line |= {"ids": list(item.ids)}
                if entry is None:
                    continue
                if "error" in entry:
                    skipped.append(line | {"error": entry["error"]})
                    continue
                line["video"] = item.video or entry["source"]
                lines.append(line | {name: entry[name] for name in IN_INDEX})
            _write_if_new(self.index, _jsonl(lines))
            if skipped:
                _write_if_new(self.path / SKIPPED, _jsonl(skipped))
            else:
                (self.path / SKIPPED).unlink(missing_ok=True)
            if remove_replaced:
                self._remove_replaced()

    def _remove_replaced(self) -> None:
        # what was made of videos that are not in this run's list has not been replaced
        current = {entry.get("adapter") for entry in self.newest.values()}
        for entry in self._entries():
            newest = self.newest.get(_identity(entry))
            if "adapter" not in entry or entry["adapter"] in current or newest is None or "error" in newest:
                continue
            directory = self.path / entry["adapter"]
            if directory.is_dir() and storage.is_replaceable(directory):
                shutil.rmtree(directory)

    def _take_journal(self, name: str) -> None:
        self._journal.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._journal / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise DatasetError(
                f"another run is writing to {self.path}: wait for it, or name another folder."
            ) from error
        self._own_lock = lock

    def _is_alone(self) -> bool:
        """Whether no other launch (a shard) is at work here."""
        assert self._own_lock is not None
        for path in self._journal.glob(".*.lock"):
            if path != Path(self._own_lock.lock_file):
                try:
                    with FileLock(path, timeout=0):
                        pass
                except Timeout:
                    return False
        return True

    def _lock(self) -> FileLock:
        return FileLock(self._journal / ".lock")

    def _entries(self) -> Iterator[Entry]:
        for path in sorted(self._journal.glob("*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        yield from json.loads(line)

    def _take(self, entry: Entry) -> None:
        known = self.newest.get(_identity(entry))
        if known is None or known["attempt"] <= entry["attempt"]:
            self.newest[_identity(entry)] = entry
        if "key" in entry:
            entry.setdefault("num_decode_errors", 0)  # journals of older versions do not tell
            self.by_key[entry["key"]] = entry

    def _known(self, entry: Entry) -> bool:
        known = self.newest.get(_identity(entry))
        return known is not None and all(known.get(name) == value for name, value in entry.items())

    def _checked(self, entry: Entry) -> Entry | None:
        """The entry, if its adapter is whole: its files are as they were left, or else they are all read."""
        directory = self.path / entry["adapter"]
        stamp = _stamp(directory)
        if stamp == entry["stamp"]:
            return entry
        if _content_hash(directory, whole=True) != entry["content_hash"]:
            logger.warning("%s is damaged or gone, and is made again", directory)
            self.by_key.pop(entry["key"], None)
            return None
        return entry | {"stamp": stamp}


def check_folder(path: Path) -> None:
    """Refuse a folder that is not a bulk run's, before anything is loaded.

    Raises:
        DatasetError: it is a file, or holds something else.
    """
    if path.exists() and not path.is_dir():
        raise DatasetError(f"{path} is a file, not a folder. Name another --output.")
    if not path.exists() or (path / STATE).exists():
        return
    # another shard may be at its beginning: it makes the journal first
    others = sorted(name for name in os.listdir(path) if not name.startswith(".") and name != JOURNAL)
    if others:
        raise DatasetError(
            f"{path} holds {others[0]!r} but no {STATE}: it is no folder of a bulk run. Name a new or empty folder."
        )


def _difference(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    name = next(name for name in {**there, **asked} if there.get(name) != asked.get(name))
    return (
        f"{path} holds adapters made with {name}={there.get(name)!r}, but {asked.get(name)!r} was asked for. Use the "
        "same settings to go on, name another folder, or overwrite to make them all again."
    )


def _identity(entry: Entry) -> tuple[Any, ...]:
    """As `BulkItem.identity`."""
    return entry["video"], entry["where"], entry["start"], entry["end"]


def _stamp(directory: Path) -> dict[str, list[int]]:
    """Size and time of an adapter's files; empty where one is missing."""
    try:
        found = {name: os.stat(directory / name) for name in storage.FILES}
    except OSError:
        return {}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def _content_hash(directory: Path, whole: bool = False) -> str | None:
    """The hash an adapter directory tells of itself; None where there is none, or (`whole`) where it is not true."""
    try:
        if whole:
            storage.read_directory(directory)
        return json.loads((directory / storage.PROVENANCE_FILE).read_text(encoding="utf-8"))["content_hash"]
    except (AdapterError, OSError, ValueError, KeyError, TypeError):
        return None


def _age(path: Path) -> float:
    """Seconds since it was written to."""
    return time.time() - path.stat().st_mtime


def _remove_fragments(directory: Path) -> None:
    """Remove what is left of an adapter without its `video2lora.json`, which nothing would replace."""
    if directory.is_dir() and not storage.is_replaceable(directory):
        if {path.name for path in directory.iterdir()} <= set(storage.FILES):
            shutil.rmtree(directory)


def _write_if_new(path: Path, data: bytes) -> None:
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)


def _jsonl(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
