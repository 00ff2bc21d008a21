"""Checks a dataset before training: what is wrong, in which row, and how many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from .forms import PLACEHOLDERS, ParsedRow, parse_row, video_key
from .report import DatasetReport, Problem
from .sources import Record, open_source

# Seconds a span may end after the video before it is worth a word: metadata often has whole seconds only.
_END_TOLERANCE = 1.0
_TINY = 16  # pixels; frames that are decoded only to see whether they decode

__all__ = ["DatasetReport", "Problem", "check_rows"]


@dataclass
class _Use:
    """A row that uses a video."""

    row: int
    id: str
    where: str
    start: float | None
    end: float | None


@dataclass
class _Finding:
    """What opening a video told."""

    error: str | None = None
    duration: float | None = None
    num_decode_errors: int = 0


@dataclass
class _Video:
    """A video and the rows that use it; `finding` is set at once for bytes, which are not kept."""

    uses: list[_Use] = field(default_factory=list)
    finding: _Finding | None = None
    missing: bool = False


def check_rows(
    source: Any,
    *,
    split: str | None = None,
    video_root: str | Path | None = None,
    decode: Literal["none", "probe", "full"] = "probe",
    limit: int | None = None,
    num_workers: int = 4,
) -> DatasetReport:
    """Check rows before training; a bad row or video never raises, it is reported.

    Reported kinds: "unreadable_row" (not JSON), "missing_field", "wrong_type", "ambiguous", "bad_conversation",
    "empty_prompt", "empty_response", "bad_span" (negative, or start not before end), "duplicate_id", "missing_file",
    "unreadable_video", "span_outside_video"; and as warnings "end_after_video" (more than a second; it is cut),
    "damaged_video" (part of it decodes) and "placeholder" (`<video>` or `<image>` in a prompt, though an adapter's
    prompt has no visual tokens).

    Args:
        source: as for `load_rows`, or what it returned. Streaming datasets are read to their end, or to `limit`.
        split: as for `load_rows`.
        video_root: as for `load_rows`.
        decode: "none" only looks whether local files exist; "probe" opens each video (URLs are downloaded) and reads
            its packets; "full" decodes all its frames. A video is opened once, however many rows use it.
        limit: check only the first rows.
        num_workers: threads that open videos.

    Raises:
        DatasetError: the source itself cannot be opened.
        ValueError: `decode`, `limit` or `num_workers` make no sense.
    """
    if decode not in ("none", "probe", "full"):
        raise ValueError(f"decode={decode!r}, expected 'none', 'probe' or 'full'.")
    if num_workers < 1 or (limit is not None and limit < 0):
        raise ValueError(f"num_workers={num_workers} must be at least 1 and limit={limit} not negative.")
    opened = open_source(source, split=split, video_root=video_root)
    report, examine = DatasetReport(decode=decode), _examiner(decode)
    videos: dict[str, _Video] = {}
    _check_records(islice(opened.records(), limit), report, videos, examine)
    report.num_videos = len(videos)
    _examine(videos, examine, num_workers)
    for key, video in videos.items():
        _report_video(key, video, report)
    report.problems.sort(key=lambda problem: problem.row)
    return report


def _check_records(
    records: Iterable[Record], report: DatasetReport, videos: dict[str, _Video], examine: Callable[[Any], _Finding]
) -> None:
    first_with: dict[str, str] = {}
    for index, record in enumerate(tqdm(records, desc="Checking rows", unit="row", disable=None)):
        report.num_rows += 1
        if record.error is not None:
            report.problems.append(Problem(index, "", "", "unreadable_row", record.error, record.where))
            continue
        parsed = parse_row(record.row, record.root)
        _check_content(parsed)
        if parsed.id_given and parsed.id in first_with:
            parsed.report("id", "duplicate_id", f"id {parsed.id!r} was already that of {first_with[parsed.id]}")
        elif parsed.id_given:
            first_with[parsed.id] = record.where
        for found in parsed.problems:
            problem = Problem(index, parsed.id, found.field, found.kind, found.message, record.where)
            report.problems.append(problem)
        report.num_queries += len(parsed.queries)
        report.num_missing_responses += sum(query["response"] is None for query in parsed.queries)
        if parsed.video is not None:
            video = videos.setdefault(video_key(parsed.video), _Video())
            video.uses.append(_Use(index, parsed.id, record.where, parsed.start, parsed.end))
            if not isinstance(parsed.video, str) and parsed.video["bytes"] is not None and video.finding is None:
                video.finding = examine(parsed.video)


def _check_content(parsed: ParsedRow) -> None:
    """Problems of rows that are in a known form but cannot be trained on."""
    for i, query in enumerate(parsed.queries):
        number = f"[{i}]" if len(parsed.queries) > 1 else ""
        for name in ("prompt", "response"):
            text = query[name]
            if text is not None and not text.strip():
                parsed.report(f"{name}{number}", f"empty_{name}", f"{name}{number} is empty")
        if query["prompt"] and any(mark in query["prompt"] for mark in PLACEHOLDERS):
            message = f"prompt{number} contains {' or '.join(PLACEHOLDERS)}, but an adapter's prompt is text only"
            parsed.report(f"prompt{number}", "placeholder", message)
    start, end = parsed.start, parsed.end
    for name, value in (("start", start), ("end", end)):
        if value is not None and value < 0:
            parsed.report(name, "bad_span", f"{name} is {value} s, expected 0 or more")
    if end is not None and (start or 0) >= end >= 0:
        parsed.report("start", "bad_span", f"start {start or 0} s is not before end {end} s")


def _examiner(decode: str) -> Callable[[Any], _Finding]:
    """What opens one video and tells what was found; it never raises."""

    def examine(video: Any) -> _Finding:
        from video2lora.video import VideoReader, probe_video

        try:
            if decode == "none":
                return _Finding()
            if decode == "probe":
                return _Finding(duration=probe_video(video).duration)
            with VideoReader(video, longest_edge=_TINY) as reader:
                frames = reader.sample()
            return _Finding(duration=frames.duration, num_decode_errors=frames.num_decode_errors)
        except Exception as error:  # whatever a file does to the decoder, the check goes on
            return _Finding(error=f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")

    return examine


def _examine(videos: dict[str, _Video], examine: Callable[[Any], _Finding], num_workers: int) -> None:
    pending = []
    for key, video in videos.items():
        if video.finding is None:
            video.missing = not _exists(key)
            if not video.missing:
                pending.append(key)
    with ThreadPoolExecutor(num_workers) as pool:
        findings = pool.map(examine, pending)
        bar = tqdm(findings, total=len(pending), desc="Checking videos", unit="video", disable=None)
        for key, finding in zip(pending, bar, strict=True):
            videos[key].finding = finding


def _exists(location: str) -> bool:
    return "://" in location or os.path.isfile(location)


def _report_video(key: str, video: _Video, report: DatasetReport) -> None:
    finding = video.finding or _Finding()
    for use in video.uses:

        def problem(field: str, kind: str, message: str, use: _Use = use) -> None:
            report.problems.append(Problem(use.row, use.id, field, kind, message, use.where))

        if video.missing:
            problem("video", "missing_file", f"there is no file {key}")
            continue
        if finding.error is not None:
            problem("video", "unreadable_video", finding.error)
            continue
        if finding.num_decode_errors:
            message = f"{finding.num_decode_errors} packets or frames of {key} do not decode; the rest does"
            problem("video", "damaged_video", message)
        duration = finding.duration
        if duration is None:
            continue
        if use.start is not None and use.start >= duration:
            problem(
                "start", "span_outside_video", f"start {use.start} s is not before the video's end, {duration:.3f} s"
            )
        elif use.end is not None and use.end > duration + _END_TOLERANCE:
            problem("end", "end_after_video", f"end {use.end} s is after the video's end, {duration:.3f} s")
