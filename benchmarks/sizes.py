"""Benchmark helpers: models of the true SmolVLM2 sizes with random weights, synthetic inputs, honest timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from video2lora.evaluation.efficiency_models import IMAGE_TOKEN, SIZES, build_random
from video2lora.modeling import Video2LoraModel

TEXT_TOKENS_A_FRAME = 9  # about the frame's time in the prompt and the three tokens around the image's
MAX_POSITIONS = 131072  # longer than the models were trained for


def build(size: str, device: str = "cuda", **fields: Any) -> Video2LoraModel:
    """A model of the released recipe with random weights: the base in bfloat16, the hypernetwork in float32."""
    return build_random(size, device, max_positions=MAX_POSITIONS, **fields)


def video_inputs(size: str, frames: int, videos: int = 1, device: str = "cuda") -> dict[str, torch.Tensor]:
    """Inputs as SmolVLM2's processor makes them: one tile and its tokens a frame, text between and around."""
    vision = SIZES[size]["vision_config"]
    side = vision["image_size"]
    image_tokens = (side // vision["patch_size"] // SIZES[size]["scale_factor"]) ** 2
    frame = [100] * TEXT_TOKENS_A_FRAME + [IMAGE_TOKEN] * image_tokens
    row = [1] + [200] * 24 + frame * frames + [300] * 12
    input_ids = torch.tensor([row] * videos, device=device)
    pixels = torch.randn(videos, frames, 3, side, side, device=device, dtype=torch.bfloat16)
    mask = torch.ones(videos, frames, side, side, device=device, dtype=torch.bool)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
    }


def measure(run: Callable[[], Any], repeats: int, warmup: int = 2) -> tuple[float, float, float]:
    """Median and spread of a run in milliseconds by CUDA events, and its peak memory above what was held, in GB."""
    for _ in range(warmup):
        run()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), max(times) - min(times), (torch.cuda.max_memory_allocated() - held) / 1e9


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
