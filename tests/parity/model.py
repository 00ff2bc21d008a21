"""The published implementation's stored models (README.md here says how they were made), as ours."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from video2lora.modeling import Video2LoraModel
from video2lora.modeling.published import convert_state_dict

PARITY = Path(__file__).parent


def parity_model(case: str) -> Video2LoraModel:
    """One of the stored models, `r4_down` or `r16_down`, with its weights in float32."""
    stored = json.loads((PARITY / case / "case.json").read_text())
    model = Video2LoraModel.from_vlm(
        PARITY / "tiny_vlm",
        dtype=torch.float32,
        rank=stored["lora_r"],
        target_modules=stored["target_modules_sorted"],
        latent_size=stored["latent_size"],
        num_latents=stored["n_latent_queries"],
        num_blocks=stored["num_blocks"],
    )
    assert model.config.lora_scaling == stored["lora_scaling_multiplier"]
    published = {k: v.float() for k, v in load_file(PARITY / case / "hypernet.safetensors").items()}
    widths = {"in_features": model.targets.in_features, "out_features": model.targets.out_features}
    model.hypernetwork.load_state_dict(
        convert_state_dict(published, target_modules=model.config.target_modules, **widths)
    )
    assert sum(p.numel() for p in model.hypernetwork.parameters()) == stored["hypernet_params"]
    return model
