"""Evaluation: what judges have said, kept on disk entry by entry, so that nothing is asked (or paid for) twice."""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from pathlib import Path
from typing import Any

__all__ = ["JudgmentCache"]

logger = logging.getLogger(__name__)


class JudgmentCache:
    """Records by key, in JSON lines files of one folder.

    Every writer appends to a file of its own and syncs each line, so that threads, processes and machines may share
    the folder, and whatever kills one of them costs at most the line it was writing: a torn line is recognised and
    passed over. An instance sees what others wrote before it was made. Of several records of one key one with a score
    counts before one without, then the first in the order of file names.

    Raises:
        OSError: the folder cannot be made, read or written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.folder / f"judgments-{uuid.uuid4().hex[:12]}.jsonl"
        self._lock = threading.Lock()
        self._whole = True
        self._records: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("judgments-*.jsonl")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the record of a key, or None."""
        with self._lock:
            return self._records.get(key)

    def values(self) -> list[dict[str, Any]]:
        """Return all records."""
        with self._lock:
            return list(self._records.values())

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Keep a record, with "score" None or from 0 to 1; it is on the disk when this returns."""
        record = {"key": key, **record}
        line = json.dumps(record).encode() + b"\n"  # in ASCII, so that no cut goes through a character
        with self._lock:
            with self._file.open("ab") as file:
                if file.tell() and not self._whole:  # an earlier write failed half way, as on a full disk
                    file.write(b"\n")
                self._whole = False
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
                self._whole = True
            self._keep(record)

    def _keep(self, record: dict[str, Any]) -> None:
        known = self._records.get(record["key"])
        if known is None or (known["score"] is None and record["score"] is not None):
            self._records[record["key"]] = record

    def _read(self, path: Path) -> None:
        torn = 0
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                torn += bool(line.strip())
                continue
            if _is_record(record):
                self._keep(record)
            else:
                torn += 1
        if torn:
            logger.warning("%s: %d torn or foreign lines are passed over; what they judged is asked again", path, torn)


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("key"), str) or "score" not in value:
        return False
    score = value["score"]
    return score is None or (isinstance(score, (int, float)) and not isinstance(score, bool) and 0 <= score <= 1)
