"""Benchmark: 64 frames of an hour of 720p by our `load_video`, by transformers' own PyAV loader, and by torchcodec.

The hour is made here: one minute of H.264 (30 frames a second, B-frames with a pyramid, a key frame every 250 frames)
whose packets are written once for every minute with later times. It is an ordinary file (closed groups of pictures,
times that only grow), but pictures come again after a minute; frames are taken 57 s apart, so no two are alike.

    python benchmarks/decoding.py [--minutes 60] [--num-frames 64] [--video FILE]

With `--video` the file is kept there, and found again by the next run.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import transformers
from sizes import table
from transformers.video_utils import load_video as load_with_transformers

from video2lora import load_video

RATE, SECONDS, WIDTH, HEIGHT, GOP = 30, 60, 1280, 720, 250


def make_video(path: Path, minutes: int) -> Path:
    """Write the video, unless it is there already."""
    if path.exists():
        return path
    with TemporaryDirectory() as folder:
        minute = Path(folder) / "minute.mp4"
        _encode_minute(minute)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        with av.open(str(minute)) as source, av.open(str(unfinished), "w", format="mp4") as target:
            video = source.streams.video[0]
            stream = target.add_stream_from_template(video)
            assert video.time_base is not None
            step = int(SECONDS / video.time_base)
            for number in range(minutes):
                source.seek(0)
                for packet in source.demux(video):
                    if packet.dts is None or packet.pts is None:
                        continue  # the end
                    packet.pts, packet.dts = packet.pts + number * step, packet.dts + number * step
                    packet.stream = stream
                    target.mux(packet)
        unfinished.rename(path)
    return path


def _encode_minute(path: Path) -> None:
    """A soft picture that moves past, with the frame's number in black and white cells."""
    noise = np.random.default_rng(0)
    coarse = noise.integers(30, 220, (3, HEIGHT // 40, WIDTH // 20), np.uint8)
    blurred = [
        av.VideoFrame.from_ndarray(plane, "gray").reformat(2 * WIDTH, HEIGHT, "gray", interpolation="BICUBIC")
        for plane in coarse
    ]
    luma, u, v = (plane.to_ndarray() for plane in blurred)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        stream.options = {
            "preset": "veryfast",
            "crf": "30",
            "g": str(GOP),
            "keyint_min": str(GOP),
            "sc_threshold": "0",
        }
        stream.options |= {"bf": "3", "threads": "2"}
        for index in range(RATE * SECONDS):
            left = int(WIDTH / 2 * (1 - np.cos(2 * np.pi * index / (RATE * SECONDS))))
            picture = luma[:, left : left + WIDTH].copy()
            for bit in range(11):
                picture[:64, 64 * bit : 64 * bit + 64] = 235 if index >> bit & 1 else 16
            chroma = [plane[::2, left : left + WIDTH : 2].reshape(-1, WIDTH) for plane in (u, v)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.concatenate([picture, *chroma]), "yuv420p")))
        container.mux(stream.encode())


def timed(load: Callable[[], Any], repeats: int) -> tuple[Any, float, float]:
    """What it returns, and the medians of its seconds on the clock and of all cores."""
    clock, cpu = [], []
    for _ in range(repeats):
        before, before_cpu = time.perf_counter(), time.process_time()
        result = load()
        clock.append(time.perf_counter() - before)
        cpu.append(time.process_time() - before_cpu)
    return result, float(np.median(clock)), float(np.median(cpu))


def by_transformers(path: Path, num_frames: int) -> tuple[np.ndarray, list[int]]:
    """Frames evenly spaced over the file, first and last included, by transformers' loader."""

    def chosen(metadata: Any, **_: Any) -> np.ndarray:
        return np.linspace(0, metadata.total_num_frames - 1, num_frames).astype(int)

    frames, metadata = load_with_transformers(str(path), backend="pyav", sample_indices_fn=chosen)
    return frames, [int(index) for index in metadata.frames_indices]


def by_torchcodec(path: Path, indices: list[int]) -> np.ndarray:
    """The same frames by torchcodec, at its fastest exact setting."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=0, seek_mode="exact")
    return decoder.get_frames_at(indices).data.numpy()


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Whether the pixels are the same."""
    if np.array_equal(ours, theirs):
        return "every pixel equal"
    gap = np.abs(ours.astype(np.int16) - theirs)
    return f"pixels differ by up to {gap.max()}, {gap.mean():.3f} on average"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--num-frames", type=int, default=64)
    parser.add_argument("--video", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = make_video(arguments.video or Path(folder) / "long.mp4", arguments.minutes)
        n = arguments.num_frames
        ours, seconds, cpu = timed(lambda: load_video(path, num_frames=n), 3)
        (theirs, indices), slow, slow_cpu = timed(lambda: by_transformers(path, n), 1)
        same_times = np.allclose(ours.timestamps, np.array(indices) / RATE, rtol=0, atol=1e-6)
        said = f"{difference(ours.frames, theirs)}; times {'equal' if same_times else 'DIFFER'}"
        rows = [["video2lora.load_video", f"{seconds:.2f}", f"{cpu:.2f}", "1.0", ""]]
        rows.append(["transformers (pyav)", f"{slow:.1f}", f"{slow_cpu:.1f}", f"{slow / seconds:.1f}", said])
        if find_spec("torchcodec") is not None:
            frames, other, other_cpu = timed(lambda: by_torchcodec(path, indices), 3)
            row = ["torchcodec", f"{other:.2f}", f"{other_cpu:.2f}", f"{other / seconds:.1f}"]
            rows.append([*row, difference(ours.frames, frames)])
        else:
            print("torchcodec is not installed: left out")
        size = f"{path.stat().st_size / 1e6:.0f} MB, {arguments.minutes} minutes"
    print(f"{size}, {os.cpu_count()} cores, av {av.__version__}, transformers {transformers.__version__}")
    print(table([f"{n} frames by", "seconds", "CPU seconds", "times ours", "against ours"], rows))


if __name__ == "__main__":
    main()
