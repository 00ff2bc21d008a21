"""Published checkpoints: equal to their safetensors, and strict about names, shapes and fields."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from video2lora.modeling.configuration import Video2LoraConfig
from video2lora.modeling.hypernetwork import Hypernetwork
from video2lora.modeling.published import (
    PublishedCheckpoint,
    PublishedCheckpointError,
    convert_state_dict,
    read_published_checkpoint,
)
from video2lora.modeling.targets import LoraTargets

from .published_files import Draft, assert_same, published_draft, random_draft, rewrite_member

CASES = ["r4_down", "r16_down"]
FIELDS = {"in_features": {"down_proj": 128}, "out_features": {"down_proj": 64}, "target_modules": ["down_proj"]}


@pytest.fixture
def draft(parity_dir: Path) -> Draft:
    return published_draft(parity_dir)


def _hypernetwork(checkpoint: PublishedCheckpoint) -> Hypernetwork:
    """Our hypernetwork of the checkpoint's config, with its weights; refuses any other key or shape."""
    config = Video2LoraConfig(**checkpoint.config)
    layers = tuple(range(checkpoint.num_layers))
    paths = {name: tuple(f"layers.{i}.{name}" for i in layers) for name in config.target_modules}
    targets = LoraTargets(layers, paths, checkpoint.in_features, checkpoint.out_features)
    hypernetwork = Hypernetwork(config, targets, checkpoint.hidden_size)
    hypernetwork.load_state_dict(checkpoint.state_dict, strict=True)
    return hypernetwork


# What is read


@pytest.mark.parametrize("case", CASES)
def test_pt_and_safetensors_give_the_same_hypernetwork(parity_dir: Path, tmp_path: Path, case: str) -> None:
    draft = published_draft(parity_dir, case)
    checkpoint = read_published_checkpoint(draft.save(tmp_path / "hypernet.pt"))
    assert_same(checkpoint.state_dict, convert_state_dict(draft.tensors, **FIELDS))
    stored = draft.case
    assert checkpoint.config == {
        "base_model_name_or_path": "parity/tiny-smolvlm",
        "rank": stored["lora_r"],
        "lora_scaling": stored["lora_scaling_multiplier"],
        "target_modules": ["down_proj"],
        "use_static_lora": True,
        "latent_size": 8,
        "num_latents": 4,
        "num_blocks": stored["num_blocks"],
        "num_self_attn_per_block": 0,
        "num_pre_head_layers": 1,
    }
    assert (checkpoint.num_layers, checkpoint.hidden_size) == (4, 64)
    assert (checkpoint.in_features, checkpoint.out_features) == ({"down_proj": 128}, {"down_proj": 64})
    hypernetwork = _hypernetwork(checkpoint)
    assert sum(p.numel() for p in hypernetwork.parameters()) == stored["hypernet_params"]
    for tensor in checkpoint.state_dict.values():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_file_of_the_published_code_gives_its_safetensors(shared_dir: Path, parity_dir: Path) -> None:
    checkpoint = read_published_checkpoint(shared_dir / "parity" / "r16_down" / "hypernet.pt")
    stored = load_file(parity_dir / "r16_down" / "hypernet.safetensors")
    assert_same(checkpoint.state_dict, convert_state_dict(stored, **FIELDS))
    _hypernetwork(checkpoint)


@pytest.mark.parametrize("self_attn", [0, 1, 2])
@pytest.mark.parametrize("blocks", [1, 3])
def test_structures_no_stored_case_has(tmp_path: Path, blocks: int, self_attn: int) -> None:
    modules = {"up_proj": (24, 40), "down_proj": (40, 24), "q_proj": (24, 24)}
    draft = random_draft(modules=modules, blocks=blocks, self_attn=self_attn, mlps=3)
    checkpoint = read_published_checkpoint(draft.save(tmp_path / "a.pt"))
    assert checkpoint.config["num_blocks"] == blocks
    assert checkpoint.config["num_self_attn_per_block"] == self_attn
    assert checkpoint.config["num_pre_head_layers"] == 3
    assert checkpoint.config["target_modules"] == ["down_proj", "q_proj", "up_proj"]
    _hypernetwork(checkpoint)
    for index, name in enumerate(["down_proj", "q_proj", "up_proj"]):  # the module axis is in sorted order
        head = draft.tensors["head.weight"][:, index, :, : sum(modules[name])]
        assert torch.equal(checkpoint.state_dict[f"head.{name}"], head)
        assert torch.equal(checkpoint.state_dict[f"scaler_A.{name}"], draft.tensors[f"scaler_A.{name}"][0, :, :, 0])


