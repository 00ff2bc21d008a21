"""Clips made with PyAV whose every frame carries its own number, so that a test can prove it got the right one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8
CELL = 16
WIDTH, HEIGHT = BITS * CELL, 64
VFR_MS = [0, 40, 80, 500, 510, 520, 1700, 1733, 1766, 1800, 3000, 3040]


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture [height, width, 3] with `number` as black and white cells along its top, red left and blue right."""
    image = np.full((height, width, 3), 90, dtype=np.uint8)
    image[CELL:, : width // 2] = (200, 40, 40)
    image[CELL:, width // 2 :] = (40, 40, 200)
    for bit in range(BITS):
        image[:CELL, bit * CELL : (bit + 1) * CELL] = 255 * (number >> bit & 1)
    return image


def number_in(image: np.ndarray) -> int:
    """The number that `picture` drew, also in a shrunk copy."""
    height, width = image.shape[:2]
    row = image[int(CELL / 2 * height / HEIGHT), :, :].mean(axis=-1)
    return sum(int(row[int((bit + 0.5) * width / BITS)] > 127) << bit for bit in range(BITS))


def numbers_in(frames: np.ndarray) -> list[int]:
    """The numbers of all frames [T, H, W, 3]."""
    return [number_in(frame) for frame in frames]


def write_clip(
    path: Path,
    num_frames: int = 50,
    *,
    codec: str = "libx264",
    pts: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    gop_size: int = 10,
    b_frames: int = 2,
    rotation: float | None = None,
    mirrored: bool = False,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    container_format: str | None = None,
    seed: int | None = None,
) -> Path:
    """A clip of `num_frames` numbered pictures; `pts` in units of `time_base`, default 0, 1, 2, ...

    `seed` fills the lower part with noise, so that frames have bytes worth damaging.
    """
    noise = np.random.default_rng(seed)
    with av.open(str(path), "w", format=container_format, container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=1 / time_base)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        stream.codec_context.time_base = time_base
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop_size, b_frames
        if codec == "libx264":
            stream.options = {"sc_threshold": "0", "crf": "18", **(options or {})}
        elif options:
            stream.options = options
        if rotation is not None or mirrored:
            stream.set_display_rotation(rotation or 0, hflip=mirrored)
        for i in range(num_frames):
            image = picture(i)
            if seed is not None:
                image[CELL:] = noise.integers(0, 256, image[CELL:].shape)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = (i if pts is None else pts[i]), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path, cover: bool = False) -> Path:
    """A second of silence, with a cover picture if asked."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        image = None
        if cover:
            image = container.add_stream("mjpeg", rate=1)
            image.width, image.height, image.pix_fmt = 64, 64, "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
            container.mux(image.encode(frame.reformat(format="yuvj420p")))
        for i in range(8):
            block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            block.sample_rate, block.pts = 8000, i * 1024
            container.mux(sound.encode(block))
        container.mux(sound.encode())
    return path


def decode_all(path: str | Path | bytes) -> list[tuple[float, np.ndarray]]:
    """Naively decode every frame of the best video stream: (seconds from the first, pixels as stored)."""
    with av.open(io.BytesIO(path) if isinstance(path, bytes) else str(path)) as container:
        stream = container.streams.best("video")
        stream.thread_count = 1
        frames = []
        for packet in container.demux(stream):
            try:
                frames += [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in packet.decode()]
            except av.FFmpegError:
                continue
        base = float(stream.time_base)
        return [((pts - frames[0][0]) * base, pixels) for pts, pixels in frames]
