"""Evaluation: which questions a report shows, and the frames of their videos on one sheet each."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import write_atomically
from ..video import VideoError, VideoFrames, VideoReader
from .report_format import without_folders
from .report_numbers import RunNumbers
from .samples import Sample

FRAMES_DIR = "frames"
THUMBNAIL = 160  # pixels, the longer edge
MOST_FRAMES, PER_ROW = 12, 6
CASES = 3


def pick_cases(numbers: RunNumbers, metric: str, each: int = CASES) -> dict[str, list[int]]:
    """Choose questions by candidate minus baseline in `metric` (by the candidate's score without a baseline).

    Returns:
        Places of questions, by "best", "worst" and "median"; none twice, and in a group none of the same video while
            there are others. Where differences are equal, the benchmark's order decides.
    """
    candidate = numbers.candidate
    if candidate is None:
        return {}
    ours = numbers.rows[candidate]
    theirs = numbers.rows[numbers.baseline] if numbers.others else None
    gains: dict[int, float] = {}
    for place, row in enumerate(ours):
        score, reference = row[metric], 0.0 if theirs is None else theirs[place][metric]
        if score is not None and reference is not None:
            gains[place] = score - reference
    if not gains:
        return {}
    middle = float(np.median(list(gains.values())))
    orders = {
        "best": sorted(gains, key=lambda place: (-gains[place], place)),
        "worst": sorted(gains, key=lambda place: (gains[place], place)),
        "median": sorted(gains, key=lambda place: (abs(gains[place] - middle), place)),
    }
    used: set[int] = set()
    chosen = {}
    for name, order in orders.items():
        chosen[name] = _spread_over_videos([p for p in order if p not in used], ours, each)
        used |= set(chosen[name])
    return {name: places for name, places in chosen.items() if places}


def _spread_over_videos(order: list[int], rows: list[dict[str, Any]], each: int) -> list[int]:
    """The first places of `order`, one of each video first."""
    firsts: dict[str, int] = {}
    for place in order:
        firsts.setdefault(rows[place]["video_id"], place)
    own = list(firsts.values())
    return (own + [place for place in order if place not in set(own)])[:each]


class ClipFrames:
    """Contact sheets of a run's videos, drawn when first asked for and then kept in the run's folder.

    Args:
        folder: of the run.
        sampling: its `sampling` settings, so that the frames are those that the conditions saw.
        samples: where the videos are; None if that is not known.
    """

    def __init__(self, folder: Path, sampling: Mapping[str, Any], samples: Iterable[Sample] | None = None) -> None:
        self.folder, self.sampling, self._samples = folder, sampling, samples
        self._by_id: dict[str, Sample] | None = None

    def sheet(self, sample_id: str) -> tuple[str | None, str]:
        """The file of a sample's sheet, relative to the run's folder, and what is to be said about it."""
        file = f"{FRAMES_DIR}/{hashlib.sha256(sample_id.encode()).hexdigest()[:16]}.jpg"
        path = self.folder / file
        if path.exists():
            return file, ""
        sample = self._find(sample_id)
        if sample is None:
            return None, "Frames are not shown: it was not said where the video is."
        try:
            frames = self._read(sample)
        except VideoError as error:
            return None, f"Frames are not shown: {without_folders(str(error))}"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, contact_sheet(frames))
        return file, ""

    def _find(self, sample_id: str) -> Sample | None:
        if self._by_id is None:
            self._by_id = {sample.id: sample for sample in self._samples or ()}
        return self._by_id.get(sample_id)

    def _read(self, sample: Sample) -> VideoFrames:
        if isinstance(sample.video, VideoFrames):
            return sample.video
        with VideoReader(sample.video, longest_edge=THUMBNAIL) as reader:
            fps = self.sampling.get("fps")
            number = None if fps is not None else self.sampling["num_frames"]
            return reader.sample(num_frames=number, fps=fps, start=sample.start, end=sample.end)


def contact_sheet(frames: VideoFrames) -> bytes:
    """Up to `MOST_FRAMES` frames, evenly chosen, in rows, each with its time below: a JPEG."""
    from PIL import Image, ImageDraw, ImageFont

    total = len(frames.frames)
    chosen = sorted(set(np.linspace(0, total - 1, min(total, MOST_FRAMES)).round().astype(int).tolist()))
    pictures = [Image.fromarray(frames.frames[place]) for place in chosen]
    for picture in pictures:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    width, height = max(max(p.width for p in pictures), 60), max(p.height for p in pictures)
    columns, gap, line = min(PER_ROW, len(pictures)), 4, 14
    rows = -(-len(pictures) // columns)
    size = (columns * (width + gap) - gap, rows * (height + line + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, (place, picture) in enumerate(zip(chosen, pictures, strict=True)):
        x, y = number % columns * (width + gap), number // columns * (height + line + gap)
        sheet.paste(picture, (x, y))
        draw.text((x, y + picture.height + 1), f"{frames.timestamps[place]:.1f} s", fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()
