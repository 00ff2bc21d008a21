"""Writes files in the published layout, made here because a pickle is nothing to commit."""

from __future__ import annotations

import json
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file


def _config_class(module: str, name: str) -> type:
    return type(name, (), {"__module__": module})


HypernetConfig = _config_class("ctx_to_lora.modeling.hypernet", "HypernetConfig")
AggregatorConfig = _config_class("ctx_to_lora.modeling.aggregator", "AggregatorConfig")
CtxEncoderArguments = _config_class("ctx_to_lora.configs", "CtxEncoderArguments")


def _with_fields(kind: type, fields: dict[str, Any]) -> Any:
    value = kind()
    value.__dict__.update(fields)
    return value


class Draft:
    """What a published file is made of, to be changed by a test before it is saved."""

    def __init__(self, tensors: dict[str, torch.Tensor], case: dict[str, Any]) -> None:
        self.tensors = tensors
        self.case = case
        modules = case["target_modules_sorted"]
        layers = case["n_layers"]
        self.base = case["base_model_name_or_path"]
        self.aggregator = dict(case["aggregator_config"])
        self.encoder = dict(case["ctx_encoder_args"])
        self.lora: dict[str, Any] = {}
        self.lora_config = LoraConfig(
            r=case["lora_r"],
            lora_alpha=case["lora_scaling_multiplier"],
            target_modules=list(modules),
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.base,
        )
        self.hypernet: dict[str, Any] = {
            "latent_size": case["latent_size"],
            "use_light_weight_lora": False,
            "light_weight_latent_size": 128,
            "per_rank_gen": True,
            "use_per_rank_bias": False,
            "use_token_mixing": False,
            "use_bias": case["use_bias"],
            "per_layer_processing": False,
            "num_pre_head_layers": case["num_pre_head_layers"],
            "dropout_rate": 0.0,
            "extra_modules": None,
            "base_hidden_size": self.aggregator["feature_size"],
            "layer_indices": torch.arange(layers),
            "feature_sizes": (dict(case["d_in"]), dict(case["d_out"])),
        }
        self.extra: dict[str, Any] = {}

    def save(self, path: Path) -> Path:
        self.lora_config.__dict__.update(self.lora)
        content: OrderedDict[str, Any] = OrderedDict(self.tensors)
        content._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
        content["base_model_name_or_path"] = self.base
        aggregator = _with_fields(AggregatorConfig, self.aggregator)
        fields = {**self.hypernet, "lora_config": self.lora_config, "aggregator_config": aggregator}
        content["hypernet_config"] = _with_fields(HypernetConfig, fields)
        content["ctx_encoder_args"] = _with_fields(CtxEncoderArguments, self.encoder)
        content.update(self.extra)
        with pytest.MonkeyPatch.context() as patch:
            for kind in (HypernetConfig, AggregatorConfig, CtxEncoderArguments):
                parts = kind.__module__.split(".")
                for end in range(1, len(parts) + 1):
                    name = ".".join(parts[:end])
                    if name not in sys.modules:
                        patch.setitem(sys.modules, name, types.ModuleType(name))
                patch.setattr(sys.modules[kind.__module__], kind.__name__, kind, raising=False)
            torch.save(content, path)
        return path


def published_draft(parity_dir: Path, name: str = "r16_down") -> Draft:
    tensors = {k: v.float() for k, v in load_file(parity_dir / name / "hypernet.safetensors").items()}
    return Draft(tensors, json.loads((parity_dir / name / "case.json").read_text()))


def random_draft(
    *, modules: dict[str, tuple[int, int]], blocks: int = 1, self_attn: int = 0, mlps: int = 1, bias: bool = True
) -> Draft:
    """A random hypernetwork of any structure under published names, as the published format is described."""
    h, d, layers, rank, latents = 24, 4, 3, 2, 5
    count, d_lora = len(modules), max(i + o for i, o in modules.values())
    shapes: dict[str, tuple[int, ...]] = {}
    p = "aggregator.perceiver."
    for name, shape in {"gate_proj": (4 * h, h), "up_proj": (4 * h, h), "down_proj": (d, 4 * h)}.items():
        shapes[f"{p}modality_projection.{name}.weight"] = shape

    def stack(name: str, queries: int, crosses: list[bool]) -> None:
        shapes[f"{p}{name}.latents_q"] = (queries, d)
        for i, cross in enumerate(crosses):
            norms = ["input_latents", "input_context"] if cross else ["input_latents"]
            for norm in [*norms, "post_attention", "pre_ff", "post_ff"]:
                shapes[f"{p}{name}.layers.{i}.{norm}_layernorm.weight"] = (d,)
            for proj, shape in {"q": (2048, d), "k": (512, d), "v": (512, d), "o": (d, 2048)}.items():
                shapes[f"{p}{name}.layers.{i}.self_attn.{proj}_proj.weight"] = shape
            for proj, shape in {"gate": (4 * d, d), "up": (4 * d, d), "down": (d, 4 * d)}.items():
                shapes[f"{p}{name}.layers.{i}.mlp.{proj}_proj.weight"] = shape
        shapes[f"{p}{name}.layernorm.weight"] = (d,)

    stack("encoder", latents, ([True] + [False] * self_attn) * blocks)
    stack("decoder", count * rank, [True])
    for j in range(mlps):
        for index, shape in {0: (d,), 2: (4 * d, d), 5: (d, 4 * d), 6: (d,)}.items():
            shapes[f"layers.{j}.mlp.{index}.weight"] = shape
            shapes[f"layers.{j}.mlp.{index}.bias"] = shape[:1]
    shapes["head.weight"] = (layers, d, d_lora) if count == 1 else (layers, count, d, d_lora)
    for name, (d_in, d_out) in modules.items():
        shapes[f"scaler_A.{name}"] = shapes[f"scaler_B.{name}"] = (1, layers, rank, 1)
        if bias:
            shapes[f"bias_A.{name}"], shapes[f"bias_B.{name}"] = (layers, rank, d_in), (layers, rank, d_out)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    aggregator = {"aggregator_type": "perceiver", "num_layers": layers, "num_modules": count, "num_extra_modules": 0}
    aggregator |= {"output_size": d, "feature_size": h, "lora_r": rank, "per_rank_gen": True}
    aggregator |= {"n_latent_queries": latents, "num_blocks": blocks, "num_self_attn_per_block": self_attn}
    aggregator |= {"shared_weights": False, "layer_to_layer_ctx_encoder": True}
    case = {
        "base_model_name_or_path": "somebody/base",
        "lora_r": rank,
        "lora_scaling_multiplier": 2 * rank**1.5,
        "target_modules_sorted": sorted(modules),
        "latent_size": d,
        "n_layers": layers,
        "d_in": {name: i for name, (i, _) in modules.items()},
        "d_out": {name: o for name, (_, o) in modules.items()},
        "num_pre_head_layers": mlps,
        "use_bias": bias,
        "aggregator_config": aggregator,
        "ctx_encoder_args": {"ctx_encoder_type": "per_layer_activations", "layer_idx": None},
    }
    return Draft(tensors, case)


def rewrite_member(path: Path, change: Any, member: str = "data.pkl", **kwargs: Any) -> None:
    """Replace a member's bytes by `change(bytes)`; `None` leaves the member out."""
    with zipfile.ZipFile(path) as archive:
        content = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for name, data in content:
            new = change(data) if name.endswith(f"/{member}") else data
            if new is not None:
                archive.writestr(name, new)


def assert_same(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, others[name]), name
