"""Efficiency: the folder of a sweep, written measurement by measurement and read without a model, and what follows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import cut_torn_line, write_atomically

FORMAT_VERSION = 1
SETTINGS_FILE, MEASUREMENTS_FILE = "sweep.json", "measurements.jsonl"
MUST_AGREE = ("format_version", "model", "weights", "dtype", "device", "versions", "new_tokens")
"""Settings that a sweep which goes on shares with its beginning; others (frames, sizes) may grow."""

Row = dict[str, Any]
Cost = tuple[float, float]
"""Seconds once for the video, and seconds for each question."""


class EfficiencyError(ValueError):
    """A sweep that cannot be run, gone on with or read; the message says why and what to do."""


@dataclass(frozen=True)
class Cell:
    """One number of frames at one resolution.

    Attributes:
        path: "images", cut into tiles, or "video", one tile a frame.
        frames: asked for.
        longest_edge: pixels; None on the video path.
        case: what the device does for it; cells of one case are measured once.
        tiles: of a frame.
        context_tokens, visual_tokens: of the question with the video in its context.
    """

    path: str
    frames: int
    longest_edge: int | None
    case: str
    tiles: int
    context_tokens: int
    visual_tokens: int

    @property
    def column(self) -> str:
        """What it is called in tables and plots."""
        return "video" if self.longest_edge is None else f"{self.longest_edge} px"


@dataclass
class Results:
    """The measurements of a sweep.

    Attributes:
        settings: what was asked for, and on what machine.
        cells: all of them, whether measured or not, by path, resolution and frames.
        rows: measurements by key (`device_key` and its neighbours).
    """

    settings: dict[str, Any]
    cells: list[Cell]
    rows: dict[str, Row] = field(default_factory=dict)

    def status(self, cell: Cell, condition: str) -> str:
        """ "ok", or why there is no number."""
        row = self.rows.get(device_key(cell.case, condition))
        if row is not None:
            return row["status"]
        limit = self.settings["max_tokens"]
        return f"over {limit:,} tokens" if cell.context_tokens > limit else "not measured"

    def get(self, cell: Cell, condition: str, name: str) -> Any:
        """What was measured of a condition; None where nothing was."""
        return self.rows.get(device_key(cell.case, condition), {}).get(name)

    def seconds(self, cell: Cell, condition: str, name: str = "first_token") -> float | None:
        """Median seconds of a condition in the video's context."""
        return _median(self.rows.get(device_key(cell.case, condition)), name)

    def query_seconds(self, condition: str, name: str = "first_token") -> float | None:
        """Median seconds of a condition without the video."""
        return _median(self.rows.get(query_key(condition)), name)

    def reading_seconds(self, cell: Cell) -> float | None:
        """Median seconds that decoding and preprocessing take on the CPU."""
        decode = _median(self.rows.get(decode_key(cell.frames)), "seconds")
        prepare = _median(self.rows.get(preprocess_key(cell.path, cell.frames, cell.longest_edge)), "seconds")
        return None if decode is None or prepare is None else decode + prepare

    def costs(self, cell: Cell, more_tokens: int | None = None) -> dict[str, Cost]:
        """What questions about a video take on the device, frames at hand.

        The first question with a reused cache is answered as without one, and leaves it.

        Args:
            cell: the video.
            more_tokens: of an answer after its first; `new_tokens` by default.

        Returns:
            Once for the video, and for each question, by condition; without those that were not measured.
        """
        cold, encode = (self.seconds(cell, "video_cold", name) for name in ("first_token", "encode"))
        cached, reused = (self.seconds(cell, name) for name in ("video_cached", "kv_cache"))
        tokens = self.settings["new_tokens"] if more_tokens is None else more_tokens
        rest = self.seconds(cell, "kv_cache", "per_token")
        making = self.seconds(cell, "internalize", "seconds")
        costs: dict[str, Cost] = {}
        if cold is not None and rest is not None:
            costs["video_cold"] = (0.0, cold + tokens * rest)
            if cached is not None and encode is not None:
                costs["video_cached"] = (encode, cached + tokens * rest)
            if reused is not None:
                costs["kv_cache"] = (cold - reused, reused + tokens * rest)
        for condition in ("adapter_attached", "adapter_merged"):
            first = self.query_seconds(condition)
            each = self.query_seconds(condition, "per_token")
            if making is not None and first is not None and each is not None:
                merge = self.query_seconds("adapter_merged", "merge") if condition == "adapter_merged" else 0.0
                costs[condition] = (making + (merge or 0.0), first + tokens * each)
        return costs

    def beyond_training(self, cell: Cell) -> bool:
        """Whether its context is longer than the text model was trained for."""
        return cell.context_tokens > self.settings["trained_context"]


