"""Videos of unequal length in one batch give the adapters that one padded batch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from video2lora.modeling import Video2LoraModel, Video2LoraProcessor, lengths
from video2lora.modeling import model as modeling
from video2lora.modeling.lengths import group_by_length, length_groups
from video2lora.testing import tiny_idefics3, tiny_qwen2_5_vl, tiny_smolvlm

from .helpers import SMALL, awaken

FAMILIES = {"smolvlm": tiny_smolvlm, "idefics3": tiny_idefics3, "qwen": tiny_qwen2_5_vl}


def test_groups():
    assert group_by_length([9] * 1000) == [list(range(1000))], "alike"
    assert group_by_length([10, 500, 10]) == [[0, 1, 2]], "not worth a pass"
    assert group_by_length([10, 5000, 10]) == [[0, 2], [1]]
    assert group_by_length([800, 1000] * 99) == [list(range(198))], "little padding"
    spread = [60 + 10 * (i * 37 % 48) for i in range(300)]
    groups = group_by_length(spread)
    assert 2 <= len(groups) <= 4 and sorted(sum(groups, [])) == list(range(300))
    size = sum(max(spread[row] for row in group) * len(group) for group in groups)
    assert size * 0.75 <= sum(spread) < 300 * max(spread) * 0.75
    assert all(group == sorted(group) for group in groups)


def test_every_pass_is_worth_its_launches():
    assert group_by_length([700, 1000, 300, 300, 3000, 100]) == [[2, 3, 5], [0, 1, 4]], "two more spare 4200 tokens"
    mixed = [100, 1000, 1000, 2000, 100, 300, 1000, 6000, 1000, 6000, 700, 3000]
    assert len(group_by_length(mixed)) == 3, "a fourth spares 300"
    doubling = [100 * 2 ** (i % 7) for i in range(70)]
    found = [sorted({doubling[row] for row in group}) for group in group_by_length(doubling)]
    assert found == [[100, 200], [400, 800], [1600], [3200, 6400]], "parted evenly in factors"


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_groups_columns_are_those_of_its_tokens(left):
    lengths = [10, 5000, 12]
    mask = torch.zeros(3, 5003, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[5000 - length : 5000] = 1
    mask = mask if left else mask.flip(1)
    short, long = length_groups(mask)
    assert short.rows.tolist() == [0, 2] and long.rows.tolist() == [1]
    assert short.end - short.start == 12 and long.end - long.start == 5000 and long.padding is None
    assert torch.equal(short.padding.mask, mask[[0, 2], short.start : short.end].bool())
    assert short.of({"mask": mask})["mask"].sum(1).tolist() == [10, 12]
    assert length_groups(torch.ones(1, 9000)) is None
    mask[0] = 0
    assert length_groups(mask) is None, "a row without tokens"


@pytest.fixture
def eager_groups(monkeypatch) -> list[int]:
    """Groups however small; filled with the rows of each pass through the base."""
    monkeypatch.setattr(lengths, "TOKENS_WORTH_A_PASS", 0)
    seen: list[int] = []
    stream = modeling.stream_hidden_states

    def noting(vlm: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> None:
        seen.append(len(inputs["attention_mask"]))
        stream(vlm, inputs, *args, **options)

    monkeypatch.setattr(modeling, "stream_hidden_states", noting)
    return seen


def make(family: str, frames: list[int], left: bool = False, packed: bool = False) -> tuple[Video2LoraModel, Any]:
    vlm, vlm_processor = FAMILIES[family]()
    torch.manual_seed(0)
    model = Video2LoraModel.from_vlm(vlm, **SMALL)
    awaken(model.hypernetwork)
    processor = Video2LoraProcessor.from_config(model.config, vlm_processor=vlm_processor)
    generator = torch.Generator().manual_seed(1)
    videos = [torch.randint(0, 255, (n, 32, 32, 3), generator=generator, dtype=torch.uint8) for n in frames]
    items = [processor.encode_video(processor.load_video(video, num_frames=len(video))) for video in videos]
    return model, dict(processor.pad(items, left=left, pack_frames=packed))


def results(model: Video2LoraModel, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Adapters, and the gradient of every parameter."""
    model.zero_grad()
    lora = model.internalize(**inputs)
    sum(tensor.square().sum() for tensor in [*lora.lora_A.values(), *lora.lora_B.values()]).backward()
    found = {f"A {name}": value.detach() for name, value in lora.lora_A.items()}
    found |= {f"B {name}": value.detach() for name, value in lora.lora_B.items()}
    return found | {name: p.grad.clone() for name, p in model.hypernetwork.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_adapters_and_gradients(family, packed, left, checkpointing, eager_groups, monkeypatch):
    model, inputs = make(family, [3, 24, 1, 2, 22, 7, 1], left, packed)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ours = results(model, inputs)
    assert 2 <= len(eager_groups) <= 4 and sum(eager_groups) == 7
    with torch.no_grad():
        monkeypatch.setattr(modeling, "TOKENS_IN_FLIGHT", 50)
        unlearned = model.internalize(**inputs)
    monkeypatch.setattr(modeling, "length_groups", lambda mask: None)
    eager_groups.clear()
    expected = results(model, inputs)
    assert eager_groups == [7] and ours.keys() == expected.keys()
    for name in ours:
        scale = float(expected[name].abs().max())
        assert_close(ours[name], expected[name], rtol=1e-4, atol=2e-5 * scale, msg=lambda said, n=name: f"{n}: {said}")
    for name, value in unlearned.lora_A.items():
        assert_close(value, expected[f"A {name}"], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_equal_lengths_are_bit_for_bit_one_batch(eager_groups, monkeypatch):
    model, inputs = make("smolvlm", [3, 3, 3])
    ours = model.internalize(**inputs)
    monkeypatch.setattr(modeling, "length_groups", lambda mask: None)
    theirs = model.internalize(**inputs)
    assert eager_groups == [3, 3]
    assert all(torch.equal(ours.lora_A[name], theirs.lora_A[name]) for name in ours.lora_A)


@torch.no_grad()
def test_one_pass_where_rows_cannot_be_told_apart(eager_groups):
    """Inputs that are not indexed by row, and a base whose processes run it together."""
    model, inputs = make("qwen", [2, 8, 2])
    model.internalize(**inputs)
    assert eager_groups == [3]
    model, inputs = make("smolvlm", [2, 24, 2])
    model._is_sharded = lambda: True
    model.internalize(**inputs)
    assert eager_groups == [3, 3]


@torch.no_grad()
def test_frames_go_through_the_vision_tower_once_and_stay_where_they_are(eager_groups, monkeypatch):
    model, inputs = make("smolvlm", [2, 24, 2], packed=True)
    frames, encode = [], model.vlm.model.get_image_features

    def noting(pixels: torch.Tensor, *args: Any, **options: Any) -> Any:
        frames.append(pixels.shape[1])
        return encode(pixels, *args, **options)

    monkeypatch.setattr(model.vlm.model, "get_image_features", noting)
    monkeypatch.setattr("video2lora.modeling.vision._frames_at_once", lambda *_: 8)
    model.internalize(**inputs)
    assert frames == [8, 8, 8, 4] and len(eager_groups) > 1
