"""Modeling: the configuration of a video-to-LoRA model."""

from __future__ import annotations

import copy
import os
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

FORMAT_VERSION = 1
INTERNALIZATION_PROMPT = "Internalize this video for later captioning."


class Video2LoraConfig(PreTrainedConfig):
    """Configuration of a [`Video2LoraModel`]: a frozen vision-language model and the hypernetwork that adapts it.

    The defaults are the released recipe (arXiv 2606.04351): rank 16 on `down_proj` of every decoder layer, latent size
    512, 8 latents, 9 perceiver blocks, 12 frames of at most 384 pixels.

    Args:
        vlm_config: the base's own configuration (any config `AutoConfig` knows), or its dict. `None` leaves the model
            without a base: enough to construct a config, not a model.
        base_model_name_or_path: Hub id or directory of the base the hypernetwork was made for.
        base_model_revision: commit hash (or branch, tag) of that base; pinned when the Hub gives one.
        bundle_base: whether this checkpoint's own weight file holds the base too.
        rank: rows the hypernetwork generates for each layer and target module. With the static part an adapter of one
            video has rank `2 * rank`.
        lora_scaling: direct multiplier `s` of `y = W x + s B^T (A x)`; `None` means `2 * rank ** 1.5`.
        target_modules: names of Linear modules inside one decoder layer, such as `down_proj`; kept sorted.
        layers_to_transform: decoder layers to adapt (and to read); `None` means all.
        use_static_lora: whether a learned rank-`rank` part common to all videos is appended.
        latent_size: width D of the perceiver.
        num_latents: learned latent vectors of the encoder.
        num_blocks: cross-attention blocks of the encoder.
        num_self_attn_per_block: self-attention layers after each of them (0 in the released models).
        num_pre_head_layers: residual MLPs before the head.
        perceiver_num_heads: query heads of every perceiver attention.
        perceiver_num_key_value_heads: key/value heads; consecutive query heads share one.
        perceiver_head_dim: width of a head.
        num_frames: frames sampled from a video by default.
        longest_edge: pixels to which a frame's longest edge is shrunk by default (never enlarged); `None` leaves it.
        internalization_prompt: the text that follows the video in the turn the hypernetwork reads.
        prompt_timestamps: whether the frame times written into the prompt count from the start of the sampled span
            (`"span"`, the recipe) or of the file (`"file"`). One rule for training and inference.
        format_version: version of this file's meaning; a newer one than the library knows is refused.

    Raises:
        ValueError: a field is out of its range, or the checkpoint is from a newer format.
    """

    model_type = "video2lora"
    sub_configs = {"vlm_config": AutoConfig}

    vlm_config: Any = None  # a PreTrainedConfig, or its dict until __post_init__
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    bundle_base: bool = False
    rank: int = 16
    lora_scaling: float | None = None
    target_modules: list[str] | tuple[str, ...] = ("down_proj",)
    layers_to_transform: list[int] | tuple[int, ...] | None = None
    use_static_lora: bool = True
    latent_size: int = 512
    num_latents: int = 8
    num_blocks: int = 9
    num_self_attn_per_block: int = 0
    num_pre_head_layers: int = 1
    perceiver_num_heads: int = 16
    perceiver_num_key_value_heads: int = 4
    perceiver_head_dim: int = 128
    num_frames: int = 12
    longest_edge: int | None = 384
    internalization_prompt: str = INTERNALIZATION_PROMPT
    prompt_timestamps: str = "span"
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vlm_config, dict):
            self.vlm_config = _config_from_dict(self.vlm_config)
        else:
            # setting this config's attention implementation sets it on sub-configs: never on a live model's own
            self.vlm_config = copy.deepcopy(self.vlm_config)
        if self.lora_scaling is None:
            self.lora_scaling = 2.0 * float(self.rank) ** 1.5
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        self.target_modules = sorted(set(self.target_modules))
        if self.layers_to_transform is not None:
            self.layers_to_transform = sorted(set(self.layers_to_transform))
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in transformers, but no file, or another model's, is an error and not a configuration of defaults."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type is None:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json of a video2lora model.")
        if model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a {model_type!r} model, not a {cls.model_type!r} one; to start "
                "from a base model use Video2LoraModel.from_vlm(name)."
            )
        return config_dict, kwargs

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the path that the base was loaded from: `base_model_name_or_path` says it."""
        values = super().to_dict()
        if isinstance(values.get("vlm_config"), dict):
            values["vlm_config"].pop("_name_or_path", None)
        return values

    def check(self) -> None:
        """Raise `ValueError` naming the first field that is out of its range."""
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has format_version {self.format_version}, but this video2lora reads up to "
                f"{FORMAT_VERSION}: upgrade with `pip install -U video2lora`."
            )
        positive = ["rank", "latent_size", "num_latents", "num_blocks", "num_frames", "perceiver_head_dim"]
        for name in [*positive, "perceiver_num_heads", "perceiver_num_key_value_heads"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("num_self_attn_per_block", "num_pre_head_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.perceiver_num_heads % self.perceiver_num_key_value_heads:
            raise ValueError(
                f"perceiver_num_heads ({self.perceiver_num_heads}) must be a multiple of "
                f"perceiver_num_key_value_heads ({self.perceiver_num_key_value_heads})."
            )
        if not self.target_modules or any("." in name or not name for name in self.target_modules):
            raise ValueError(
                "target_modules must be names of Linear modules inside a decoder layer, such as 'down_proj', without "
                f"dots; got {list(self.target_modules)}."
            )
        if self.layers_to_transform is not None and min(self.layers_to_transform, default=-1) < 0:
            raise ValueError(
                "layers_to_transform must be None (all) or numbers of decoder layers counted from 0; got "
                f"{list(self.layers_to_transform)}."
            )
        if self.longest_edge is not None and self.longest_edge < 1:
            raise ValueError(f"longest_edge must be at least 1 pixel or None, got {self.longest_edge}.")
        if self.prompt_timestamps not in ("span", "file"):
            raise ValueError(f"prompt_timestamps must be 'span' or 'file', got {self.prompt_timestamps!r}.")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base's text configuration, or this configuration itself when there is no base yet."""
        if self.vlm_config is None:
            return self
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)


def _config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    model_type = str(values.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"vlm_config has model_type {model_type!r}, which this transformers does not know; "
            "expected that of an image-text-to-text model, such as 'smolvlm'."
        )
    return CONFIG_MAPPING[model_type].from_dict({k: v for k, v in values.items() if k != "model_type"})