def test_without_bias_there_is_no_static_part(tmp_path: Path) -> None:
    modules = {"down_proj": (40, 24)}
    with_bias = read_published_checkpoint(random_draft(modules=modules).save(tmp_path / "bias.pt"))
    bare = read_published_checkpoint(random_draft(modules=modules, bias=False).save(tmp_path / "bare.pt"))
    assert with_bias.config == {**bare.config, "use_static_lora": True}
    assert bare.config["use_static_lora"] is False
    _hypernetwork(bare)
    draft = random_draft(modules=modules)
    draft.hypernet["use_bias"] = False  # the published code then leaves the biases it has out of the adapter
    unused = read_published_checkpoint(draft.save(tmp_path / "unused.pt"))
    assert unused.config == bare.config
    assert_same(unused.state_dict, {k: v for k, v in with_bias.state_dict.items() if "bias_" not in k})
    draft = random_draft(modules=modules, bias=False)
    draft.hypernet["use_bias"] = True
    with pytest.raises(PublishedCheckpointError, match="use_bias is True, but the tensors say False"):
        read_published_checkpoint(draft.save(tmp_path / "missing.pt"))


def test_older_and_newer_relatives(draft: Draft, tmp_path: Path) -> None:
    before = read_published_checkpoint(draft.save(tmp_path / "before.pt"))
    for name in ("num_pre_head_layers", "use_per_rank_bias", "use_bias"):
        del draft.hypernet[name]
    draft.hypernet.update(dropout_rate=0.1, a_field_of_tomorrow={"x": [1, 2.5, None]})
    draft.lora.update(another_field=("y",), lora_dropout=0.05)
    draft.aggregator.update(pooling_type="max")
    draft.tensors = {f"_orig_mod.{name}": tensor for name, tensor in draft.tensors.items()}
    after = read_published_checkpoint(draft.save(tmp_path / "after.pt"))
    assert after.config == before.config
    assert_same(after.state_dict, before.state_dict)


def test_strides_and_offsets_are_honoured(draft: Draft, tmp_path: Path) -> None:
    before = read_published_checkpoint(draft.save(tmp_path / "before.pt"))
    tensors = draft.tensors
    tensors["head.weight"] = tensors["head.weight"].transpose(0, 2).contiguous().transpose(0, 2)
    name = "bias_A.down_proj"
    tensors[name] = torch.cat([torch.full((7,), 9.0), tensors[name].flatten()])[7:].view_as(tensors[name])
    after = read_published_checkpoint(draft.save(tmp_path / "after.pt"))
    assert_same(after.state_dict, before.state_dict)
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in after.state_dict.values())


def test_files_from_a_gpu_run_load_without_one(draft: Draft, tmp_path: Path) -> None:
    path = draft.save(tmp_path / "a.pt")
    before = read_published_checkpoint(path)
    binunicode = b"X" + struct.pack("<I", 3) + b"cpu"
    rewrite_member(path, lambda data: data.replace(binunicode, b"X" + struct.pack("<I", 6) + b"cuda:5"))
    assert_same(read_published_checkpoint(path).state_dict, before.state_dict)


