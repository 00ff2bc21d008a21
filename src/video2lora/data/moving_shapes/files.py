"""Moving shapes as real H.264 files with a manifest of rows, for the paths that a user's own videos take."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError
from ..files import PART, remove_parts, write_atomically
from .dataset import check_choice
from .drawing import draw
from .language import make_queries
from .scenes import NUM_SLOTS, frame_times, make_scene

ROWS, SETTINGS, VIDEOS = "rows.jsonl", "moving_shapes.json", "videos"
_FORMAT = 1  # goes up when scenes, pixels or words change


def write_moving_shapes(
    directory: str | os.PathLike[str],
    split: str,
    num_videos: int,
    *,
    seed: int = 0,
    seconds: float = 12.0,
    fps: int = 8,
    pixels: int = 64,
    crf: int = 8,
    queries_per_video: int | None = None,
    tasks: Sequence[str] | None = None,
    phrasings: Sequence[str] = ("train",),
    max_objects: int = 4,
) -> Path:
    """Write clips as `videos/<id>.mp4` (H.264, yuv420p) and their questions as `rows.jsonl`, for [`load_rows`].

    Called again after it was stopped, it keeps the videos that are there (each was renamed into place when complete)
    and writes the rest; with a larger `num_videos` it adds to them.

    Args:
        directory: made if missing.
        num_videos: the first so many clips of the split.
        seconds, fps: their product is the number of frames, a multiple of 12 so that 12 sampled frames lie one in each
            of the clip's 12 slots.
        pixels: a side, 64 or more and even.
        crf: of the encoder: 0 loses nothing but half the resolution of colour, 18 is what videos are mostly kept at.
        split, seed, queries_per_video, tasks, phrasings, max_objects: as in [`MovingShapes`].

    Returns:
        The path of `rows.jsonl`: `{"id", "video", "start", "end", "queries"}` a line, the video relative to it.

    Raises:
        ValueError: an argument is none of these.
        DatasetError: the directory holds clips with other settings, or something else.
    """
    check_choice(split, tasks, phrasings)
    num_frames = round(seconds * fps)
    if abs(num_frames - seconds * fps) > 1e-6 or num_frames < 1 or num_frames % NUM_SLOTS:
        raise ValueError(
            f"{seconds} s at {fps} frames a second are {seconds * fps:g} frames: expected a multiple of 12."
        )
    if pixels < 64 or pixels % 2:
        raise ValueError(
            f"pixels={pixels}: expected an even number of at least 64, as colour has half the resolution."
        )
    folder = Path(directory)
    made = {"seed": seed, "seconds": seconds, "fps": fps, "pixels": pixels, "crf": crf, "max_objects": max_objects}
    _claim(folder, {"format": _FORMAT, "split": split} | made)
    lines = []
    for index in range(num_videos):
        scene = make_scene(index, split, seed=seed, max_objects=max_objects)
        name = f"{VIDEOS}/{scene.id}.mp4"
        if not (folder / name).exists():
            frames = draw([scene], frame_times(num_frames), size=pixels)[0].numpy()
            _write_video(folder / name, frames, fps, crf)
        queries = make_queries(scene, queries_per_video, tasks=tasks, phrasings=phrasings)
        asked = [{"prompt": query.prompt, "response": query.response, "task": query.task} for query in queries]
        row = {"id": scene.id, "video": name, "start": None, "end": None, "queries": asked}
        lines.append(json.dumps(row) + "\n")
    write_atomically(folder / ROWS, "".join(lines).encode())
    return folder / ROWS


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or go on in it if it was made with the same settings."""
    (folder / VIDEOS).mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if not path.exists():
        foreign = [entry for entry in folder.iterdir() if entry.name != VIDEOS and not entry.name.endswith(PART)]
        if foreign or any((folder / VIDEOS).iterdir()):
            raise DatasetError(f"{folder} holds other files and no {SETTINGS}: name a new or an empty directory.")
        write_atomically(path, json.dumps(settings, indent=2).encode())
    found = json.loads(path.read_text())
    if found != settings:
        different = sorted(key for key in found.keys() | settings if found.get(key) != settings.get(key))
        told = ", ".join(f"{key} {found.get(key)!r}, not {settings.get(key)!r}" for key in different)
        raise DatasetError(f"{folder} holds clips with {told}: name a new directory, or ask for the same.")
    remove_parts(folder)
    remove_parts(folder / VIDEOS)


def _write_video(path: Path, frames: np.ndarray, fps: int, crf: int) -> None:
    """Encode frames [T, H, W, 3] under a temporary name, and rename."""
    import av

    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with av.open(str(part), "w", format="mp4") as container:
            # Without it, x264's bytes differ from run to run, by what happens to lie in its memory.
            options = {"crf": str(crf), "x264-params": "cpu-independent=1"}
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
