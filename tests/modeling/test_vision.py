"""Frames a few at a time are the frames all together."""

from __future__ import annotations

import copy
from types import SimpleNamespace

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


def tower_batches(vlm, inputs):
    """How many frames the vision tower sees each time."""
    seen = []
    handle = vlm.base_model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    try:
        embed_frames(vlm, inputs)
    finally:
        handle.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("frames_at_once", [1, 2, 100])
@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_groups_of_frames_are_the_frames_together(
    family, frames_at_once, packed, families, clips, make_processor, monkeypatch
):
    setup = families(family)
    vlm = copy.deepcopy(setup.vlm).double()
    processor = make_processor(setup, num_frames=30)
    items = [processor(videos=clip) for clip in clips]
    frames = [item["pixel_values"].shape[1] for item in items]
    assert len(set(frames)) > 1  # padded, some are padding
    inputs = dict(processor.pad(items, pack_frames=packed))
    assert inputs["pixel_values"].shape[:2] == ((1, sum(frames)) if packed else (3, max(frames)))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    monkeypatch.setattr(vision, "_frames_at_once", lambda model, frames: frames_at_once)
    assert max(tower_batches(vlm, inputs)) == min(frames_at_once, sum(frames))
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
def test_packed_frames_that_do_not_fit_the_prompts_are_refused(smolvlm, clips, make_processor):
    processor = make_processor(smolvlm)
    items = [processor(videos=clip, num_frames=n) for clip, n in zip(clips, (2, 3, 3), strict=True)]
    inputs = dict(processor.pad(items, pack_frames=True))
    assert inputs["pixel_values"].shape[:2] == (1, 8)
    pixels = {k: v for k, v in inputs.items() if k.startswith("pixel_")}
    for change in (lambda v: v[:, :7], lambda v: torch.cat([v, v[:, :1]], dim=1)):
        with pytest.raises(ValueError, match=r"\[8, 12, 12\] visual tokens in the prompts do not fit [79] frames"):
            embed_frames(smolvlm.vlm, inputs | {k: change(v) for k, v in pixels.items()})
    fewer = {k: v if k in pixels else v[1:] for k, v in inputs.items()}
    with pytest.raises(ValueError, match="24 visual tokens in the prompt do not fit the 32 of the pixels"):
        embed_frames(smolvlm.vlm, fewer)
    with pytest.raises(ValueError, match="pixels of 2 videos do not fit 3 prompts"):
        embed_frames(smolvlm.vlm, inputs | {k: v.unflatten(1, (2, 4))[0] for k, v in pixels.items()})


@pytest.mark.parametrize(
    "side, patch_size, frames",
    [(512, 16, 64), (384, 14, 64), (364, 14, 64), (1024, 16, 64), (256, 16, 256), (64, 8, 1024)],
)
def test_small_frames_are_more_at_once(side, patch_size, frames):
    """Never more patches than 64 frames of 512 pixels have; of the released bases' sizes as many as ever."""
    pixels = torch.empty(5, 3, side, side, device="meta")
    vision_config = SimpleNamespace(patch_size=patch_size)
    assert (
        vision._frames_at_once(SimpleNamespace(config=SimpleNamespace(vision_config=vision_config)), pixels) == frames
    )
    assert frames * (side // patch_size) ** 2 <= 64 * 1024 or frames == 64
    assert vision._frames_at_once(SimpleNamespace(config=SimpleNamespace()), pixels) == 64  # nobody knows


@torch.no_grad()
@pytest.mark.parametrize("width, frames", [(192, 256), (384, 128), (768, 64), (1152, 64), (None, 64), (0, 64)])
def test_a_narrow_tower_sees_more_at_once(width, frames):
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=16, hidden_size=width))
    assert vision._frames_at_once(SimpleNamespace(config=config), torch.empty(1, 3, 512, 512)) == frames


def test_a_hundred_small_frames_are_one_group(smolvlm, make_processor):
    video = torch.randint(0, 255, (100, 32, 32, 3), dtype=torch.uint8)
    assert tower_batches(smolvlm.vlm, dict(make_processor(smolvlm, num_frames=100)(videos=[video]))) == [100]


@torch.no_grad()
def test_the_tower_gets_contiguous_input(smolvlm, clips, make_processor):
    layouts = []
    layer = smolvlm.vlm.base_model.vision_model.encoder.layers[0]
    with vision._contiguous_frames(smolvlm.vlm):
        handle = layer.register_forward_pre_hook(lambda module, args: layouts.append(args[0].is_contiguous()))
        embed_frames(smolvlm.vlm, dict(make_processor(smolvlm)(videos=clips)))
        handle.remove()
    assert layouts and all(layouts)
