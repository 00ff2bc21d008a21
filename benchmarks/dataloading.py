"""Benchmark: what a training row costs a CPU before the GPU sees it, and how many cores keep a GPU fed.

CPU seconds (not wall time, so a busy machine does not spoil them) of one thread for real H.264 files made here: 30 s,
1280 x 720, 25 frames a second, a key frame every 2 s.

    python benchmarks/dataloading.py --base DIRECTORY_WITH_PROCESSOR [--videos 6] [--rate 41]
"""

from __future__ import annotations

import argparse
import time
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import torch
from sizes import table
from transformers import AutoProcessor

from video2lora import Video2LoraProcessor, VideoFrames
from video2lora.video import decoder

SECONDS, RATE, WIDTH, HEIGHT = 30, 25, 1280, 720


def make_clip(path: Path, seed: int) -> None:
    """A panning textured picture with a moving square: neither trivial nor noise to a codec."""
    noise = np.random.default_rng(seed)
    picture = np.kron(noise.integers(0, 255, (HEIGHT // 8, WIDTH // 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        stream.options = {"preset": "fast", "g": str(2 * RATE)}
        for index in range(SECONDS * RATE):
            frame = np.roll(picture, 2 * index, axis=1)[:, :WIDTH].copy()
            frame[300:420, index : index + 120] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def decode_everything(processor: Video2LoraProcessor, path: Path) -> None:
    """Sample as ever, but decode the frames too that nobody asks for and no other refers to."""
    chosen, decoder._SKIPS_NONREF = decoder._SKIPS_NONREF, ()
    try:
        processor.load_video(path)
    finally:
        decoder._SKIPS_NONREF = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--rate", type=float, default=41.0, help="videos a second that a GPU trains on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    processor = Video2LoraProcessor(AutoProcessor.from_pretrained(arguments.base))
    spent: dict[str, list[float]] = {"decode and shrink 12 frames": [], "the base's processor": [], "tokens": []}
    before: list[float] = []
    size = 0
    with TemporaryDirectory() as folder:
        for number in range(arguments.videos):
            path = Path(folder) / f"{number}.mp4"
            make_clip(path, number)
            size += path.stat().st_size
            frames: list[VideoFrames] = []
            start = time.process_time()
            decode_everything(processor, path)
            before.append(time.process_time() - start)
            steps = [
                lambda path=path, frames=frames: frames.append(processor.load_video(path)),
                lambda frames=frames: processor.encode_video(frames[0]),
                lambda: processor.encode_turn("What happens in this video?", "A red square moves. " * 12),
            ]
            for name, step in zip(spent, steps, strict=True):
                start = time.process_time()
                step()
                spent[name].append(time.process_time() - start)
    # the first video also pays for imports and caches
    medians = {name: float(np.median(times[1:])) for name, times in spent.items()}
    total = sum(medians.values())
    rows = [
        [name, f"{value:.3f}", f"{value * arguments.rate:.1f}"]
        for name, value in (medians | {"together": total}).items()
    ]
    rows.append(["(decoding every frame)", f"{np.median(before[1:]):.3f}", ""])
    versions = f"torch {torch.__version__}, av {av.__version__}"
    print(f"{arguments.videos - 1} videos of {size / arguments.videos / 1e6:.1f} MB, {versions}")
    print(table(["step", "CPU seconds a video", f"cores for {arguments.rate:g} videos/s"], rows))


if __name__ == "__main__":
    main()
