"""Marks one subject of a video by a red rectangle drawn into its frames, as lmms-eval does for PLM-VideoBench."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ...video import UnreadableVideoError, load_video
from .files import DRAWN, find_annotations, read_rows
from .loaders import as_text
from .spec import BenchmarkError, BenchmarkSpec

_LINE = 4  # pixels
_RED = (255, 0, 0)
_VERSION = 1  # of the drawing; part of the file's name


class Regions:
    """Clips with a subject marked, drawn once each and kept in `<data_dir>/regions`.

    The metadata has a row for each subject of a video: `video`, `masklet_id` and `bbox`: for each frame in which the
    subject is to be seen (6 frames a second) left, top, right and bottom in pixels.

    Raises:
        BenchmarkError: there is no metadata of the split.
    """

    def __init__(self, spec: BenchmarkSpec, data_dir: Path, split: str):
        assert spec.annotation_fps is not None
        self.fps, self.folder, self.title = spec.annotation_fps, data_dir / DRAWN, spec.title
        names = (f"metadata/metadata_{split}.jsonl", f"metadata_{split}.jsonl")
        files = find_annotations(data_dir, names)
        if not files:
            raise BenchmarkError(
                f"{spec.title}: task 'marked' needs {names[0]}, which is not below {data_dir}. "
                f"{spec.instructions(data_dir)}"
            )
        rows = [row for file in files for row in read_rows(file)]
        self._boxes = {(as_text(row.get("video")), as_text(row.get("masklet_id"))): row.get("bbox") for row in rows}

    def clip(self, path: Path, video: str, region: str) -> Path:
        """The video with the region marked; the video itself where it cannot be read (reading it says why).

        Raises:
            BenchmarkError: the metadata does not have the region.
        """
        boxes = self._boxes.get((video, region))
        if not isinstance(boxes, Mapping):
            raise BenchmarkError(f"{self.title}: the metadata has no boxes for subject {region} of {video}.")
        target = self.folder / f"{Path(video).stem}-{region}-v{_VERSION}.mp4"
        if not target.exists():
            try:
                draw_boxes(path, {int(frame): box for frame, box in boxes.items() if box}, target, self.fps)
            except UnreadableVideoError:
                return path
        return target


def draw_boxes(path: Path, boxes: Mapping[int, Sequence[float]], target: Path, fps: float) -> None:
    """Write the video at `fps` with a box drawn into each frame that has one, by its number; target appears whole.

    Raises:
        UnreadableVideoError: the video cannot be read.
    """
    import av

    frames = load_video(path, fps=fps)
    numbers = np.rint(np.asarray(frames.timestamps) * fps).astype(int)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with av.open(str(part), "w", format="mp4") as container:
            # Nearly lossless, and no chroma subsampling: the lines are thin.
            stream: Any = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "8"})
            stream.height, stream.width = frames.frames.shape[1:3]
            stream.pix_fmt = "yuv444p"
            for picture, number in zip(frames.frames, np.maximum.accumulate(numbers), strict=True):
                frame = av.VideoFrame.from_ndarray(_with_box(picture, boxes.get(int(number))), format="rgb24")
                frame.pts = int(number)
                frame.time_base = 1 / Fraction(fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _with_box(picture: np.ndarray, box: Sequence[float] | None) -> np.ndarray:
    if box is None:
        return picture
    from PIL import Image, ImageDraw

    image = Image.fromarray(picture)
    left, top, right, bottom = box
    ImageDraw.Draw(image).rectangle([(left, top), (right, bottom)], outline=_RED, width=_LINE)
    return np.asarray(image)