def break_even(ours: Cost, theirs: Cost) -> int | None:
    """From how many questions on `ours` takes less time in all; None if it never does.

    Where each question takes longer but the first are nevertheless done sooner, the answer is 1.
    """
    setup, gain = ours[0] - theirs[0], theirs[1] - ours[1]
    if setup < gain:
        return 1
    return math.floor(setup / gain) + 1 if gain > 0 else None


def device_key(case: str, condition: str) -> str:
    """Key of a condition's measurement with the video on the device."""
    return f"device:{case}:{condition}"


def query_key(condition: str) -> str:
    """Key of a condition's measurement without a video."""
    return f"query:{condition}"


def decode_key(frames: int) -> str:
    """Key of the measurement of decoding."""
    return f"decode:{frames}"


def preprocess_key(path: str, frames: int, longest_edge: int | None) -> str:
    """Key of the measurement of preprocessing."""
    return f"preprocess:{path}:{frames}:{longest_edge or ''}"


class Folder:
    """A sweep's folder, to which measurements are appended one by one, each brought to the disk.

    Args:
        path: the folder; made if it does not exist.
        settings: of the sweep.
        cells: of the sweep.

    Raises:
        EfficiencyError: it holds another sweep, or one from another machine.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], cells: list[Cell]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        rows: dict[str, Row] = {}
        if (path / SETTINGS_FILE).exists():
            earlier = read_results(path)
            for name in MUST_AGREE:
                if earlier.settings[name] != settings[name]:
                    raise EfficiencyError(
                        f"{path} holds a sweep with {name} {earlier.settings[name]!r}, not {settings[name]!r}: give "
                        "another folder."
                    )
            rows = earlier.rows
            cells = cells + [cell for cell in earlier.cells if cell not in cells]
        elif (path / MEASUREMENTS_FILE).exists():
            raise EfficiencyError(f"{path} holds measurements without their {SETTINGS_FILE}: give another folder.")
        cells = sorted(cells, key=lambda cell: (cell.path, cell.longest_edge or 0, cell.frames))
        self.results = Results(dict(settings), cells, rows)
        document = dict(settings) | {"cells": [vars(cell) for cell in cells]}
        write_atomically(path / SETTINGS_FILE, json.dumps(document, indent=1).encode() + b"\n")
        cut_torn_line(path / MEASUREMENTS_FILE)

    def has(self, key: str) -> bool:
        return key in self.results.rows

    def append(self, key: str, row: Row) -> None:
        """Add a measurement."""
        row = {"key": key} | row
        with (self.path / MEASUREMENTS_FILE).open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.results.rows[key] = row


def read_results(path: Path) -> Results:
    """The results in a folder, finished or not; a last line that a kill tore is left out.

    Raises:
        EfficiencyError: there is no sweep, or a file is damaged.
    """
    try:
        settings = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))
        cells = [Cell(**cell) for cell in settings.pop("cells")]
        measurements = path / MEASUREMENTS_FILE
        data = measurements.read_bytes() if measurements.exists() else b""
        rows = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        return Results(settings, cells, {row["key"]: row for row in rows})
    except FileNotFoundError as error:
        raise EfficiencyError(f"{path} holds no sweep: there is no {SETTINGS_FILE} in it.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EfficiencyError(f"the sweep in {path} is damaged ({type(error).__name__}: {error}).") from error


def _median(row: Row | None, name: str) -> float | None:
    timing = (row or {}).get(name)
    return None if timing is None else timing["median"]
