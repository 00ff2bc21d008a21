"""Which frames to take: pure functions from presentation times to frame indices, no decoding.

One rule underlies all of them: the frame at time t is the frame *on display* at t, the last one whose presentation
time is not after t. So variable frame rates need no special case.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from .errors import VideoSpanError

# A target this close before a frame (in seconds, or in steps of the sampling grid) is on that frame: float noise.
SNAP = 1e-6


def select_frames(
    times: np.ndarray,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    duration: float | None = None,
    tick: float = 0.0,
    source: str = "video",
) -> tuple[np.ndarray, float, float]:
    """Choose the frames of the span `[start, end)` to decode, by number, by rate, or all of them.

    - `num_frames`: targets evenly spaced from `start` to the time of the span's last frame, both included; with 1,
      the middle. On n frames of constant rate these are exactly `np.linspace(0, n - 1, num_frames).astype(int)`.
    - `fps`: targets `start`, `start + 1/fps`, ... before `end`.
    - neither: every frame of the span.

    A frame that two targets share is taken once, so a short clip gives fewer frames than asked.

    Args:
        times: [n] presentation times in seconds, ascending.
        start: seconds; the frame on display at `start` belongs to the span. None: the first frame.
        end: seconds, exclusive; cut to the end of the video. None: the end of the video.
        duration: seconds, end of the last frame's display; None when unknown.
        tick: seconds, the resolution the container rounded `times` to.
        source: the video's name, for errors.

    Returns:
        `(indices, start, end)`: ascending frame indices, and the span really used, in seconds.

    Raises:
        VideoSpanError: see `check_request`; or no frame is on display in the span.
    """
    check_request(num_frames=num_frames, fps=fps, start=start, end=end, source=source)
    first, stop, start, end = _span(times, start, end, duration, source)
    shown = times[first:stop]
    if num_frames is not None:
        chosen = _uniform(shown, start, operator.index(num_frames), tick)
    elif fps is not None:
        chosen = _at_rate(shown, start, end, fps, tick)
    else:
        chosen = np.arange(len(shown))
    return first + chosen, start, end


def check_request(
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    chunk_seconds: float | None = None,
    longest_edge: int | None = None,
    source: str = "video",
) -> None:
    """Refuse a request no video can meet, before anything is opened.

    Raises:
        VideoSpanError: both `num_frames` and `fps`, fewer than one frame or pixel, a rate or length of chunks that is
            not above 0, a time that is negative, anything that is not finite, or `start` not before `end`.
    """
    if num_frames is not None and fps is not None:
        raise VideoSpanError(f"{source}: both num_frames={num_frames} and fps={fps} were given; give one of them.")
    if num_frames is not None and not _is_count(num_frames):
        raise VideoSpanError(f"{source}: num_frames={num_frames!r}, but it must be an integer of at least 1.")
    if longest_edge is not None and not _is_count(longest_edge):
        raise VideoSpanError(
            f"{source}: longest_edge={longest_edge!r}, but it must be an integer of at least 1 (pixel)."
        )
    if fps is not None and not (is_number(fps) and fps > 0):
        raise VideoSpanError(f"{source}: fps={fps!r}, but it must be a number above 0 (frames per second).")
    if chunk_seconds is not None and not (is_number(chunk_seconds) and chunk_seconds > 0):
        raise VideoSpanError(
            f"{source}: chunk_seconds={chunk_seconds!r}, but it must be a finite number of seconds above 0. One "
            "longer than the video makes a single chunk."
        )
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (is_number(value) and value >= 0):
            raise VideoSpanError(f"{source}: {name}={value!r}, but it must be a number of seconds, 0 or more.")
    if end is not None and end <= (start or 0.0):
        raise VideoSpanError(f"{source}: end={end} s is not after start={start or 0.0} s; give start < end.")


def frame_at(times: np.ndarray, target: float) -> int:
    """Index of the frame on display at `target` seconds; -1 before the first one."""
    return int(np.searchsorted(times, target + SNAP, side="right")) - 1


def end_of_display(times: Sequence[float] | np.ndarray) -> float | None:
    """Guess when the last frame's display ends: one median gap after it; None for fewer than two frames."""
    return float(times[-1] + np.median(np.diff(times))) if len(times) > 1 else None


