"""Clips made with PyAV whose every frame carries its own number, so that a test can prove it got the right one."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from video2lora.video import compat

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
    rotation: int = 0,
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
        for i in range(num_frames):
            image = picture(i)
            if seed is not None:
                image[CELL:] = noise.integers(0, 256, image[CELL:].shape)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = (i if pts is None else pts[i]), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if rotation or mirrored:
        set_orientation(path, rotation, mirrored)
    return path


def set_orientation(path: Path, rotation: int, mirrored: bool) -> None:
    """Write a display matrix into an MP4 (ISO 14496-12 8.3.2): turned counterclockwise, and what is seen is mirrored.

    Only PyAV 17.1 and later can do it while it writes the file.
    """
    one = 1 << 16
    cos, sin = {0: (one, 0), 90: (0, one), 180: (-one, 0), -90: (0, -one)}[rotation]
    flip = -1 if mirrored else 1
    data = bytearray(path.read_bytes())
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, flip * cos, -sin, 0, flip * sin, cos, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def shift(path: Path, num_frames: int, to: Path) -> None:
    """A copy of an MP4 whose first frames, at 25 a second, lie before time 0: an edit list drops them."""
    options = {"movflags": "faststart"}
    with av.open(str(path)) as source, av.open(str(to), "w", container_options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is None:
                continue
            cut = int(num_frames / 25 / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, stream
            target.mux(packet)


def write_sound(path: Path, cover: bool = False) -> Path:
    """A second of silence, with a cover picture if asked."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        image = None
        if cover:
            image = container.add_stream("mjpeg", rate=1)
            image.width, image.height, image.pix_fmt = 64, 64, "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic.value  # PyAV below 17.1 takes only numbers
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
            container.mux(image.encode(frame.reformat(format="yuvj420p")))
        for i in range(8):
            block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            block.sample_rate, block.pts = 8000, i * 1024
            container.mux(sound.encode(block))
        container.mux(sound.encode())
    return path


def decode_all(path: str | Path | bytes) -> list[tuple[float, np.ndarray]]:
    """Naively decode every frame of the best video stream: (seconds from the first, pixels as stored).

    PyAV 15 and 16 take every video for BT.601; there the pixels come from the room's scaler, for which test_colours.py
    vouches.
    """
    with av.open(io.BytesIO(path) if isinstance(path, bytes) else str(path)) as container:
        stream = container.streams.best("video")
        stream.thread_count = 1
        scale = compat.RgbScaler(stream.codec_context.codec.canonical_name)
        frames = []
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                continue
            for frame in decoded:
                if compat._SCALES_BY_FRAME:
                    pixels = frame.to_ndarray(format="rgb24")
                else:
                    pixels = scale(frame, frame.width, frame.height, "BILINEAR").to_ndarray()
                frames.append((frame.pts, pixels))
        base = float(stream.time_base)
        return [((pts - frames[0][0]) * base, pixels) for pts, pixels in frames]
