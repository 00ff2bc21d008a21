"""Video in: the bytes of a file that is still being written, or of a pipe, waited for as they come."""

from __future__ import annotations

import logging
import os
import queue
import stat
import threading
import time
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .errors import UnreadableVideoError
from .sources import source_name

logger = logging.getLogger(__name__)

_BLOCK = 1 << 15  # what PyAV reads at once
_BLOCKS = 64
_PAUSE_S = 0.05


class WaitingFile:
    """Reads from front to end and waits at the end for more; PyAV takes it for a file that cannot seek.

    A regular file is looked at again and again; anything else (a pipe, a socket's or process's file object) is read by
    a thread of its own, since such a read cannot be given up.

    Args:
        video: a path or a binary file object, read from where it stands.
        timeout: seconds without a byte after which it counts as ended; None: never.

    Raises:
        UnreadableVideoError: there is no such file.
    """

    def __init__(self, video: Any, timeout: float | None):
        self.name = source_name(video)
        self._timeout = timeout
        self._ended = threading.Event()
        self._file: BinaryIO | None = None  # a regular one
        self._blocks: queue.Queue[bytes | Exception | None] = queue.Queue(_BLOCKS)
        self._rest = b""
        if not isinstance(video, (str, os.PathLike)):
            threading.Thread(target=self._pump, args=(video,), daemon=True).start()
            return
        if isinstance(video, str) and video.lower().startswith("file://"):
            video = url2pathname(urlsplit(video).path)
        try:
            if stat.S_ISREG(os.stat(video).st_mode):
                self._file = open(video, "rb", buffering=0)
            else:
                threading.Thread(target=self._pump, args=(os.fspath(video),), daemon=True).start()
        except OSError as error:
            raise UnreadableVideoError(
                f"{self.name}: it cannot be opened ({error.strerror}). Check the path."
            ) from error

    def read(self, size: int = _BLOCK) -> bytes:
        """At most `size` bytes, as soon as there are any; none once it has ended.

        Raises:
            OSError: whatever the file object's own reading raised.
        """
        end = None if self._timeout is None else time.monotonic() + self._timeout
        while not self._ended.is_set():
            if block := self._take(size):
                return block
            if end is not None and time.monotonic() >= end:
                logger.info("%s: nothing came for %g s; it counts as ended.", self.name, self._timeout)
                self._ended.set()
        return b""

    def stop(self) -> None:
        """Count as ended from now on; from any thread."""
        self._ended.set()

    def close(self) -> None:
        """Close a file that was opened here; a caller's is left as it is."""
        self._ended.set()
        if self._file is not None:
            self._file.close()

    def _take(self, size: int) -> bytes:
        """What there is now or within a moment."""
        if self._file is not None:
            block = self._file.read(size)
            if not block:
                self._ended.wait(_PAUSE_S)
            return block
        if not self._rest:
            try:
                item = self._blocks.get(timeout=_PAUSE_S)
            except queue.Empty:
                return b""
            if isinstance(item, Exception):
                self._ended.set()
                raise item
            if item is None:
                self._ended.set()
                return b""
            self._rest = item
        block, self._rest = self._rest[:size], self._rest[size:]
        return block

    def _pump(self, video: Any) -> None:
        """Read a pipe into the queue, as far as there is room."""
        try:
            if isinstance(video, (str, bytes)):
                with open(video, "rb", buffering=0) as file:  # a named pipe: waits here for its writer
                    self._pump_all(file)
            else:
                self._pump_all(video)
        except Exception as error:
            self._put(error)
        else:
            self._put(None)

    def _pump_all(self, file: Any) -> None:
        read = getattr(file, "read1", file.read)  # `read` of a buffered file would wait for a whole block
        while not self._ended.is_set():
            block = read(_BLOCK)
            if block is None:  # a file that does not block, and has nothing now
                self._ended.wait(_PAUSE_S)
            elif not block:
                return
            else:
                self._put(bytes(block))

    def _put(self, item: bytes | Exception | None) -> None:
        while not self._ended.is_set():
            try:
                return self._blocks.put(item, timeout=_PAUSE_S)
            except queue.Full:
                continue
