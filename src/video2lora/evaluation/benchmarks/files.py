"""Finds a benchmark's annotations and videos in a local folder, however the repository's archives were unpacked."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .spec import BenchmarkError

VIDEO_SUFFIXES = frozenset(
    ".mp4 .webm .mkv .avi .mov .m4v .gif .mpg .mpeg .flv .wmv .3gp".split()  # lower case
)
DRAWN = "regions"  # our own clips with regions marked in them; never found as a benchmark's videos


def find_annotations(data_dir: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of the first pattern that matches, directly in the folder or anywhere below it, sorted.

    A pattern with wildcards stands for the parts of one table: all of them in one folder.
    """
    for pattern in patterns:
        for glob in (pattern, f"**/{pattern}"):
            found = sorted(path for path in data_dir.glob(glob) if path.is_file() and not _hidden(path, data_dir))
            if found:
                parts = [path for path in found if path.parent == found[0].parent]
                return parts if any(sign in pattern for sign in "*?[") else parts[:1]
    return []


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet, JSONL or JSON file; of a JSON object of objects, each with its key as `_key`.

    Raises:
        BenchmarkError: the file is none of these, or broken.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet  # type: ignore[import-untyped]

            return parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        # Not splitlines: a string may hold U+2028.
        rows = [json.loads(line) for line in text.split("\n") if line.strip()] if _is_jsonl(path) else json.loads(text)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise BenchmarkError(f"{path.name}: it cannot be read ({error}). Download it again.") from error
    if isinstance(rows, dict):
        rows = [{"_key": key, **row} if isinstance(row, dict) else row for key, row in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BenchmarkError(f"{path.name}: expected a table: a list of objects, or one object a line.")
    return rows


class VideoIndex:
    """The video files below a folder, found by name with or without folders and extension.

    Hidden folders are left out, and those of archives that are not unpacked hold nothing. Where several files have a
    name, the one whose folders agree with the annotated path is taken, then the first in alphabetical order.
    """

    def __init__(self, data_dir: Path, prefix: str = ""):
        self.data_dir, self.prefix = data_dir, prefix
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in _video_files(data_dir):
            self._by_name[path.name].append(path)
            self._by_stem[path.stem].append(path)

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def find(self, name: str) -> Path | None:
        """The file of an annotated name, or None."""
        base = os.path.basename(name)
        bases = [base] if not self.prefix or base.startswith(self.prefix) else [self.prefix + base, base]
        for base in bases:
            stem, suffix = os.path.splitext(base)
            stems = [base] if suffix.lower() not in VIDEO_SUFFIXES else [base, stem]
            for found in (self._by_name.get(base), *(self._by_stem.get(stem) for stem in stems)):
                if found:
                    return max(found, key=lambda path: _agreement(path, name))
        return None

    def expected(self, name: str) -> Path:
        """Where the file of an annotated name would be, for one that is missing."""
        base = os.path.basename(name)
        base = base if not self.prefix or base.startswith(self.prefix) else self.prefix + base
        suffix = "" if os.path.splitext(base)[1].lower() in VIDEO_SUFFIXES else ".mp4"
        return self.data_dir / "videos" / (base + suffix)


def _video_files(data_dir: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(data_dir, followlinks=True):
        top = Path(folder) == data_dir
        folders[:] = sorted(one for one in folders if not one.startswith(".") and not (top and one == DRAWN))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith("."):
                yield Path(folder, name)


def _agreement(path: Path, name: str) -> int:
    """How many parts from the end the path has in common with the annotated name."""
    ours: Sequence[str] = path.with_suffix("").parts[::-1]
    theirs: Sequence[str] = Path(name).with_suffix("").parts[::-1]
    count = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        count += 1
    return count


def _hidden(path: Path, data_dir: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(data_dir).parts)


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")
