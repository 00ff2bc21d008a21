"""Modeling: frames to visual tokens a few at a time, so that a long video needs no more memory than a short one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FRAMES_AT_ONCE = 64
PATCHES_A_FRAME = 1024
HIDDEN_SIZE = 768
"""The vision tower sees `FRAMES_AT_ONCE` frames of so many patches (512 pixels a side) together: enough to fill a GPU,
few enough that their activations stay small. Of smaller ones it sees as many times more as fit into one of these, and
a narrower tower (that of SmolVLM2 500M is `HIDDEN_SIZE` wide) as many times more as it is narrower."""


def are_frames(pixels: Any) -> bool:
    """Whether `pixels` are `[batch, frames, channels, height, width]`, or packed `[1, all frames, ...]`."""
    return isinstance(pixels, Tensor) and pixels.dim() == 5


def embed_frames(vlm: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a video's pixels by its visual tokens, merged into the embedded prompt.

    Pixels may lie on another device: each group of frames moves when its turn comes. Applies to bases that take frames
    as `pixel_values` `[batch, frames, channels, height, width]` (SmolVLM, Idefics3), whose frames may also be packed:
    `[1, all frames of the batch, ...]`, each prompt's behind those of the one before. The inputs of others, whose
    prompts need the pixels' grid for positions (Qwen2.5-VL), are returned as they are.

    Args:
        vlm: the base.
        inputs: its keyword arguments.

    Returns:
        Its keyword arguments with `inputs_embeds` instead of `input_ids` and pixels.

    Raises:
        ValueError: the prompts have no place for these frames, or the frames are of another number of videos.
    """
    pixels, model = inputs.get("pixel_values"), getattr(vlm, "base_model", vlm)
    token_id = getattr(getattr(vlm, "config", None), "image_token_id", None)
    if pixels is None or not are_frames(pixels) or token_id is None:
        return dict(inputs)
    rest = {k: v for k, v in inputs.items() if k not in ("pixel_values", "pixel_attention_mask", "input_ids")}
    input_ids = inputs["input_ids"]
    visual = input_ids == token_id
    # the only wait for the device, and before there is work on it
    counts = visual.sum(1).tolist()
    real = _real_frames(counts, *pixels.shape[:2])
    with _contiguous_frames(vlm):
        features = torch.cat(
            list(_features(model, pixels, inputs.get("pixel_attention_mask"), real, input_ids.device))
        )
    if sum(counts) != len(features):
        raise ValueError(f"{sum(counts)} visual tokens in the prompt do not fit the {len(features)} of the pixels.")
    embeddings = vlm.get_input_embeddings()(input_ids)  # type: ignore[operator]
    return rest | {"inputs_embeds": embeddings.masked_scatter(visual[..., None], features.to(embeddings))}


def _real_frames(counts: list[int], videos: int, frames: int) -> list[int] | None:
    """Places in the flattened batch of the frames that are no padding; None where all are real.

    They follow from the visual tokens of each prompt: padding comes last, and neither the longest video nor a packed
    batch (`videos` is 1) has any.
    """
    packed = videos == 1
    if not packed and videos != len(counts):
        raise ValueError(
            f"pixels of {videos} videos do not fit {len(counts)} prompts: expected as many, or 1 (packed)."
        )
    tokens_a_frame, left = divmod(sum(counts) if packed else max(counts), frames)
    if left or not tokens_a_frame or any(count % tokens_a_frame for count in counts):
        raise ValueError(f"{counts} visual tokens in the prompts do not fit {frames} frames.")
    if packed or min(counts) == max(counts):
        return None
    return [row * frames + place for row, count in enumerate(counts) for place in range(count // tokens_a_frame)]


def _features(
    model: Any, pixels: Tensor, mask: Tensor | None, real: list[int] | None, device: torch.device
) -> Iterator[Tensor]:
    """Visual tokens `[tokens, hidden_size]` of each group of frames."""
    frames, masks = pixels.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
    group = _frames_at_once(model, frames)

    def take(tensor: Tensor, start: int) -> Tensor:
        if real is None:
            return tensor[start : start + group]
        return tensor.index_select(0, torch.tensor(real[start : start + group], device=tensor.device))

    for start in range(0, len(frames) if real is None else len(real), group):
        options = {}
        if masks is not None:
            options["pixel_attention_mask"] = take(masks, start).to(device).bool()[None]
        output = model.get_image_features(
            take(frames, start).to(device, model.dtype)[None], **options, return_dict=True
        )
        yield torch.cat(list(output.pooler_output)).flatten(0, -2)


def _frames_at_once(model: Any, frames: Tensor) -> int:
    """How many of `frames` `[frames, channels, height, width]` the vision tower sees together."""
    vision = getattr(model.config, "vision_config", None)
    patch, width = getattr(vision, "patch_size", None), getattr(vision, "hidden_size", HIDDEN_SIZE)
    if not isinstance(patch, int) or not isinstance(width, int) or width < 1:
        return FRAMES_AT_ONCE
    patches = (frames.shape[-2] // patch) * (frames.shape[-1] // patch)
    return FRAMES_AT_ONCE * max(1, PATCHES_A_FRAME // max(1, patches)) * max(1, HIDDEN_SIZE // width)


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
