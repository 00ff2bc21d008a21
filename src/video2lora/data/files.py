"""Writing files so that a kill at any moment leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path

PART = ".part"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, bring it to the disk, and rename it."""
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cut_torn_line(path: Path) -> None:
    """Cut off what a kill left of the last line of a journal; nothing where the file is not there."""
    if path.exists():
        data = path.read_bytes()
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            os.truncate(path, complete)


def remove_parts(folder: Path) -> int:
    """Remove what a killed `write_atomically` left in a folder; return how many files that were."""
    parts = [path for path in folder.glob(f".*{PART}") if path.is_file()]
    for path in parts:
        path.unlink()
    return len(parts)
