"""Trainer: the folder `teach` writes: what made it, the parts of each process, and how they become one manifest."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load, save
from torch import Tensor

from .. import __version__
from ..data.errors import DatasetError
from ..data.files import remove_parts, write_atomically
from ..data.forms import video_key
from ..data.journal import Journal
from .teacher_logits import NAMES, LogitsWriter

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST, SKIPPED, STATE, PARTS, VIDEOS = "manifest.jsonl", "skipped.jsonl", "teach.json", "parts", "videos"
_PACKAGES = ("torch", "transformers", "tokenizers", "av")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeachSummary:
    """What lies in the folder of a finished `teach`.

    Attributes:
        manifest: the JSONL file of training rows.
        num_rows: its lines.
        num_queries: queries in them.
        num_generated: responses that the teacher wrote; the others were given.
        num_truncated: of these, cut at `max_new_tokens` before the teacher ended its turn.
        num_empty: of these, without any text.
        num_retokenized: of these, whose text is not tokenised as it was generated.
        num_skipped: rows left out because their video cannot be read; they are in `skipped.jsonl`, with the error.
    """

    manifest: Path
    num_rows: int
    num_queries: int
    num_generated: int
    num_truncated: int
    num_empty: int
    num_retokenized: int
    num_skipped: int

    def __str__(self) -> str:
        text = f"{self.num_rows} rows, {self.num_queries} queries, {self.num_generated} responses generated"
        text += f" ({self.num_truncated} cut at max_new_tokens, {self.num_empty} empty)"
        return f"{text}, {self.num_skipped} rows skipped.\nManifest: {self.manifest}"


class TeachFolder:
    """The output folder as one process sees it.

    Its `Journal` gets a line for each unit of work, which names the attempt, since a unit with skipped rows is done
    again once their videos can be read.

    Args:
        path: the folder.
        settings: what decides the result; another run's must be the same.
        rank: of this process.

    Raises:
        DatasetError: the folder was made with other settings, or holds a manifest that is not known to be ours.
    """

    def __init__(self, path: Path, settings: dict[str, Any], rank: int) -> None:
        self.path, self.settings, self.rank = path, settings, rank
        self.manifest, self._parts = path / MANIFEST, path / PARTS
        self._journal = Journal(self._parts, rank)
        self._state = self._check()

    @property
    def finished(self) -> bool:
        """Whether an earlier run came to its end."""
        return bool(self._state.get("counts")) and self.manifest.exists()

    def open(self, num_processes: int) -> dict[int, dict[str, Any]]:
        """Make this process's files ready, and return the lines of all units that are done.

        What a kill left of a last line is cut off. No process may work before all have come here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.rank == 0 and not self._state:
            self._save_state(None)
        self._journal.open(num_processes)
        return self._units()

    def close(self) -> None:
        """Close this process's file."""
        self._journal.close()

    def append(self, record: dict[str, Any], targets: Mapping[str, Tensor] | None) -> None:
        """Bring a unit to the disk: its logits first, then its line."""
        if targets is not None:
            write_atomically(self._logits_of(record), save(dict(targets)))
        self._journal.append(record)

    def count_bad(self, more: int) -> int:
        """Note that this process met so many more bad videos; return how many all processes of this run have met."""
        return self._journal.count_bad(more)

    def first_error(self, rows: Dataset) -> str:
        """The first row that was skipped, and why."""
        skipped = {int(row): error for unit in self._units().values() for row, error in unit["skipped"].items()}
        first = min(skipped)
        return f"row {rows[first]['id']!r}: {skipped[first]}"

    def merge(self, rows: Dataset, num_units: int, top_k: int | None, vocab_size: int) -> None:
        """Write the manifest, and beside it skipped rows and logits, in the order of the rows; then drop the parts.

        Called by one process when all are through. A kill leaves the parts, from which the same is written again.

        Raises:
            DatasetError: a unit is missing.
        """
        units = self._units()
        if missing := [number for number in range(num_units) if number not in units]:
            raise DatasetError(
                f"{self._parts} lacks units {missing[:5]}: was a file taken away? Start again to redo it."
            )
        places = {int(row): (number, row) for number, unit in units.items() for row in unit["rows"]}
        skipped = {int(row): error for unit in units.values() for row, error in unit["skipped"].items()}
        remove_parts(self.path)
        remove_parts(self._parts)
        writer = None if top_k is None else LogitsWriter(self.path, top_k, vocab_size)
        counts = dict.fromkeys(list(TeachSummary.__annotations__)[1:], 0)
        lines, left_out = [], []
        opened: tuple[int, dict[str, Tensor]] = (-1, {})
        for index, row in enumerate(rows):
            line = {name: row[name] for name in ("id", "start", "end", "queries")}
            line = {"id": line.pop("id"), "video": self._location(row["video"]), **line}
            if index in skipped:
                left_out.append(line | {"error": skipped[index]})
                continue
            number, key = places.get(index, (-1, ""))
            answers = units[number]["rows"][key] if number >= 0 else []
            line["queries"] = [dict(query) for query in row["queries"]]
            for answer in answers:
                line["queries"][answer["query"]] |= answer["result"]
            lines.append(line)
            _count(counts, line["queries"])
            if writer is not None and answers:
                if opened[0] != number:
                    opened = number, load(self._logits_of(units[number]).read_bytes())
                for answer in answers:
                    begin, end = answer["tokens"]
                    writer.add(row["id"], {name: opened[1][name][begin:end] for name in NAMES})
        if writer is not None:
            writer.close()
        counts |= {"num_rows": len(lines), "num_skipped": len(left_out)}
        if left_out:
            write_atomically(self.path / SKIPPED, _jsonl(left_out))
        write_atomically(self.manifest, _jsonl(lines))
        self._save_state(counts)
        self.drop_parts()

    def drop_parts(self) -> None:
        """Remove the parts of a finished run."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def summary(self) -> TeachSummary:
        """What a finished run left."""
        state = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        return TeachSummary(self.manifest, **state["counts"])

    def _check(self) -> dict[str, Any]:
        """What an earlier run left of itself; refused if it is of another one."""
        file = self.path / STATE
        if not file.exists():
            if found := self.manifest if self.manifest.exists() else self._journal.written():
                raise DatasetError(
                    f"{found} is there but no {STATE} beside it, so what made it is not known. Name another folder."
                )
            return {}
        state = json.loads(file.read_text(encoding="utf-8"))
        for name, value in self.settings.items():
            if (there := state["settings"].get(name)) != value:
                raise DatasetError(
                    f"{self.path} holds responses with {name}={there!r}, but {value!r} was asked for. Use the same "
                    "settings to go on, or name another folder."
                )
        if state["versions"] != _versions() and not state["counts"]:
            logger.warning("%s was begun with %s: the rest may be rounded otherwise.", self.path, state["versions"])
        return state

    def _save_state(self, counts: dict[str, int] | None) -> None:
        versions = self._state.get("versions") or _versions()
        state = {"settings": self.settings, "versions": versions, "counts": counts}
        write_atomically(self.path / STATE, json.dumps(state, indent=2, ensure_ascii=False).encode() + b"\n")

    def _units(self) -> dict[int, dict[str, Any]]:
        """The last attempt at each unit, from the complete lines of all processes, also of those of earlier runs."""
        units: dict[int, dict[str, Any]] = {}
        for _, _, line in self._journal.lines():
            record = json.loads(line)
            if record["unit"] not in units or units[record["unit"]]["attempt"] < record["attempt"]:
                units[record["unit"]] = record
        return units

    def _logits_of(self, record: Mapping[str, Any]) -> Path:
        return self._parts / f"logits-{record['unit']:08d}-{record['attempt']}.safetensors"

    def _location(self, video: Any) -> str:
        """Where the manifest finds a video from any folder; one that a row carries becomes a file."""
        if isinstance(video, Mapping) and video["bytes"] is not None:
            name = video_key(video).removeprefix("sha256:") + Path(video["path"] or "").suffix
            target = self.path / VIDEOS / name
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                write_atomically(target, video["bytes"])
            return f"{VIDEOS}/{name}"
        location = video if isinstance(video, str) else str(video["path"])
        return location if "://" in location else os.path.abspath(location)


def _count(counts: dict[str, int], queries: Sequence[Mapping[str, Any]]) -> None:
    generated = [query for query in queries if "token_ids" in query]
    counts["num_queries"] += len(queries)
    counts["num_generated"] += len(generated)
    counts["num_truncated"] += sum(query["truncated"] for query in generated)
    counts["num_retokenized"] += sum(query["retokenized"] for query in generated)
    counts["num_empty"] += sum(not query["response"] for query in generated)


def _jsonl(lines: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def _versions() -> dict[str, str]:
    return {"video2lora": __version__} | {name: version(name) for name in _PACKAGES}
