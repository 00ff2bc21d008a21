"""Benchmark: what internalizing costs against the same model's own reading of the video, at true sizes on a GPU.

python benchmarks/internalize.py [--sizes 500M 2.2B] [--frames 12 64 ...] [--out FOLDER] [--profile]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from sizes import build, measure, table, video_inputs

HEADER = ["size", "frames", "videos", "tokens", "prefill ms", "GB", "internalize ms", "GB", "ratio"]


@torch.no_grad()
def run(size: str, frames: list[int], batches: list[int], profile: bool) -> list[dict]:
    """Measure every number of frames, and batches of 12-frame videos."""
    model = build(size)
    results = []
    for count, videos in [(n, 1) for n in frames] + [(12, n) for n in batches]:
        inputs = video_inputs(size, count, videos)
        repeats = 9 if count <= 128 else 3

        def prefill(inputs=inputs):
            return model.vlm(**inputs, use_cache=False, logits_to_keep=1).logits

        def internalize(inputs=inputs):
            return model.internalize(**inputs)

        row: dict = {"size": size, "frames": count, "videos": videos, "tokens": inputs["input_ids"].shape[1]}
        for name, function in [("prefill", prefill), ("internalize", internalize)]:
            try:
                row[name + "_ms"], row[name + "_spread_ms"], row[name + "_GB"] = measure(function, repeats)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                row[name + "_ms"] = row[name + "_spread_ms"] = row[name + "_GB"] = float("nan")
        row["ratio"] = row["internalize_ms"] / row["prefill_ms"]
        results.append(row)
        print(json.dumps(row), flush=True)
        if profile and (count, videos) in ((12, 1), (256, 1), (12, 8)):
            with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
                internalize()
                torch.cuda.synchronize()
            print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["500M", "2.2B"])
    parser.add_argument("--frames", nargs="+", type=int, default=[12, 64, 128, 256, 512, 1024])
    parser.add_argument("--batches", nargs="*", type=int, default=[8])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    results = []
    for size in arguments.sizes:
        results += run(size, arguments.frames, arguments.batches, arguments.profile)
        torch.cuda.empty_cache()
    versions = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}"
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "internalize.json").write_text(json.dumps({"versions": versions, "rows": results}, indent=1))
    rows = [
        [r["size"], str(r["frames"]), str(r["videos"]), str(r["tokens"])]
        + [
            f"{r['prefill_ms']:.1f}",
            f"{r['prefill_GB']:.2f}",
            f"{r['internalize_ms']:.1f}",
            f"{r['internalize_GB']:.2f}",
        ]
        + [f"{r['ratio']:.2f}"]
        for r in results
    ]
    print(versions)
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
