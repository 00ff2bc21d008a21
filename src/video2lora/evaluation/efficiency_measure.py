"""Efficiency: honest clocks. CUDA events where there are any, warm-up, several runs, medians with their quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

SECONDS_A_MEASUREMENT = 1.0
"""A measurement takes no more runs once it has taken so long, but two at least."""
UNWARMED_SECONDS = 1.5
"""A run that takes so long counts although it is the first: what warming up costs is lost in it."""

Timing = dict[str, float]
"""`median`, `low` and `high` (quartiles) in seconds, and `runs`."""


class Clock:
    """Marks on the device's own timeline, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Remember this moment: when the device comes to it, all it was given before is done."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between one mark and the next; waits for the last."""
        if self.device.type == "cuda":
            self._marks[-1].synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


class PeakMemory:
    """The most device memory in use since `start`, above what was held then; None where nobody counts it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.held = device, 0

    def start(self) -> None:
        if self.device.type == "cuda":
            self.held = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def above(self, held: int | None = None) -> int | None:
        """Bytes above those held at the start, or above `held`."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device) - (self.held if held is None else held)


@dataclass(frozen=True)
class Runs:
    """The seconds between a run's marks, for each run that counts.

    Attributes:
        seconds: `[runs][marks - 1]`.
    """

    seconds: list[list[float]]

    def timing(self, start: int = 0, end: int | None = None) -> Timing:
        """Median and quartiles of what lay between mark `start` and mark `end` (the last by default)."""
        return timing([sum(run[start:end]) for run in self.seconds])


def timing(values: Sequence[float]) -> Timing:
    """Median and quartiles of times in seconds."""
    low, high = min(values), max(values)
    if len(values) > 2:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high, "runs": len(values)}


def measure(
    run: Callable[[Clock], Any], device: torch.device, repeats: int, seconds: float = SECONDS_A_MEASUREMENT
) -> Runs:
    """Time `run` several times.

    Args:
        run: does the work and marks its beginning, stages and end on the clock it is given.
        device: where the work is done.
        repeats: runs that count, at most. One before them warms up, unless it takes `UNWARMED_SECONDS`.
        seconds: see `SECONDS_A_MEASUREMENT`.
    """
    found: list[list[float]] = []
    spent, warm = 0.0, False
    while len(found) < repeats and (len(found) < min(2, repeats) or spent < seconds):
        clock = Clock(device)
        run(clock)
        times = clock.seconds()
        spent += sum(times)
        if warm or sum(times) >= UNWARMED_SECONDS:
            found.append(times)
        warm = True
    return Runs(found)


class TokenMarks(StoppingCriteria):
    """Marks the clock after every token that `generate` makes, and never stops it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._go_on: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.clock.mark()
        if self._go_on is None:
            self._go_on = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self._go_on