# What is refused


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("hypernet", "per_rank_gen", False),
        ("hypernet", "per_layer_processing", True),
        ("hypernet", "extra_modules", ["lm_head"]),
        ("hypernet", "layer_indices", torch.tensor([0, 1, 2, 4])),
        ("hypernet", "layer_indices", torch.tensor([0, 1, 2])),
        ("hypernet", "layer_indices", [[0]]),
        ("aggregator", "shared_weights", True),
        ("aggregator", "layer_to_layer_ctx_encoder", False),
        ("aggregator", "aggregator_type", "pooler"),
        ("encoder", "ctx_encoder_type", "early_exit"),
        ("encoder", "layer_idx", 0),
        ("encoder", "quantize_ctx_encoder", True),
        ("encoder", "ctx_encoder_model_name_or_path", "somebody/else"),
        ("lora", "use_dora", True),
        ("lora", "rank_pattern", {"down_proj": 2}),
        ("lora", "lora_alpha", "128"),
        ("lora", "target_modules", {"mlp.down_proj"}),
    ],
)
def test_fields_no_released_checkpoint_has_are_refused_by_name(
    draft: Draft, tmp_path: Path, part: str, field: str, value: Any
) -> None:
    getattr(draft, part)[field] = value
    shown = "" if isinstance(value, torch.Tensor) else repr(value)
    with pytest.raises(PublishedCheckpointError, match=rf"{field}.*{'' if '{' in shown or '[' in shown else shown}"):
        read_published_checkpoint(draft.save(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("part", "field"),
    [("hypernet", "latent_size"), ("hypernet", "base_hidden_size"), ("hypernet", "num_pre_head_layers")]
    + [("aggregator", f) for f in ("num_layers", "num_modules", "output_size", "feature_size", "lora_r")]
    + [("aggregator", f) for f in ("n_latent_queries", "num_blocks", "num_self_attn_per_block")]
    + [("lora", "r")],
)
def test_a_config_that_contradicts_the_tensors_is_refused(draft: Draft, tmp_path: Path, part: str, field: str) -> None:
    getattr(draft, part)[field] = 77
    with pytest.raises(PublishedCheckpointError, match=rf"\.{field} is 77, but the tensors say"):
        read_published_checkpoint(draft.save(tmp_path / "a.pt"))


def test_every_tensor_is_needed_and_no_other(parity_dir: Path) -> None:
    tensors = published_draft(parity_dir, "r4_down").tensors
    for name in tensors:
        rest = {k: v for k, v in tensors.items() if k != name}
        try:
            state = convert_state_dict(rest, **FIELDS)
        except PublishedCheckpointError:
            continue
        # Without a config a missing context norm or residual MLP may look like another structure; never like this one.
        assert state.keys() != convert_state_dict(tensors, **FIELDS).keys()
    with pytest.raises(PublishedCheckpointError, match="unexpected.*surplus"):
        convert_state_dict({**tensors, "surplus": torch.zeros(1)}, **FIELDS)


def test_every_shape_counts(parity_dir: Path, tmp_path: Path) -> None:
    for name in list(published_draft(parity_dir).tensors):
        draft = published_draft(parity_dir)
        draft.tensors[name] = draft.tensors[name].repeat(2, *[1] * (draft.tensors[name].dim() - 1))
        with pytest.raises(PublishedCheckpointError):
            read_published_checkpoint(draft.save(tmp_path / "a.pt"))
        draft.tensors[name] = draft.tensors[name].flatten()[None, None, None, None]
        with pytest.raises(PublishedCheckpointError):
            read_published_checkpoint(draft.save(tmp_path / "a.pt"))


def test_values_that_are_no_weights_are_refused(draft: Draft, tmp_path: Path) -> None:
    name = "bias_B.down_proj"
    good = draft.tensors[name]
    draft.tensors[name] = good.clone().index_fill(0, torch.tensor(0), float("nan"))
    with pytest.raises(PublishedCheckpointError, match=f"{name}.*NaN"):
        read_published_checkpoint(draft.save(tmp_path / "nan.pt"))
    draft.tensors[name] = torch.zeros_like(good, dtype=torch.int64)
    with pytest.raises(PublishedCheckpointError, match=f"{name}.*not a float32 tensor"):
        read_published_checkpoint(draft.save(tmp_path / "int.pt"))
    draft.tensors[name] = good.half()
    with pytest.raises(PublishedCheckpointError, match="torch.HalfStorage"):
        read_published_checkpoint(draft.save(tmp_path / "half.pt"))


def test_tensors_that_swell_or_share_memory_are_refused(draft: Draft, tmp_path: Path) -> None:
    good = dict(draft.tensors)
    draft.tensors["bias_A.down_proj"] = torch.zeros(1).expand_as(good["bias_A.down_proj"])
    with pytest.raises(PublishedCheckpointError, match="declare"):
        read_published_checkpoint(draft.save(tmp_path / "expanded.pt"))
    first, second = (f"aggregator.perceiver.{s}.layers.0.self_attn.q_proj.weight" for s in ("encoder", "decoder"))
    draft.tensors = {**good, first: good[second]}
    with pytest.raises(PublishedCheckpointError, match="share"):
        read_published_checkpoint(draft.save(tmp_path / "shared.pt"))