def is_number(value: object) -> bool:
    """Whether it is a real number, and finite."""
    return isinstance(value, Real) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    try:
        return operator.index(value) >= 1
    except TypeError:
        return False


def _span(
    times: np.ndarray, start: float | None, end: float | None, duration: float | None, source: str
) -> tuple[int, int, float, float]:
    """Frames `first` to `stop` (exclusive) are on display in the span; its start and end are cut to the video."""
    last = float(times[-1])
    limit = last if duration is None else max(duration, last)
    begin = float(times[0]) if start is None else max(float(start), float(times[0]))
    if begin > last and begin >= limit:
        raise VideoSpanError(
            f"{source}: start={start} s is outside the video, which ends at {limit:.3f} s; give an earlier start."
        )
    if end is not None and end <= times[0]:
        raise VideoSpanError(f"{source}: end={end} s is outside the video, which starts at {times[0]:.3f} s.")
    stop = len(times) if end is None else int(np.searchsorted(times, end - SNAP, side="left"))
    first = max(frame_at(times, begin), 0)
    return first, max(stop, first + 1), begin, limit if end is None else min(float(end), limit)


def _uniform(times: np.ndarray, start: float, num_frames: int, tick: float) -> np.ndarray:
    """`num_frames` targets from `start` to the last of `times`, as indices into `times`."""
    n = len(times)
    if _is_constant_rate(times, tick):
        # In units of frames the targets are exact, whatever the container's clock rounded the times to.
        gap = float(times[-1] - times[0]) / (n - 1)
        first = max(0.0, (start - float(times[0])) / gap)
        first = 0.0 if first <= _tolerance(gap, tick) / gap else first
        if num_frames == 1:
            return np.array([int((first + n - 1) / 2 + SNAP)])
        if num_frames < n:
            return np.unique(np.linspace(first, n - 1, num_frames).astype(int))
        return np.arange(int(first), n)
    last = float(times[-1])
    if num_frames == 1 or last <= start:
        return np.array([max(frame_at(times, (start + last) / 2), 0)])
    chosen = _with_target(times, start, last, (num_frames - 1) / (last - start))
    return np.append(chosen[chosen < n - 1], n - 1)


def _at_rate(times: np.ndarray, start: float, end: float, fps: float, tick: float) -> np.ndarray:
    """Targets `start + k / fps` before `end`, as indices into `times`."""
    if _is_constant_rate(times, tick):
        times = np.linspace(times[0], times[-1], len(times))
        if abs(start - times[0]) <= _tolerance(float(times[1] - times[0]), tick):
            start = float(times[0])
    chosen = _with_target(times, start, end, fps)
    return chosen if len(chosen) else np.array([0])


def _with_target(times: np.ndarray, start: float, end: float, rate: float) -> np.ndarray:
    """Indices of the frames on display at any `start + k / rate` before `end`.

    Counting the targets before each frame, instead of listing them, keeps the cost at the number of frames however
    high the rate.
    """
    shown_from = np.append(np.maximum(times, start), max(end, float(times[-1])))
    targets_before = np.ceil((shown_from - start) * rate - SNAP)
    targets_before[0] = 0
    return np.flatnonzero(np.diff(targets_before) > 0)


def _is_constant_rate(times: np.ndarray, tick: float) -> bool:
    """Whether `times` are evenly spaced but for rounding to the container's clock.

    WebM stores 24 frames per second as 0, 42, 83, 125 ms: a target meant to fall on a frame would fall just before it.
    """
    if len(times) < 2:
        return False
    even = np.linspace(times[0], times[-1], len(times))
    return bool(np.abs(times - even).max() <= _tolerance(float(even[1] - even[0]), tick))


def _tolerance(gap: float, tick: float) -> float:
    """Seconds a presentation time may be off; a coarse clock (AVI: one tick a frame) rounds nothing."""
    return (tick if tick <= gap / 4 else 0.0) + gap * SNAP
