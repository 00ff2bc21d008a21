"""Adapters: a folder of adapters found by what they were made of, so that a video is internalized once."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any

from filelock import FileLock

from . import storage
from .adapter import VideoAdapter
from .errors import AdapterError, OutputExistsError

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{64}")
_LEFTOVER_SECONDS = 3600  # a writer takes milliseconds; one that died leaves a hidden directory


class VideoAdapterStore:
    """Adapters on disk, found by a key made of everything that decides them.

    Every entry is an ordinary adapter directory, `<directory>/<first two digits>/<key>`. Any number of processes may
    read, write and be killed at once: an entry is whole or not there, and what a disk has damaged counts as not there.
    Give it to the pipeline: `internalize("clip.mp4", store=VideoAdapterStore("adapters"))`.

    Args:
        directory: made if missing.
        max_bytes: the entries that were not used for the longest time go when all together are larger (bytes on disk).

    Raises:
        AdapterError: `max_bytes` is no number above 0, or `directory` is a file.
    """

    def __init__(self, directory: str | Path, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and not (isinstance(max_bytes, Real) and 0 < max_bytes < math.inf):
            raise AdapterError(f"max_bytes must be a number of bytes above 0, or None, got {max_bytes!r}.")
        self.directory, self.max_bytes = Path(directory).expanduser().resolve(), max_bytes
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise AdapterError(f"{directory} is a file, not a directory. Choose another place.") from error
        self._lock = FileLock(self.directory / ".lock")
        self._remove_leftovers()

    @staticmethod
    def key(facts: Mapping[str, Any]) -> str:
        """The key of an adapter made with these facts: SHA-256 of their canonical JSON.

        Args:
            facts: JSON values; the pipeline's are the video's hash, the sampling, the prompt, and what identifies base
                and hypernetwork.
        """
        return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def get(self, key: str) -> VideoAdapter | None:
        """The adapter of this key, or None where there is none (or a damaged one, which is removed).

        Raises:
            OSError: it is there but cannot be read now (not allowed, too many open files).
        """
        entry = self._entry(key)
        while True:
            with _hold(entry) as is_same:
                if is_same is None:
                    return None
                try:
                    stored = storage.read_directory(entry)
                except (AdapterError, OSError) as error:
                    if not is_same():  # another process removed or replaced it meanwhile
                        continue
                    if not isinstance(error, (AdapterError, FileNotFoundError)):
                        raise
                    logger.warning("%s is damaged and is removed: %s", entry, error)
                    self.remove(key)
                    return None
            with suppress(OSError):  # gone by now, or another user's
                os.utime(entry)  # when it was used last
            return VideoAdapter(stored.weights, stored.targets, stored.base, stored.provenance)

    def put(self, key: str, adapter: VideoAdapter) -> Path:
        """Store an adapter; one that is there already under this key stays.

        Returns:
            Its directory.
        """
        entry = self._entry(key)
        try:
            adapter.save_pretrained(entry)
        except OutputExistsError:
            pass
        except OSError as error:  # from renaming where another process was faster, or the disk is full, or the like
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not entry.is_dir():
                raise
        if self.max_bytes is not None:
            self._shrink(self.max_bytes, keep=entry)
        return entry

    def remove(self, key: str) -> bool:
        """Remove an entry, at once for every reader; whether there was one."""
        entry = self._entry(key)
        aside = entry.with_name(f".{entry.name}.old-{uuid.uuid4().hex[:12]}")
        try:
            entry.rename(aside)
        except FileNotFoundError:
            return False
        shutil.rmtree(aside, ignore_errors=True)
        return True

    def __iter__(self) -> Iterator[str]:
        """The keys, sorted."""
        for folder in sorted(self.directory.glob("[0-9a-f][0-9a-f]")):
            yield from sorted(path.name for path in folder.iterdir() if _KEY.fullmatch(path.name))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._entry(key).is_dir()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of all entries."""
        return sum(size for _, size, _ in self._sizes())

    def __repr__(self) -> str:
        limit = "" if self.max_bytes is None else f" of at most {self.max_bytes}"
        return f"VideoAdapterStore({self.directory}: {len(self)} adapters, {self.nbytes}{limit} bytes)"

    def _entry(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise AdapterError(f"{key!r} is no key of a store: expected the 64 hexadecimal digits that key() returns.")
        return self.directory / key[:2] / key

    def _sizes(self) -> list[tuple[float, int, str]]:
        """(time of last use, bytes, key) of every entry."""
        found = []
        for key in self:
            entry = self._entry(key)
            try:
                size = sum(file.stat().st_size for file in entry.iterdir())
                found.append((entry.stat().st_mtime, size, key))
            except FileNotFoundError:  # removed by another process meanwhile
                continue
        return found

    def _shrink(self, max_bytes: int, keep: Path) -> None:
        """Remove what was not used for the longest time; one process at a time, so that none removes too much."""
        with self._lock:
            self._remove_leftovers()
            entries = sorted(self._sizes())
            total = sum(size for _, size, _ in entries)
            for _, size, key in entries:
                if total <= max_bytes:
                    return
                if key != keep.name:
                    self.remove(key)
                    total -= size

    def _remove_leftovers(self) -> None:
        for path in self.directory.glob("[0-9a-f][0-9a-f]/.*"):
            try:
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
            except FileNotFoundError:
                continue


@contextmanager
def _hold(entry: Path) -> Iterator[Callable[[], bool] | None]:
    """Tells, while an entry is read, whether it still is the directory that it was; None where there is none.

    An open directory's number is not given to another one. (Windows opens no directory, but it does not move one
    either of which a file is open.)
    """
    opened = None
    try:
        opened = os.open(entry, os.O_RDONLY) if os.name == "posix" else None
        before = os.stat(entry if opened is None else opened)
    except FileNotFoundError:
        yield None
        return

    def is_same() -> bool:
        try:
            return os.path.samestat(before, os.stat(entry))
        except FileNotFoundError:
            return False

    try:
        yield is_same
    finally:
        if opened is not None:
            os.close(opened)
