"""Benchmark helpers: models of the true SmolVLM2 sizes with random weights, synthetic inputs, honest timing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, SmolVLMConfig

from video2lora.modeling import Video2LoraConfig, Video2LoraModel

IMAGE_TOKEN, TEXT_TOKENS_A_FRAME = 49190, 9  # "\nFrame from 00:00:" and the three tokens around the image's
CONFIGS: dict[str, dict[str, Any]] = {
    "500M": {
        "text_config": {
            "model_type": "llama", "hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15,
            "num_key_value_heads": 5, "head_dim": 64, "intermediate_size": 2560, "vocab_size": 49280,
            "rope_theta": 100000.0, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "pad_token_id": 2,
        },
        "vision_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
                          "num_hidden_layers": 12, "patch_size": 16, "image_size": 512},
        "scale_factor": 4,
    },
    "2.2B": {
        "text_config": {
            "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
            "num_key_value_heads": 32, "head_dim": 64, "intermediate_size": 8192, "vocab_size": 49280,
            "rope_theta": 130000.0, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "pad_token_id": 2,
        },
        "vision_config": {"hidden_size": 1152, "num_attention_heads": 16, "intermediate_size": 4304,
                          "num_hidden_layers": 27, "patch_size": 14, "image_size": 384},
        "scale_factor": 3,
    },
}  # fmt: skip


def build(size: str, device: str = "cuda", **fields: Any) -> Video2LoraModel:
    """A model of the released recipe with random weights: the base in bfloat16, the hypernetwork in float32."""
    config = SmolVLMConfig(**CONFIGS[size], image_token_id=IMAGE_TOKEN, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device):
        vlm = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model = Video2LoraModel(Video2LoraConfig(vlm_config=vlm.config, **fields), vlm=vlm)
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler, std=0.02)
    return model.eval()


def video_inputs(size: str, frames: int, videos: int = 1, device: str = "cuda") -> dict[str, torch.Tensor]:
    """Inputs as SmolVLM2's processor makes them: one tile and its tokens a frame, text between and around."""
    vision = CONFIGS[size]["vision_config"]
    side = vision["image_size"]
    image_tokens = (side // vision["patch_size"] // CONFIGS[size]["scale_factor"]) ** 2
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
