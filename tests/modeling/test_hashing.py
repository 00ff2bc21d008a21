"""Identities of weights: never those of weights that were there before, and hashed once while they stay."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from video2lora.modeling import Video2LoraModel
from video2lora.modeling.hashing import HashedTensors

from .helpers import SMALL, awaken


@pytest.fixture
def model(smolvlm) -> Video2LoraModel:
    """A small model on the tiny SmolVLM."""
    built = Video2LoraModel.from_vlm(smolvlm.path, **SMALL)
    awaken(built.hypernetwork)
    return built


def test_the_identity_follows_the_weights(model):
    first = model.hypernetwork_identity()["hypernetwork_sha256"]
    assert model.hypernetwork_identity()["hypernetwork_sha256"] == first
    weight = next(model.hypernetwork.parameters())
    with torch.no_grad():
        weight.add_(1)
    changed = model.hypernetwork_identity()["hypernetwork_sha256"]
    assert changed != first
    weight.data.sub_(1)  # behind autograd's back, as sharded optimizers write
    assert model.eval().hypernetwork_identity()["hypernetwork_sha256"] != changed


def replaced(weight: torch.nn.Parameter, module: torch.nn.Module) -> None:
    """As `load_state_dict(assign=True)`: the old tensors are freed, and their memory may be given out again."""
    state = {name: tensor.clone() + 1 for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


CHANGES = {
    "in place": lambda weight, module: weight.add_(1),
    "as PEFT merges": lambda weight, module: weight.data.add_(1),
    "copied into": lambda weight, module: weight.data.copy_(weight + 1),
    "other memory": lambda weight, module: setattr(weight, "data", weight + 1),
    "replaced": replaced,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["hypernetwork", "vlm"])
@torch.no_grad()
def test_no_identity_is_of_weights_that_were_there_before(model, part, change):
    model.config.base_model_revision = None
    identity = model.hypernetwork_identity if part == "hypernetwork" else model.base_identity
    digests = [identity()[f"{part.replace('vlm', 'base')}_sha256"]]
    for _ in range(10):
        module = model.get_submodule(part)
        CHANGES[change](max(module.parameters(), key=torch.numel), module)
        digests.append(identity()[f"{part.replace('vlm', 'base')}_sha256"])
    assert len(set(digests)) == len(digests)
    fresh = copy.deepcopy(model)  # knows nothing of hashes
    assert (
        digests[-1] == (fresh.hypernetwork_identity() | fresh.base_identity())[f"{part.replace('vlm', 'base')}_sha256"]
    )


def test_weights_are_hashed_once_while_they_are_the_same(model, monkeypatch):
    first = model.hypernetwork_identity()
    monkeypatch.setattr("video2lora.modeling.hashing.sha256", lambda: pytest.fail("hashed again"))
    assert model.hypernetwork_identity() == first
    with torch.inference_mode():
        assert model.hypernetwork_identity() == first


def test_a_model_that_was_hashed_is_copied_and_pickled(model):
    digest = model.hypernetwork_identity()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.hypernetwork_identity() == digest
        with torch.no_grad():
            next(other.hypernetwork.parameters()).data.add_(1)
        assert other.hypernetwork_identity() != digest
    assert model.hypernetwork_identity() == digest


def test_one_value_written_where_none_is_sampled_is_seen_by_the_version():
    weight = torch.zeros(10_000)
    hashed = HashedTensors({"weight": weight})
    assert hashed.is_of({"weight": weight})
    weight[1] = 1
    assert not hashed.is_of({"weight": weight})


def test_another_tensor_in_the_same_place_is_not_the_one_that_was_hashed():
    weight = torch.zeros(4)
    hashed = HashedTensors({"weight": weight})
    other = weight.detach()  # the same memory, version counter and values
    assert not hashed.is_of({"weight": other})
    del weight
    assert not hashed.is_of({"weight": other})


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize(
    "shape", [(64, 64), (256, 256), (512, 1024), (960, 960), (2048, 128), (32, 4096), (16, 4096), (9, 300), (4000,)]
)
def test_rows_and_columns_changed_behind_autograds_back_are_seen(shape, dim, part):
    weight = torch.zeros(shape)
    hashed = HashedTensors({"weight": weight})
    weight.data.tensor_split(4, dim)[part].add_(1)
    assert not hashed.is_of({"weight": weight})


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3), (1, 1, 5), (64,), (64, 1), (1, 100)])
def test_small_and_empty_tensors(shape):
    weight = torch.zeros(shape)
    hashed = HashedTensors({"weight": weight})
    weight.data.add_(1)
    assert hashed.is_of({"weight": weight}) == (weight.numel() == 0)


def test_the_digest_is_of_names_and_values():
    values = torch.arange(3.0)
    digests = {
        HashedTensors({name: tensor}).digest
        for name, tensor in [("a", values), ("b", values), ("a", values + 1), ("a", values.bfloat16())]
    }
    assert len(digests) == 4
    assert HashedTensors({"a": values.clone()}).digest in digests
