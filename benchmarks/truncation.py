"""Benchmark: what fewer ranks cost in answers, on the trained moving-shapes model, which a CPU is enough for.

python benchmarks/truncation.py [--clips 64] [--json FILE] [--plot docs/truncation.png]

Test clips of 96 frames become adapters, whole (12 frames) and in chunks (12 each). Each adapter is reduced to ever
fewer ranks, as a whole and with its segments kept apart, and asked everything that the hypernetwork was trained to be
asked; right is right to the letter, greedily.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sizes import table
from tqdm import tqdm
from transformers import pipeline

import video2lora
from video2lora.adapters import VideoAdapter
from video2lora.data.moving_shapes import TASKS, MovingShapes
from video2lora.evaluation.metrics_text import exact_match

CHECKPOINT = Path(__file__).parents[1] / "examples" / "moving_shapes" / "checkpoint"
NEVER_ASKED = ("existence", "size")  # in the hypernetwork's training
LONG = ("caption", "summary")
FRAMES = 96
CHUNKS = {1: (14, 12, 10, 8, 6, 4), 2: (20, 16, 14, 12, 10, 8), 4: (32, 24, 20, 16, 12, 8), 8: (56, 40, 32, 24, 16, 8)}
HEADER = ["chunks", "rank", "of its own", "segments kept apart", "error", "short questions", "captions"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    pipe = pipeline("video-to-lora", model=str(options.checkpoint), num_frames=12, device="cpu")
    pipe.model.vlm.float()
    shapes = MovingShapes("test", options.clips, num_frames=FRAMES, tasks=[t for t in TASKS if t not in NEVER_ASKED])
    found = [row for chunks in CHUNKS for row in measure(pipe, shapes, chunks)]
    if options.json:
        document = {"clips": options.clips, "versions": versions(), "rows": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(found, options.plot)
    print(table(HEADER, [cells(row) for row in found]))


def measure(pipe: Any, shapes: MovingShapes, chunks: int) -> list[dict[str, Any]]:
    """A row for each rank and way of truncating, the untouched adapters first."""
    rows = [shapes[i] for i in range(len(shapes))]
    split = {"chunk_seconds": FRAMES / chunks} if chunks > 1 else {}  # frames in memory are a second apart
    adapters = [pipe(row["video"], **split) for row in tqdm(rows, disable=None, desc=f"{chunks} chunks")]
    full = adapters[0].rank
    found = []
    static = adapters[0].static_rank
    for rank, apart in tqdm(list(ways(full, static, chunks)), disable=None, desc=f"{chunks} chunks, truncated"):
        pairs = [adapter.truncate(rank, keep_segments=apart) for adapter in adapters]
        right = answered(pipe, rows, [adapter for adapter, _ in pairs])
        row = {"chunks": chunks, "rank": rank, "full_rank": full, "keep_segments": apart}
        found.append(row | {"error": statistics.median(error for _, error in pairs)} | right)
    return found


def ways(full: int, static: int, chunks: int) -> Iterator[tuple[int, bool]]:
    """Each rank to truncate to, its own first, and whether segments are kept apart."""
    yield full, False
    for rank in CHUNKS[chunks]:
        yield rank, False
        if chunks > 1 and rank >= chunks + static:  # the part common to all videos is kept
            yield rank, True


@torch.no_grad()
def answered(pipe: Any, rows: list[dict[str, Any]], adapters: list[VideoAdapter]) -> dict[str, float]:
    """Share of right answers to short questions, summaries and captions, and how many short questions there were."""
    model, processor = pipe.model, pipe.processor
    asked = [(query, adapter) for row, adapter in zip(rows, adapters, strict=True) for query in row["queries"]]
    right: dict[str, list[float]] = {"short": [], "caption": [], "summary": []}
    for kind, longest in (("short", 12), ("summary", 32), ("caption", 96)):
        part = [pair for pair in asked if (pair[0]["task"] if pair[0]["task"] in LONG else "short") == kind]
        for start in range(0, len(part), 64):
            batch = part[start : start + 64]
            questions = processor(text=[query["prompt"] for query, _ in batch])
            output = model.generate(
                **questions, adapters=[adapter for _, adapter in batch], max_new_tokens=longest, do_sample=False
            )
            answers = processor.batch_decode(output[:, questions["input_ids"].shape[1] :], skip_special_tokens=True)
            for (query, _), answer in zip(batch, answers, strict=True):
                references = [query["response"], query["response"].removeprefix("the ")]
                right[kind].append(exact_match(answer.strip(), references))
    return {name: statistics.mean(values) for name, values in right.items()} | {"num_short": len(right["short"])}


def cells(row: dict[str, Any]) -> list[str]:
    apart = "yes" if row["keep_segments"] else "no" if row["rank"] < row["full_rank"] else "untouched"
    share = row["rank"] / row["full_rank"]
    return [
        str(row["chunks"]),
        str(row["rank"]),
        f"{share:.0%}",
        apart,
        f"{row['error']:.3f}",
        f"{row['short']:.3f}",
        f"{row['caption']:.3f}",
    ]


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the rank that is kept, a panel for each number of chunks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CHUNKS), figsize=(3.2 * len(CHUNKS), 3.4), sharey=True, layout="constrained")
    for axis, chunks in zip(axes, CHUNKS, strict=True):
        of_chunks = [row for row in found if row["chunks"] == chunks]
        for apart, style in ((False, "o-"), (True, "s--")):
            rows = [r for r in of_chunks if r["keep_segments"] == apart or r["rank"] == r["full_rank"]]
            if len(rows) == 1:
                continue
            for name, told, colour in (("short", "short questions", "#0072B2"), ("caption", "captions", "#D55E00")):
                label = f"{told}, segments kept apart" if apart else told
                axis.plot([r["rank"] for r in rows], [r[name] for r in rows], style, color=colour, label=label, ms=4)
        title = "whole clip" if chunks == 1 else f"{chunks} chunks"
        axis.set(title=title, xlabel="rank", ylim=(-0.02, 1.03), xscale="log")
        ranks = sorted({r["rank"] for r in of_chunks})
        axis.set_xticks(ranks, labels=[str(rank) for rank in ranks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right to the letter")
    axes[1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


def versions() -> str:
    import transformers

    return f"video2lora {video2lora.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"


if __name__ == "__main__":
    main()
