"""Efficiency: the models whose speed is measured, with real weights or with random ones at SmolVLM2's true sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, SmolVLMConfig

from ..modeling import Video2LoraConfig, Video2LoraModel, Video2LoraProcessor
from .efficiency_prompts import PromptRules, count_words
from .efficiency_results import EfficiencyError

IMAGE_TOKEN = 49190
SIZES: dict[str, dict[str, Any]] = {
    "500M": {
        "text_config": {
            "model_type": "llama", "hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15,
            "num_key_value_heads": 5, "head_dim": 64, "intermediate_size": 2560, "vocab_size": 49280,
            "rope_theta": 100000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "pad_token_id": 2,
        },
        "vision_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
                          "num_hidden_layers": 12, "patch_size": 16, "image_size": 512},
        "scale_factor": 4,
    },
    "2.2B": {
        "text_config": {
            "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
            "num_key_value_heads": 32, "head_dim": 64, "intermediate_size": 8192, "vocab_size": 49280,
            "rope_theta": 130000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "pad_token_id": 2,
        },
        "vision_config": {"hidden_size": 1152, "num_attention_heads": 16, "intermediate_size": 4304,
                          "num_hidden_layers": 27, "patch_size": 14, "image_size": 384},
        "scale_factor": 3,
    },
}  # fmt: skip
"""SmolVLM2's published configurations (500M-Video-Instruct and 2.2B-Instruct)."""

TILES_A_SIDE = 4
"""SmolVLM2's processors enlarge a frame to so many tiles (2,048 and 1,536 pixels) before they squash it to one."""


@dataclass(frozen=True)
class Subject:
    """A model to be measured, before its weights are there.

    Attributes:
        name: as it was asked for.
        weights: "random", or what they are.
        config: the base's configuration.
        rules: how its processor turns frames into tokens.
        image_processor, video_processor: of the base; no video processor where it takes no videos.
        load: makes the model on a device, the base in a dtype, ready for contexts of so many positions.
    """

    name: str
    weights: str
    config: PreTrainedConfig
    rules: PromptRules
    image_processor: Any
    video_processor: Any | None
    load: Callable[[torch.device, torch.dtype, int], Video2LoraModel]

    @property
    def trained_context(self) -> int:
        """Positions the text model was trained for."""
        return int(self.config.get_text_config().max_position_embeddings)


def size_config(size: str, max_positions: int | None = None) -> SmolVLMConfig:
    """The configuration of SmolVLM2 at a true size; with `max_positions` it takes longer contexts than trained."""
    text = dict(SIZES[size]["text_config"])
    text["max_position_embeddings"] = max(text["max_position_embeddings"], max_positions or 0)
    sizes = SIZES[size] | {"text_config": text}
    return SmolVLMConfig(**sizes, image_token_id=IMAGE_TOKEN, tie_word_embeddings=False)


def build_random(
    size: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    max_positions: int | None = None,
    **fields: Any,
) -> Video2LoraModel:
    """A model of the released recipe with random weights: the base in `dtype`, the hypernetwork in float32.

    Args:
        size: "500M" or "2.2B".
        device, dtype: of the base.
        max_positions: see [`size_config`].
        fields: of [`Video2LoraConfig`].
    """
    torch.manual_seed(0)
    with torch.device(device):
        vlm = AutoModelForImageTextToText.from_config(size_config(size, max_positions), dtype=dtype)
        model = Video2LoraModel(Video2LoraConfig(vlm_config=vlm.config, **fields), vlm=vlm)
    return _randomise(model)


def find_subject(name: str) -> Subject:
    """The model called `name`.

    Args:
        name: "500M" or "2.2B" for SmolVLM2 with random weights; or a video2lora checkpoint, or a base (which gets a
            random hypernetwork of the released recipe), as a directory or Hub id.

    Raises:
        EfficiencyError: the base does not cut images into tiles, so that there is no resolution to sweep.
        OSError: there is no such model.
    """
    if name in SIZES:
        return _sized(name)
    values, _ = PreTrainedConfig.get_config_dict(name)
    if values.get("model_type") == Video2LoraConfig.model_type:
        config = Video2LoraConfig.from_pretrained(name).vlm_config
        processor = Video2LoraProcessor.from_pretrained(name).vlm_processor
        weights, load = "checkpoint", _load_checkpoint
    else:
        config, processor = AutoConfig.from_pretrained(name), AutoProcessor.from_pretrained(name)
        weights, load = "base, with a random hypernetwork", _load_base
    images: Any = getattr(processor, "image_processor", None)
    token_id = getattr(config, "image_token_id", None)
    if not hasattr(images, "do_image_splitting") or token_id is None:
        raise EfficiencyError(
            f"{name} ({config.model_type}) does not cut images into tiles: a sweep over resolutions is for the "
            "SmolVLM and Idefics3 families."
        )
    tokenizer = processor.tokenizer
    rules = PromptRules(
        int(images.max_image_size["longest_edge"]),
        int(processor.image_seq_len),
        token_id,
        lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )
    videos = getattr(processor, "video_processor", None)
    return Subject(name, weights, config, rules, images, videos, lambda *where: load(name, *where))


def _sized(size: str) -> Subject:
    from transformers import SmolVLMImageProcessor, SmolVLMVideoProcessor

    config = size_config(size)
    vision: Any = config.vision_config
    tile = vision.image_size
    edges = {"size": {"longest_edge": TILES_A_SIDE * tile}, "max_image_size": {"longest_edge": tile}}
    half = [0.5, 0.5, 0.5]
    common: dict[str, Any] = edges | {"resample": 1, "image_mean": half, "image_std": half, "do_convert_rgb": True}
    rules = PromptRules(tile, (tile // vision.patch_size // config.scale_factor) ** 2, IMAGE_TOKEN, count_words)
    images, videos = SmolVLMImageProcessor(**common), SmolVLMVideoProcessor(**common)

    def load(device: torch.device, dtype: torch.dtype, max_positions: int) -> Video2LoraModel:
        return build_random(size, device, dtype, max_positions)

    return Subject(size, "random", config, rules, images, videos, load)


def _load_checkpoint(name: str, device: torch.device, dtype: torch.dtype, _positions: int) -> Video2LoraModel:
    return Video2LoraModel.from_pretrained(name, dtype=dtype).to(device)


def _load_base(name: str, device: torch.device, dtype: torch.dtype, _positions: int) -> Video2LoraModel:
    return _randomise(Video2LoraModel.from_vlm(name, dtype=dtype).to(device))


def _randomise(model: Video2LoraModel) -> Video2LoraModel:
    """Let a fresh hypernetwork's adapters change something."""
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler, std=0.02)
    return model.eval()
