"""Training spans from FineVideo's metadata: one scene, two or three adjacent scenes, or the whole video.

The metadata relied on (`HuggingFaceFV/finevideo`, column `json`; its other fields are ignored):

    {"original_video_filename": "abc.mp4",           # its stem is the video's id
     "duration_seconds": 213,                         # whole seconds
     "content_metadata": {"scenes": [
         {"timestamps": {"start_timestamp": "00:00:00.000", "end_timestamp": "00:00:12.480"}, ...}, ...]}}

Column `mp4` holds the file's bytes. Kinds, shares and prompts are those of arXiv 2606.04351; how it drew within a kind
is not published.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import DatasetError
from .forms import parse_clock

KINDS = ("scene", "adjacent", "whole")
PROMPTS: Mapping[str, tuple[str, ...]] = {
    "scene": ("Describe what is happening in this scene.", "Write a short summary of this scene."),
    "adjacent": ("Summarize this video segment.", "Describe the sequence of events in this segment."),
    "whole": ("Summarize this video in 1-3 sentences.",),
}
MIXTURE = (0.6, 0.3, 0.1)
_ROUNDING = 1.0  # duration_seconds has whole seconds


@dataclass
class SpanStatistics:
    """What was drawn, and what was skipped and why.

    Attributes:
        num_videos: videos that gave at least one span.
        spans: how many of each kind.
        skipped: scenes, spans and videos that were left out, by reason.
        fallbacks: spans of another kind than was drawn, because the video has too few valid scenes, by the kind drawn.
    """

    num_videos: int = 0
    spans: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)

    def add(self, other: SpanStatistics) -> None:
        """Count what another one counted."""
        self.num_videos += other.num_videos
        for name in ("spans", "skipped", "fallbacks"):
            getattr(self, name).update(getattr(other, name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counts = {name: dict(getattr(self, name)) for name in ("spans", "skipped", "fallbacks")}
        return {"num_videos": self.num_videos, **counts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpanStatistics:
        """What `to_dict` gave; what is missing counts as 0."""
        counts = {name: Counter(values.get(name, {})) for name in ("spans", "skipped", "fallbacks")}
        return cls(values.get("num_videos", 0), **counts)


def finevideo_spans(
    source: Iterable[Mapping[str, Any]],
    *,
    seed: int,
    mixture: Sequence[float] = MIXTURE,
    spans_per_video: int = 1,
    statistics: SpanStatistics | None = None,
) -> Iterator[dict[str, Any]]:
    """Draw training spans and prompts from FineVideo's metadata; no video is opened or downloaded.

    A span depends on the seed and its video's own metadata alone, so sharding, skipping and resuming never change it.
    A kind that a video cannot give (it has too few valid scenes) is replaced by one it can, in their shares. The same
    span with the same prompt is drawn once a video, so with many spans a video the few whole-video rows thin out.

    Args:
        source: rows with `json` (an object or a JSON string); of a `datasets` object only that column is read.
        seed: of the draws.
        mixture: shares of one scene, of two or three adjacent scenes, and of the whole video.
        spans_per_video: draws for each video.
        statistics: counted into, if given.

    Yields:
        Rows `{"id", "video_id", "start", "end", "prompt", "task_type"}` with start and end in seconds (both None for
        the whole video) and task_type one of "scene", "adjacent", "whole".

    Raises:
        DatasetError: the mixture or spans_per_video make no sense.
    """
    statistics = SpanStatistics() if statistics is None else statistics
    shares = check_mixture(mixture, spans_per_video)
    columns = getattr(source, "column_names", None)
    rows: Any = source.select_columns(["json"]) if columns and "json" in columns else source  # type: ignore[attr-defined]
    for row in rows:
        yield from video_spans(row.get("json"), seed, shares, spans_per_video, statistics)


def video_spans(
    metadata: Any, seed: int, shares: Sequence[float], spans_per_video: int, statistics: SpanStatistics
) -> list[dict[str, Any]]:
    """The rows of one video; see `finevideo_spans`. None without readable metadata."""
    metadata = _as_object(metadata)
    if metadata is None:
        statistics.skipped["video_without_metadata"] += 1
        return []
    video_id = _video_id(metadata)
    runs = _scene_runs(metadata, statistics.skipped)
    candidates = {kind: _candidates(kind, runs) for kind in KINDS}
    rows: list[dict[str, Any]] = []
    for k in range(spans_per_video):
        uniform = _Uniform(f"{seed}/{video_id}/{k}")
        kind = _choose_kind(candidates, shares, uniform, statistics)
        if kind is None:
            continue
        spans = candidates[kind]
        if kind == "adjacent":
            # First two or three, then where: else videos of many scenes would be all threes or all twos by chance.
            count = [2, 3][uniform.index("count", 2)]
            spans = [span for span in spans if span[2] == count] or spans
        start, end, _ = spans[uniform.index("span", len(spans))]
        prompt = PROMPTS[kind][uniform.index("prompt", len(PROMPTS[kind]))]
        if any((row["start"], row["end"], row["prompt"]) == (start, end, prompt) for row in rows):
            statistics.skipped["span_drawn_before"] += 1
            continue
        row = {"video_id": video_id, "start": start, "end": end, "prompt": prompt, "task_type": kind}
        rows.append({"id": f"{video_id}-{k}", **row})
        statistics.spans[kind] += 1
    statistics.num_videos += bool(rows)
    return rows


def check_mixture(mixture: Sequence[float], spans_per_video: int) -> tuple[float, ...]:
    """Shares that add up to 1.

    Raises:
        DatasetError: not three shares that are not negative and not all 0, or fewer than one span a video.
    """
    if len(mixture) != 3 or not all(math.isfinite(share) and share >= 0 for share in mixture) or not sum(mixture):
        raise DatasetError(f"mixture={tuple(mixture)}, expected three shares (scene, adjacent, whole) of 0 or more.")
    if spans_per_video < 1:
        raise DatasetError(f"spans_per_video={spans_per_video}, expected at least 1.")
    return tuple(share / sum(mixture) for share in mixture)


class _Uniform:
    """Uniform draws named by a key: the same on every machine, in any order, with any version of anything."""

    def __init__(self, key: str):
        self.key = key

    def __call__(self, name: str) -> float:
        digest = hashlib.sha256(f"{self.key}/{name}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

    def index(self, name: str, count: int) -> int:
        return int(self(name) * count)


def _choose_kind(
    candidates: Mapping[str, list[Any]], shares: Sequence[float], uniform: _Uniform, statistics: SpanStatistics
) -> str | None:
    wanted = _pick(KINDS, shares, uniform("kind"))
    if candidates[wanted]:
        return wanted
    possible = [(kind, share) for kind, share in zip(KINDS, shares, strict=True) if candidates[kind] and share]
    if not possible:
        statistics.skipped[f"no_{wanted}_in_video"] += 1
        return None
    statistics.fallbacks[wanted] += 1
    return _pick([kind for kind, _ in possible], [share for _, share in possible], uniform("fallback"))


def _pick(kinds: Sequence[str], shares: Sequence[float], u: float) -> str:
    target, reached, last = u * sum(shares), 0.0, kinds[0]
    for kind, share in zip(kinds, shares, strict=True):
        if share:
            reached, last = reached + share, kind
            if target < reached:
                break
    return last


def _candidates(kind: str, runs: list[list[tuple[float, float]]]) -> list[tuple[float | None, float | None, int]]:
    """Spans of a kind: start, end and number of scenes."""
    if kind == "whole":
        return [(None, None, 0)]
    found: list[tuple[float | None, float | None, int]] = []
    for run in runs:
        for count in (1,) if kind == "scene" else (2, 3):
            for first in range(len(run) - count + 1):
                scenes = run[first : first + count]
                found.append((scenes[0][0], max(end for _, end in scenes), count))
    return found


def _scene_runs(metadata: Mapping[str, Any], skipped: Counter[str]) -> list[list[tuple[float, float]]]:
    """Valid scenes in their order, in runs that are broken where a scene is invalid or goes back in time."""
    content = metadata.get("content_metadata")
    scenes = content.get("scenes") if isinstance(content, Mapping) else None
    duration = parse_clock(metadata.get("duration_seconds"))
    runs: list[list[tuple[float, float]]] = [[]]
    for scene in scenes if isinstance(scenes, (list, tuple)) else []:
        span = _scene_span(scene, duration)
        if isinstance(span, str):
            skipped[span] += 1
            runs.append([])
            continue
        if runs[-1] and span[0] < runs[-1][-1][0]:
            runs.append([])
        runs[-1].append(span)
    return [run for run in runs if run]


def _scene_span(scene: Any, duration: float | None) -> tuple[float, float] | str:
    """Start and end in seconds, or why there are none."""
    stamps = scene.get("timestamps") if isinstance(scene, Mapping) else None
    values = [stamps.get(name) for name in ("start_timestamp", "end_timestamp")] if isinstance(stamps, Mapping) else []
    if len(values) != 2 or any(value in (None, "") for value in values):
        return "scene_without_timestamps"
    start, end = map(parse_clock, values)
    if start is None or end is None or start < 0:
        return "scene_with_bad_timestamps"
    if start >= end:
        return "scene_without_length"
    if duration and start >= duration:
        return "scene_after_end_of_video"
    return start, min(end, duration + _ROUNDING) if duration else end


def _as_object(metadata: Any) -> Mapping[str, Any] | None:
    if isinstance(metadata, (str, bytes)):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            return None
    return metadata if isinstance(metadata, Mapping) and metadata else None


def _video_id(metadata: Mapping[str, Any]) -> str:
    """The stem of the file's name, safe as a file name; without one a hash of the metadata."""
    for name in ("original_video_filename", "original_json_filename"):
        value = metadata.get(name)
        if isinstance(value, str) and value:
            stem = re.split(r"[\\/]", value)[-1].rsplit(".", 1)[0]
            if stem.strip("."):
                return re.sub(r"[^0-9A-Za-z._-]", "_", stem)
    return hashlib.sha256(json.dumps(metadata, sort_keys=True, default=str).encode()).hexdigest()[:16]
