"""Modeling: frames to visual tokens a few at a time, so that a long video needs no more memory than a short one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FRAMES_AT_ONCE = 32
"""Frames the vision tower sees together: enough to fill a GPU, few enough that their activations stay small."""


def are_frames(pixels: Any) -> bool:
    """Whether `pixels` are `[batch, frames, channels, height, width]`, each frame by itself."""
    return isinstance(pixels, Tensor) and pixels.dim() == 5


def embed_frames(vlm: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a video's pixels by its visual tokens, merged into the embedded prompt.

    Pixels may lie on another device: each group of frames moves when its turn comes. Applies to bases that take frames
    as `pixel_values` `[batch, frames, channels, height, width]` (SmolVLM, Idefics3); the inputs of others, whose
    prompts need the pixels' grid for positions (Qwen2.5-VL), are returned as they are.

    Args:
        vlm: the base.
        inputs: its keyword arguments.

    Returns:
        Its keyword arguments with `inputs_embeds` instead of `input_ids` and pixels.
    """
    pixels, model = inputs.get("pixel_values"), getattr(vlm, "base_model", vlm)
    token_id = getattr(getattr(vlm, "config", None), "image_token_id", None)
    if pixels is None or not are_frames(pixels) or token_id is None:
        return dict(inputs)
    rest = {k: v for k, v in inputs.items() if k not in ("pixel_values", "pixel_attention_mask", "input_ids")}
    input_ids = inputs["input_ids"]
    with _contiguous_frames(vlm):
        groups = list(_features(model, pixels, inputs.get("pixel_attention_mask"), input_ids.device))
    if not groups:
        return dict(inputs)
    features = torch.cat(groups)
    embeddings = vlm.get_input_embeddings()(input_ids)  # type: ignore[operator]
    mask = (input_ids == token_id)[..., None]
    if int(mask.sum()) != len(features):
        raise ValueError(f"{int(mask.sum())} visual tokens in the prompt do not fit the {len(features)} of the pixels.")
    return rest | {"inputs_embeds": embeddings.masked_scatter(mask, features.to(embeddings))}


def _features(model: Any, pixels: Tensor, mask: Tensor | None, device: torch.device) -> Iterator[Tensor]:
    """Visual tokens `[tokens, hidden_size]` of each group of frames; frames that are all zero are padding."""
    frames, masks = pixels.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
    for start in range(0, len(frames), FRAMES_AT_ONCE):
        group = frames[start : start + FRAMES_AT_ONCE].to(device, model.dtype)
        real = (group != 0).flatten(1).any(1)
        if not bool(real.any()):
            continue
        options = {}
        if masks is not None:
            options["pixel_attention_mask"] = masks[start : start + FRAMES_AT_ONCE].to(device).bool()[real][None]
        output = model.get_image_features(group[real][None], **options, return_dict=True)
        yield torch.cat(list(output.pooler_output)).flatten(0, -2)


@contextmanager
def _contiguous_frames(vlm: nn.Module) -> Iterator[None]:
    """Give the vision tower's first layer contiguous input.

    SigLIP's patches come out of a convolution channels first and keep that layout through every residual; each norm
    then copies them. One copy here spares a fifth of the tower's time and changes no value.
    """

    def make_contiguous(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].contiguous(), *args[1:]) if args and isinstance(args[0], Tensor) else args

    towers = [m for name, m in vlm.named_modules() if name.rpartition(".")[2] in ("vision_model", "vision_tower")]
    stacks = [m for tower in towers[:1] for name, m in tower.named_modules() if name.rpartition(".")[2] == "layers"]
    handles = [stack[0].register_forward_pre_hook(make_contiguous) for stack in stacks[:1]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
