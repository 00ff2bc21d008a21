"""Journals: what several processes bring to the disk a line of JSON at a time, whatever kills one of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import cut_torn_line


class Journal:
    """A folder to which each process appends in a file of its own, `part-RANK.jsonl`; nothing is shared meanwhile.

    A line is on the disk when `append` returns; a kill costs at most the line that was being written. Beside it,
    `bad-RANK` counts what a process could not do in this run: a byte each.

    Args:
        folder: made by `open`.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self._part, self._bad = folder / f"part-{rank:05d}.jsonl", folder / f"bad-{rank:05d}"
        self._file: Any = None

    def written(self) -> Path | None:
        """A file with something in it, of whichever process; others may be making empty ones at this moment."""
        return next((path for path in self.folder.glob("part-*") if path.stat().st_size), None)

    def open(self, num_processes: int) -> None:
        """Make this process's files ready; what a kill left of a last line is cut off, and its count is 0.

        The counts of processes there are no more are removed by the main one. No process may count before all have
        come here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for path in self.folder.glob("bad-*"):
                if int(path.name[4:]) >= num_processes:
                    path.unlink()
        self._bad.write_bytes(b"")
        cut_torn_line(self._part)
        self._file = self._part.open("ab")

    def close(self) -> None:
        """Close this process's file."""
        if self._file is not None:
            self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Bring a record to the disk."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def lines(self) -> Iterator[tuple[Path, int, bytes]]:
        """The complete lines of all processes, also of those of earlier starts: file, number from 1, and text."""
        for path in sorted(self.folder.glob("part-*.jsonl")):
            data = path.read_bytes()
            for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
                yield path, number, line

    def count_bad(self, more: int) -> int:
        """Note so many more failures of this process; return how many all processes of this run have had."""
        if more:
            with self._bad.open("ab") as file:  # their sizes are the count
                file.write(b"x" * more)
        return sum(path.stat().st_size for path in self.folder.glob("bad-*"))

    def drop_counts(self) -> None:
        """Remove the counts of all processes."""
        for path in self.folder.glob("bad-*"):
            path.unlink(missing_ok=True)
