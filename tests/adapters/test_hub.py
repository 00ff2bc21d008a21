"""Adapters on a Hub: what is pushed is what comes back, to us and to PEFT, and every way it can fail is told apart."""

from __future__ import annotations

import copy

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel

from video2lora.adapters import (
    AdapterError,
    AdapterNotFoundError,
    ForeignAdapterError,
    VideoAdapter,
    storage,
)

REPO = "owner/clip-lora"


def test_what_is_pushed_comes_back(patched_hub, vlm, make_adapter, merged, logits):
    first, second = make_adapter(1), make_adapter(2)
    commits = [first.push_to_hub(REPO, commit_message="one").oid, second.push_to_hub(REPO, layout="vlm").oid]
    assert VideoAdapter.from_pretrained(REPO).content_hash == second.content_hash
    loaded = VideoAdapter.from_pretrained(REPO, revision=commits[0])
    assert loaded.content_hash == first.content_hash and loaded.provenance == first.provenance
    assert set(HfApi().list_repo_files(REPO)) - {".gitattributes"} == set(storage.FILES)
    model = PeftModel.from_pretrained(copy.deepcopy(vlm), REPO, revision=commits[0])
    torch.testing.assert_close(logits(model), logits(merged(vlm, first)), rtol=0, atol=1e-5)
    card = ModelCard.load(REPO)
    assert f'PeftModel.from_pretrained(model, "{REPO}")' in card.content
    with patched_hub.patch(offline=True):
        assert VideoAdapter.from_pretrained(REPO).content_hash == second.content_hash
        assert VideoAdapter.from_pretrained(REPO, local_files_only=True).content_hash == second.content_hash


def test_layout_dtype_branch_and_privacy(patched_hub, adapter):
    adapter.push_to_hub(REPO, layout="text", dtype=torch.bfloat16, private=True, revision="text")
    loaded = VideoAdapter.from_pretrained(REPO, revision="text")
    assert torch.equal(loaded.weights.lora_A["down_proj"], adapter.weights.lora_A["down_proj"].bfloat16().float())
    assert HfApi().model_info(REPO).private
    with pytest.raises(AdapterNotFoundError, match="adapter_config.json"):
        VideoAdapter.from_pretrained(REPO)  # the main branch is empty
    with pytest.raises(AdapterNotFoundError, match="no revision 'other'"):
        VideoAdapter.from_pretrained(REPO, revision="other")
    with patched_hub.patch(token="hf_stranger"), pytest.raises(AdapterNotFoundError, match="private"):
        VideoAdapter.from_pretrained(REPO, cache_dir=patched_hub.home / "other")


def test_an_adapter_that_cannot_be_saved_makes_no_repository(patched_hub, adapter):
    adapter.weights.lora_A["down_proj"][0, 0, 0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN"):
        adapter.push_to_hub(REPO)
    assert not HfApi().repo_exists(REPO)


def test_a_foreign_adapter_on_the_hub(patched_hub, vlm, adapter):
    adapter.attach(copy.deepcopy(vlm)).push_to_hub(REPO)
    with pytest.raises(ForeignAdapterError, match="PeftModel.from_pretrained"):
        VideoAdapter.from_pretrained(REPO)
    with pytest.raises(AdapterNotFoundError, match="neither a directory nor a repository"):
        VideoAdapter.from_pretrained("owner/nothing")
