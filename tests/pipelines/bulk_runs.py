"""What the tests of bulk runs share: a new process, and how the folder that a run leaves is read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import av

from video2lora.pipelines.bulk import BulkSummary

from ..processes import run_code
from ..video.clips import write_clip

SIZES = {"rank": 4, "latent_size": 16, "num_latents": 4, "num_blocks": 2, "num_frames": 3, "longest_edge": 64}
OPTIONS: dict[str, Any] = {"batch_size": 2, "num_workers": 2}
NAMES = ("c", "d", "e", "f", "a/clip", "b/clip", "b/long")  # in the order they are listed

RUN = """
import os, resource, signal, sys
import torch
from transformers import pipeline
import video2lora
from video2lora import VideoAdapter
from video2lora.pipelines.bulk import internalize_many
torch.set_num_threads(1)
model, videos, output, saves, limit = sys.argv[1:]
save, left = VideoAdapter.save_pretrained, int(saves)
def dying(self, *args, **kwargs):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, *args, **kwargs)
VideoAdapter.save_pretrained = dying
pipe = pipeline("video-to-lora", model=model, device="cpu")
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
print(internalize_many(pipe, videos, output, batch_size=2, num_workers=2))
torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
"""


def damaged_clip(path: Path) -> Path:
    """Two seconds of noise in groups of ten frames; of the last group two packets in the middle are zeros."""
    write_clip(path, 50, gop_size=10, b_frames=0, seed=0, options={"crf": "30"})
    with av.open(str(path)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for position, size in spans[43:45]:
        data[position : position + size] = bytes(size)
    path.write_bytes(data)
    return path


def index_of(folder: Path) -> list[dict[str, Any]]:
    return lines_of(folder / "index.jsonl")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    """All that a run leaves but its journal, which holds times."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("journal")}


def counts_of(summary: BulkSummary) -> tuple[int, int, int, int]:
    counts = summary.num_made, summary.num_from_store, summary.num_found, summary.num_skipped
    assert sum(counts) + summary.num_shared == summary.num_videos
    return counts


def run_process(
    model: Path, videos: Path, output: Path, *, saves: int = 10**6, limit: int = 0, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    return run_code(RUN, model, videos, output, saves, limit, processes=processes)
