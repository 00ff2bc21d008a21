"""Benchmark: a training step at true sizes: videos a second, queries a second, memory a video; on one GPU or several.

python benchmarks/training.py [--sizes 500M 2.2B] [--batches 8 16 32 64] [--queries 1] [--checkpointing]
torchrun --nproc-per-node 2 benchmarks/training.py ...        (batches are those of one GPU)
"""

from __future__ import annotations

import argparse
import json
import os

import torch
from sizes import build, measure, table, video_inputs
from torch.nn.parallel import DistributedDataParallel

RANK, PROCESSES = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
HEADER = [
    "size",
    "GPUs",
    "videos a GPU",
    "queries a video",
    "checkpointing",
    "step ms",
    "videos/s",
    "queries/s",
    "GB",
    "GB a video",
]


def run(size: str, batches: list[int], queries: int, checkpointing: bool, profile: bool) -> list[list[str]]:
    """Steps of AdamW on random data: 12 frames, `queries` of 96 tokens a video with 64 labelled."""
    model = build(size)
    model.train()
    model.hypernetwork.gradient_checkpointing = checkpointing
    trained = model if PROCESSES == 1 else DistributedDataParallel(model, device_ids=[RANK], broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.hypernetwork.parameters(), lr=1e-5, fused=True)
    rows = []
    for videos in batches:
        inputs = video_inputs(size, 12, videos)
        input_ids = torch.randint(3, 49000, (videos * queries, 96), device="cuda")
        labels = input_ids.clone()
        labels[:, :32] = -100

        def step(inputs=inputs, input_ids=input_ids, labels=labels):
            output = trained(input_ids=input_ids, labels=labels, video_inputs=inputs, queries_per_video=queries)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        try:
            milliseconds, _, gigabytes = measure(step, repeats=4)
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            rows.append(
                [size, str(PROCESSES), str(videos), str(queries), str(checkpointing), "out of memory", "", "", "", ""]
            )
            continue
        rate = PROCESSES * videos / milliseconds * 1e3
        rows.append(
            [size, str(PROCESSES), str(videos), str(queries), str(checkpointing), f"{milliseconds:.0f}", f"{rate:.1f}"]
        )
        rows[-1] += [f"{rate * queries:.1f}", f"{gigabytes:.1f}", f"{gigabytes / videos:.2f}"]
        if RANK == 0:
            print(json.dumps(dict(zip(HEADER, rows[-1], strict=True))), flush=True)
        if profile and videos == batches[-1]:
            with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
                step()
                torch.cuda.synchronize()
            print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["500M", "2.2B"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.cuda.set_device(RANK)
    if PROCESSES > 1:
        torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", RANK))
    rows = []
    for size in arguments.sizes:
        rows += run(size, arguments.batches, arguments.queries, arguments.checkpointing, arguments.profile)
        torch.cuda.empty_cache()
    if RANK == 0:
        print(table(HEADER, rows))
    if PROCESSES > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
