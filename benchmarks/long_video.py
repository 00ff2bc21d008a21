"""Benchmark: memory of internalizing 10, 30 and 60 minutes of 720p H.264 in chunks; it should not grow with the video.

Each length runs in a process of its own, which first internalizes two minutes, so that what is loaded once is there;
the peak is that of the rest. What a longer video has more of is its adapter, which gets ranks with every chunk unless
`--max-rank` bounds it.

    python benchmarks/long_video.py [--size tiny|500M|2.2B] [--minutes 10 30 60] [--chunk-seconds 30] [--folder FOLDER]

`tiny` is a random model of 64 channels, for the CPU: there decoding is all the work. The others have the true sizes,
random weights and, with `--processor`, the base's own processor files. With `--unread` nothing is read: every chunk's
adapter is random, at its true size, so that a CPU can measure what is kept and composed. With `--folder` the videos
are kept there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from decoding import make_video
from sizes import build, table
from transformers import AutoProcessor

from video2lora import Video2LoraConfig, Video2LoraModel, Video2LoraProcessor, VideoToLoraPipeline
from video2lora.modeling import LoraWeights
from video2lora.testing import tiny_smolvlm

WARM_UP_MINUTES = 2


class PeakMemory:
    """The largest resident memory of this process while it is entered, looked at every 20 ms."""

    def __enter__(self) -> PeakMemory:
        self._process, self._done = psutil.Process(), threading.Event()
        self.before = self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def make_pipeline(size: str, processor: Path | None, unread: bool) -> VideoToLoraPipeline:
    """A pipeline with random weights whose adapters change something; on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if size != "tiny":
        if processor is None:
            raise SystemExit(f"pass --processor, a directory with the processor files of SmolVLM2 {size}.")
        model = build(size, device)
        vlm_processor = AutoProcessor.from_pretrained(processor)
    else:
        torch.manual_seed(0)
        vlm, vlm_processor = tiny_smolvlm(seed=0)
        config = Video2LoraConfig(vlm_config=vlm.config, latent_size=64, num_blocks=2)
        model = Video2LoraModel(config, vlm=vlm).eval()
        for scaler in model.hypernetwork.scaler_B.values():
            torch.nn.init.normal_(scaler, std=0.02)
    if unread:
        model.generate_segments = lambda input_ids, **_: random_segments(model, len(input_ids))
    wrapped = Video2LoraProcessor.from_config(model.config, vlm_processor)
    return VideoToLoraPipeline(model=model, processor=wrapped, device=device)


def random_segments(model: Video2LoraModel, count: int) -> LoraWeights:
    """What so many chunks might have become."""
    targets, rank = model.targets, model.hypernetwork.rank

    def draw(sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        layers = len(targets.layer_indices)
        return {name: torch.randn(count, layers, rank, sizes[name]) for name in targets.paths}

    return LoraWeights(draw(targets.in_features), draw(targets.out_features), 0.01, (rank,) * count)


def internalize(arguments: argparse.Namespace, minutes: int) -> dict[str, float]:
    """What one length takes, in this process."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    pipe = make_pipeline(arguments.size, arguments.processor, arguments.unread)
    options = {"chunk_seconds": arguments.chunk_seconds, "max_rank": arguments.max_rank}
    options |= {"batch_size": arguments.batch_size}
    pipe(str(arguments.folder / f"{WARM_UP_MINUTES}.mp4"), **options)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    with PeakMemory() as memory:
        adapter = pipe(str(arguments.folder / f"{minutes}.mp4"), **options)
    return {
        "minutes": minutes,
        "chunks": len(adapter.segments),
        "seconds": time.perf_counter() - start,
        "rank": adapter.rank,
        "kept_MB": adapter.nbytes / 1e6,
        "before_MB": memory.before / 1e6,
        "peak_MB": memory.peak / 1e6,
        "cuda_MB": (torch.cuda.max_memory_allocated() - held) / 1e6 if on_gpu else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", choices=["tiny", "500M", "2.2B"])
    parser.add_argument("--processor", type=Path)
    parser.add_argument("--minutes", nargs="+", type=int, default=[10, 30, 60])
    parser.add_argument("--chunk-seconds", type=float, default=30.0)
    parser.add_argument("--max-rank", type=int)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--unread", action="store_true", help="a random adapter a chunk, in place of the model's")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # this process is to do this length
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(internalize(arguments, arguments.one)))
        return
    with TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for minutes in [WARM_UP_MINUTES, *arguments.minutes]:
            make_video(folder / f"{minutes}.mp4", minutes)
        for minutes in arguments.minutes:
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--one", str(minutes)]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            print(json.dumps(result), flush=True)
            rows.append(result)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    what = f"{arguments.size}{', nothing read' if arguments.unread else ''}, {where}, torch {torch.__version__}"
    print(f"{what}, chunks of {arguments.chunk_seconds:g} s, max_rank {arguments.max_rank}")
    header = [
        "minutes",
        "chunks",
        "seconds",
        "rank",
        "adapter MB",
        "RSS before MB",
        "RSS peak MB",
        "more MB",
        "CUDA MB",
    ]
    lines = [
        [str(r["minutes"]), str(r["chunks"]), f"{r['seconds']:.1f}", str(r["rank"])]
        + [f"{value:.1f}" for value in (r["kept_MB"], r["before_MB"], r["peak_MB"], r["peak_MB"] - r["before_MB"])]
        + [f"{r['cuda_MB']:.1f}"]
        for r in rows
    ]
    print(table(header, lines))


if __name__ == "__main__":
    main()
