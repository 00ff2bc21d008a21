"""Pipelines: a video's span cut into chunks; what shows nothing new is no chunk of its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..video import VideoReader
from ..video.sampling import SNAP, frame_at, select_frames

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """One chunk.

    Attributes:
        sampling: how `VideoReader.sample` reads it.
        until: seconds, where the next chunk begins or the span ends: after the chunk's own end where the picture goes
            on to stand still; None where that is not known.
    """

    sampling: dict[str, Any]
    until: float | None = None


def cut(reader: VideoReader, chunk_seconds: float, sampling: dict[str, Any]) -> list[Chunk]:
    """The chunks of a span: of its equal parts of at most `chunk_seconds` those that show something new.

    A part in which no frame comes up would be the picture that is on display once more. It is left out, and its time
    belongs to the chunk before, unless that has not sampled this picture.

    Args:
        chunk_seconds: above 0; longer than the span makes one chunk.
        sampling: `num_frames` or `fps`, and `start` and `end`.
    """
    start, end = sampling.get("start") or 0.0, sampling.get("end")
    if reader.duration is None:  # it is one frame: nothing else leaves the end open
        return [Chunk(sampling)]
    end = reader.duration if end is None else min(end, reader.duration)
    if end <= start:
        return [Chunk(sampling)]  # the reader says what is wrong with it
    # within SNAP two times are one
    count = max(int(np.ceil(round((end - start) / max(chunk_seconds, 2 * SNAP), 6))), 1)
    step = (end - start) / count

    def edge(number: int) -> float:
        return end if number == count else number * step + start

    numbers = _numbers(reader.times, start, end, step, count)
    chunks = []
    for number, following in zip(numbers, [*numbers[1:], count], strict=True):
        span = {**sampling, "start": edge(number), "end": edge(number + 1)}
        if number + 1 < following and not _is_read_to_the_end(reader, span):
            chunks.append(Chunk(span, edge(number + 1)))
            span = {**sampling, "start": edge(number + 1), "end": edge(number + 2)}
        chunks.append(Chunk(span, edge(following)))
    if 2 * len(chunks) < count:
        logger.warning(
            "%s: only %d of the %d chunks of %.3g s show a new picture; the others are left out, and their time "
            "belongs to the segments before them. Larger chunk_seconds put more pictures into each of fewer segments.",
            reader.name, len(chunks), count, step,
        )  # fmt: skip
    return chunks


def _numbers(times: np.ndarray, start: float, end: float, step: float, count: int) -> list[int]:
    """Which of the parts come up with a frame, and the first, which may begin in the middle of one; ascending."""
    times = times[(times >= start - SNAP) & (times < end - SNAP)]
    numbers = np.floor((times - start) / step).clip(0, count - 1)
    # the quotient is rounded: what counts is between which edges a frame lies
    numbers -= times < numbers * step + start - SNAP
    numbers += times >= (numbers + 1) * step + start - SNAP
    return sorted({0, *numbers.clip(0, count - 1).astype(int).tolist()})


def _is_read_to_the_end(reader: VideoReader, span: dict[str, Any]) -> bool:
    """Whether the picture that is on display where a part ends is one of its samples."""
    chosen, _, _ = select_frames(reader.times, **span, duration=reader.duration, tick=reader.tick)
    return int(chosen[-1]) >= frame_at(reader.times, span["end"])
