"""A base that carries an adapter: no video is read through it, and no second adapter comes on it unseen."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch

from video2lora.adapters import AdapterError, VideoAdapter
from video2lora.modeling import Video2LoraModel, inject_lora, merge_lora

from .helpers import assert_same_lora, assert_unchanged, num_hooks, snapshot, text_batch


def test_a_base_that_carries_an_adapter_is_not_read(smolvlm, make_model, make_processor, clips):
    from peft import LoraConfig, get_peft_model

    base = copy.deepcopy(smolvlm.vlm)
    model = make_model(base)
    inputs = make_processor(smolvlm)(videos=clips[:1])
    expected = model.internalize(**inputs)
    carrying = get_peft_model(base, LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="PEFT adapter.*unload"):
        model.internalize(**inputs)
    with pytest.raises(ValueError, match="PEFT adapter"):
        Video2LoraModel.from_vlm(base)
    with carrying.disable_adapter():
        assert_same_lora(model.internalize(**inputs), expected)
    carrying.unload()
    assert_same_lora(model.internalize(**inputs), expected)


def test_a_base_with_an_adapter_merged_into_it_is_not_read(smolvlm, make_model, make_processor, clips):
    model = make_model(copy.deepcopy(smolvlm.vlm))
    inputs = make_processor(smolvlm)(videos=clips[:1])
    with torch.no_grad():
        expected = model.internalize(**inputs)
        with merge_lora(model.vlm, model.targets, expected), pytest.raises(ValueError, match="merged into the base"):
            model.internalize(**inputs)
        assert_same_lora(model.internalize(**inputs), expected)


@pytest.fixture(scope="module")
def setup(smolvlm, make_model, make_processor, clips):
    """A model on a base of its own, and the adapters of two clips."""
    model = make_model(copy.deepcopy(smolvlm.vlm))
    with torch.no_grad():
        return model, model.internalize(**make_processor(smolvlm)(videos=clips[:2]))


@torch.no_grad()
def test_no_video_is_read_where_adapters_are_injected(setup, smolvlm, make_processor, clips):
    model, lora = setup
    inputs = make_processor(smolvlm)(videos=clips[:1])
    with inject_lora(model.vlm, model.targets, lora[1]):
        with pytest.raises(ValueError, match="injected into the base.*videos would be read by another model"):
            model.internalize(**inputs)
        read: list = []  # another thread's base is as it was
        thread = threading.Thread(target=lambda: read.append(model.internalize(**inputs)))
        thread.start()
        thread.join()
    assert_same_lora(read[0], lora[0], atol=2e-6)


@torch.no_grad()
def test_a_second_adapter_is_refused(setup):
    """Sums would count the static part twice."""
    model, lora = setup
    queries, before = text_batch(2), snapshot(model.vlm)
    adapter = VideoAdapter.from_weights(lora[1], vlm=model.vlm, targets=model.targets)
    expected = model(queries, adapters=lora[0]).logits
    for block in (
        merge_lora(model.vlm, model.targets, lora[0]),
        inject_lora(model.vlm, model.targets, lora[0]),
    ):
        with block:
            torch.testing.assert_close(
                model(queries).logits, expected, atol=1e-4, rtol=0
            )  # without one more: this one
            for answer in (model, model.generate):
                with pytest.raises(ValueError, match="(merged|injected) into the base.*answers would be of both"):
                    answer(queries, adapters=lora[1])
            with pytest.raises(AdapterError, match="on this base already.*leave its block first"):
                adapter.attach(model.vlm)
            with pytest.raises(RuntimeError, match="leave (its|that) block first"), adapter.merged(model.vlm):
                raise AssertionError("entered")
    with (
        merge_lora(model.vlm, model.targets, lora[0]),
        pytest.raises(RuntimeError, match="merged into this base already"),
        inject_lora(model.vlm, model.targets, lora[1]),
    ):
        raise AssertionError("entered")
    assert num_hooks(model.vlm) == 0
    assert_unchanged(model.vlm, before)
    torch.testing.assert_close(model(queries, adapters=lora[0]).logits, expected)


def test_what_is_no_adapter_is_told(setup):
    model, lora = setup
    queries = text_batch(2)
    for given, told in ((Path("a-lora"), "PosixPath.'a-lora'"), ("a-lora", "'a-lora'"), ([lora[0], None], "NoneType")):
        with pytest.raises(TypeError, match=f"expected adapters.*got .*{told}"):
            model.generate(queries, adapters=given)
    with pytest.raises(ValueError, match=r"queries \[1, 1\] of 2 adapters.*3 rows.*queries_per_adapter"):
        model.generate(text_batch(3), adapters=lora)
