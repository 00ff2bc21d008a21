"""Adapters: the stretches of video in an adapter, by time and by video, and which ranks are whose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from pathlib import PurePath

from .errors import AdapterError
from .provenance import Segment

_LEAST_DIGITS = 6  # of a hash, so that it is not taken for a name


def choose_segments(
    segments: Sequence[Segment], start: float | None, end: float | None, source: str | None
) -> list[int]:
    """Places of the segments that lie, at least partly, in a time range of all videos or of one.

    Args:
        segments: of an adapter, in order.
        start, end: seconds; `end` is exclusive, None is open.
        source: name of the video (directories before it do not count), or at least 6 digits of its SHA-256.

    Raises:
        AdapterError: none lies there, their times are not known, the range is empty or no range, or several videos
            have this name.
    """
    for name, bound in (("start", start), ("end", end)):
        if bound is not None and not (isinstance(bound, Real) and math.isfinite(bound)):
            raise AdapterError(f"{name}={bound!r} is no time: expected finite seconds, or None for an open end.")
    if start is not None and end is not None and end <= start:
        raise AdapterError(f"end={end:g} s is not after start={start:g} s.")
    mine = [i for i, segment in enumerate(segments) if _is_of(segment, source)]
    hashed = [sha256 for i in mine if (sha256 := segments[i].sha256) and not _has_hash(segments[i], source)]
    videos = sorted(set(hashed))
    if source is not None and len(videos) > 1:
        hashes = ", ".join(sha256[:12] for sha256 in videos)
        raise AdapterError(
            f"{len(videos)} videos are called {PurePath(source).name}: pass the first digits of the SHA-256 of one as "
            f"source ({hashes})."
        )
    if (start is not None or end is not None) and any(
        segments[i].start is None or segments[i].end is None for i in mine
    ):
        raise AdapterError("the adapter does not say which seconds its segments are of.")
    chosen = [i for i in mine if _overlaps(segments[i], start, end)]
    if not chosen:
        known = ", ".join(map(describe, segments))
        raise AdapterError(f"no segment {_asked_for(start, end, source)}; there are: {known}.")
    return chosen


def describe(segment: Segment) -> str:
    """A segment in a few words: its video and seconds."""
    span = "" if segment.start is None or segment.end is None else f" {segment.start:g}..{segment.end:g} s"
    return f"{segment.source or 'unnamed video'}{span}"


def with_ranks(segments: Sequence[Segment], generated_rank: int) -> tuple[Segment, ...]:
    """Give every segment its ranks: the same number to each, unless they are known already.

    Raises:
        AdapterError: known ranks do not cover `generated_rank` in order, or it cannot be shared equally.
    """
    if all(segment.ranks is not None for segment in segments):
        ends = [0, *(segment.ranks[1] for segment in segments if segment.ranks)]
        starts = [segment.ranks[0] for segment in segments if segment.ranks]
        if starts != ends[:-1] or ends[-1] != generated_rank:
            raise AdapterError(
                f"the segments' ranks {[segment.ranks for segment in segments]} do not cover the {generated_rank} "
                "generated ranks in order."
            )
        return tuple(segments)
    each, rest = divmod(generated_rank, len(segments))
    if rest:
        raise AdapterError(
            f"{generated_rank} generated ranks cannot be shared equally by {len(segments)} segments; give each "
            "segment its ranks=(first, past the last)."
        )
    return tuple(replace(segment, ranks=(i * each, (i + 1) * each)) for i, segment in enumerate(segments))


def _is_of(segment: Segment, source: str | None) -> bool:
    if source is None or _has_hash(segment, source):
        return True
    return segment.source is not None and segment.source in (source, PurePath(source).name)


def _has_hash(segment: Segment, source: str | None) -> bool:
    return bool(source and segment.sha256 and len(source) >= _LEAST_DIGITS and segment.sha256.startswith(source))


def _overlaps(segment: Segment, start: float | None, end: float | None) -> bool:
    early = end is not None and segment.start is not None and segment.start >= end
    # a segment of no length (one frame) lies where it starts
    late = start is not None and segment.end is not None and segment.end <= start and segment.start != start
    return not early and not late


def _asked_for(start: float | None, end: float | None, source: str | None) -> str:
    """What was looked for, as the end of "no segment ..."."""
    video = source or "the video"
    if start is None and end is None:
        return f"is of {video}"
    if start is None:
        return f"of {video} begins before {end:g} s"
    if end is None:
        return f"of {video} goes on after {start:g} s"
    return f"lies in {start:g}..{end:g} s of {video}"
