"""Efficiency: what a video costs the CPU before the model sees it, on a real H.264 file made here."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from ..modeling import Video2LoraConfig
from ..video import load_video
from .efficiency_measure import Clock, measure
from .efficiency_models import Subject

WIDTH, HEIGHT, FPS, KEYFRAME_SECONDS = 1280, 720, 24, 2
SECONDS_A_MEASUREMENT = 0.5
PREPROCESSED_FRAMES = 24
"""More frames than these are not preprocessed but reckoned from these: each frame costs the same."""

CPU = torch.device("cpu")
Row = dict[str, Any]


def make_video(path: Path, num_frames: int) -> Row:
    """Write an H.264 file of 1,280 x 720 pixels, 24 frames a second, a key frame every 2 s: a texture that pans.

    Returns:
        What it is: size in pixels, frames, frames a second, codec, bytes.
    """
    random = np.random.default_rng(0)
    coarse = random.integers(16, 220, (HEIGHT // 8, 2 * WIDTH // 8), np.uint8)
    luma = np.kron(coarse, np.ones((8, 8), np.uint8)) + random.integers(0, 16, (HEIGHT, 2 * WIDTH), np.uint8)
    picture = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)  # yuv420p: both chroma planes lie below the luma
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        stream.options = {"preset": "veryfast", "g": str(KEYFRAME_SECONDS * FPS)}
        for index in range(num_frames):
            left = 2 * index % WIDTH
            picture[:HEIGHT] = luma[:, left : left + WIDTH]
            side = 120 + index % 64
            picture[300:420, side : side + 120] = 235
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(stream.encode())
    size = path.stat().st_size
    return {"width": WIDTH, "height": HEIGHT, "frames": num_frames, "fps": FPS, "codec": "h264", "bytes": size}


def measure_decode(video: Path, num_frames: int, longest_edge: int, repeats: int) -> Row:
    """Time reading `num_frames` frames, spread over the file and shrunk to `longest_edge` pixels, as the product does.

    Returns:
        `seconds` and `frames_used`: those really got.
    """
    used: list[int] = []

    def run(clock: Clock) -> None:
        clock.mark()
        frames = load_video(video, num_frames=num_frames, longest_edge=longest_edge)
        clock.mark()
        used.append(len(frames.timestamps))

    seconds = measure(run, CPU, repeats, SECONDS_A_MEASUREMENT).timing()
    return {"seconds": seconds, "frames_used": used[-1], "longest_edge": longest_edge}


def measure_preprocess(
    subject: Subject, video: Path, path: str, num_frames: int, longest_edge: int | None, tiles: int, repeats: int
) -> Row:
    """Time the base's own processor on `num_frames` frames, without its tokenizer (which takes a millisecond).

    Args:
        subject: whose processor.
        video: the file; its first frame is taken as often as needed.
        path: "images", resized to `longest_edge` and split into tiles, or "video".
        num_frames: above `PREPROCESSED_FRAMES` the time is reckoned from so many, and `scaled_from` says so.
        longest_edge: pixels; None on the video path, whose frames come as the recipe has them.
        tiles: of a frame, by arithmetic.
        repeats: runs at most.

    Raises:
        RuntimeError: the processor makes another number of tiles.
    """
    edge = Video2LoraConfig().longest_edge if longest_edge is None else longest_edge
    count = min(num_frames, PREPROCESSED_FRAMES)
    frames = np.repeat(load_video(video, num_frames=1, longest_edge=edge).frames, count, axis=0)
    made: list[int] = []

    def run(clock: Clock) -> None:
        clock.mark()
        if path == "video":
            clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
            assert subject.video_processor is not None
            output = subject.video_processor([clip], do_sample_frames=False, return_tensors="pt")
        else:
            options = {"size": {"longest_edge": longest_edge}, "do_image_splitting": True, "return_tensors": "pt"}
            output = subject.image_processor([list(frames)], **options)
        clock.mark()
        made.append(output["pixel_values"].shape[1])

    seconds = measure(run, CPU, repeats, SECONDS_A_MEASUREMENT).timing()
    if made[-1] != count * tiles:
        raise RuntimeError(f"{count} frames became {made[-1]} tiles, but {tiles} a frame were reckoned with.")
    if count == num_frames:
        return {"seconds": seconds}
    factor = num_frames / count
    scaled = {name: value if name == "runs" else value * factor for name, value in seconds.items()}
    return {"seconds": scaled, "scaled_from": count}
