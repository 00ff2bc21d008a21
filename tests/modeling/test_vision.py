"""Frames a few at a time are the frames all together."""

from __future__ import annotations

import copy

import pytest
import torch

from video2lora.modeling import vision
from video2lora.modeling.vision import embed_frames

from .helpers import num_hooks


def merged(vlm, inputs):
    """Embeddings that the base itself makes of a prompt with pixels."""
    seen = []
    handle = vlm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        vlm.base_model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("frames_at_once", [1, 2, 100])
@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_groups_of_frames_are_the_frames_together(
    family, frames_at_once, families, clips, make_processor, monkeypatch
):
    setup = families(family)
    vlm = copy.deepcopy(setup.vlm).double()
    inputs = dict(make_processor(setup, num_frames=30)(videos=clips))
    frames = [int((video != 0).flatten(1).any(1).sum()) for video in inputs["pixel_values"]]
    assert len(set(frames)) > 1  # some are padding
    inputs["pixel_values"] = inputs["pixel_values"].double()
    monkeypatch.setattr(vision, "FRAMES_AT_ONCE", frames_at_once)
    before = num_hooks(vlm)
    ours = embed_frames(vlm, inputs)
    assert set(ours) == {"inputs_embeds", "attention_mask"}
    torch.testing.assert_close(ours["inputs_embeds"], merged(vlm, inputs), atol=1e-12, rtol=0)
    assert num_hooks(vlm) == before


@torch.no_grad()
def test_inputs_of_other_bases_pass_through(qwen, clips, make_processor):
    inputs = dict(make_processor(qwen)(videos=clips))
    passed = embed_frames(qwen.vlm, inputs)
    assert passed.keys() == inputs.keys() and all(passed[k] is inputs[k] for k in inputs)


@torch.no_grad()
def test_text_alone_passes_through(smolvlm):
    inputs = {"input_ids": torch.tensor([[40, 41]])}
    assert embed_frames(smolvlm.vlm, inputs) == inputs


@torch.no_grad()
def test_pixels_that_do_not_fit_the_prompt_are_refused(smolvlm, clips, make_processor):
    inputs = dict(make_processor(smolvlm)(videos=clips[:1]))
    with pytest.raises(ValueError, match="visual tokens"):
        embed_frames(smolvlm.vlm, inputs | {k: v[:, :1] for k, v in inputs.items() if k.startswith("pixel_")})


@torch.no_grad()
def test_frames_that_no_prompt_has_room_for_are_refused(smolvlm, clips, make_processor):
    inputs = dict(make_processor(smolvlm)(videos=clips[:1]))
    pixels = {k: v for k, v in inputs.items() if k.startswith("pixel_")}
    padded = {k: torch.cat([v, torch.zeros_like(v[:, :2])], dim=1) for k, v in pixels.items()}
    with pytest.raises(ValueError, match="do not fit 5 frames"):
        embed_frames(smolvlm.vlm, inputs | padded)


@torch.no_grad()
def test_the_tower_gets_contiguous_input(smolvlm, clips, make_processor):
    layouts = []
    layer = smolvlm.vlm.base_model.vision_model.encoder.layers[0]
    with vision._contiguous_frames(smolvlm.vlm):
        handle = layer.register_forward_pre_hook(lambda module, args: layouts.append(args[0].is_contiguous()))
        embed_frames(smolvlm.vlm, dict(make_processor(smolvlm)(videos=clips)))
        handle.remove()
    assert layouts and all(layouts)
