"""Modeling: turns the checkpoints (`*.pt`) of the published implementation of Video2LoRA into ours.

A file holds the hypernetwork's parameters under their published names and four config objects. What the config says is
checked against the tensors' shapes, so that a misread field cannot become a wrong adapter.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import torch

from .published_file import ConfigObject, DeclaredTensor, Entries, PublishedArchive, PublishedCheckpointError

# Written into the published code rather than into its files; ours are configurable, with these defaults.
NUM_HEADS, NUM_KEY_VALUE_HEADS, HEAD_DIM = 16, 4, 128
MLP_FACTOR = 4

# Field -> the values whose meaning is known. A field that is absent passes: the tensors' names and shapes decide.
_KNOWN_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "HypernetConfig": {"per_rank_gen": (True,), "per_layer_processing": (False,), "extra_modules": (None,)},
    "AggregatorConfig": {
        "aggregator_type": ("perceiver",),
        "per_rank_gen": (True,),
        "shared_weights": (False,),
        "layer_to_layer_ctx_encoder": (True,),
        "num_extra_modules": (0,),
    },
    "CtxEncoderArguments": {
        "ctx_encoder_type": ("per_layer_activations",),
        "layer_idx": (None,),
        "quantize_ctx_encoder": (False,),
        "ctx_encoder_last_layer": (None,),
    },
    "LoraConfig": {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "use_dora": (False,),
        "lora_bias": (False,),
        "fan_in_fan_out": (False,),
        "rank_pattern": ({}, None),
        "alpha_pattern": ({}, None),
        "layers_to_transform": (None,),
        "layer_replication": (None,),
        "modules_to_save": (None,),
        "exclude_modules": (None,),
        "target_parameters": (None,),
    },
}

_LAYER_NAMES = {
    "input_latents_layernorm": "latent_norm",
    "input_context_layernorm": "context_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "o_proj",
    "post_attention_layernorm": "post_attention_norm",
    "pre_ff_layernorm": "pre_mlp_norm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "post_ff_layernorm": "post_mlp_norm",
}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published checkpoint in our terms.

    Attributes:
        config: keyword arguments for `Video2LoraConfig`, without `vlm_config`.
        state_dict: state dict of `Hypernetwork`: float32, on the CPU, contiguous.
        num_layers: decoder layers of the base (all are adapted).
        hidden_size: hidden size of the base's text model.
        in_features: input width of each target module.
        out_features: output width of each target module.
    """

    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    num_layers: int
    hidden_size: int
    in_features: dict[str, int]
    out_features: dict[str, int]


def read_published_checkpoint(path: str | os.PathLike[str]) -> PublishedCheckpoint:
    """Read a checkpoint (`*.pt`) of the published implementation; nothing in the file is imported or executed.

    Unknown config fields are ignored. `dropout_rate` and `lora_dropout` are too: they act in the published training
    only. A value that no released checkpoint has, so that its meaning is not verified, is refused by name.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        PublishedCheckpointError: it is not such a checkpoint, is damaged, asks for a foreign global, or its config and
            tensors do not agree.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    if not path.is_file():
        raise PublishedCheckpointError(f"{str(path)!r} is not a file; give the `*.pt` file itself.")
    try:
        with path.open("rb") as file:
            return _read(file)
    except PublishedCheckpointError as error:
        raise PublishedCheckpointError(f"cannot read {str(path)!r} as a published checkpoint: {error}") from error


def convert_state_dict(
    published: Mapping[str, torch.Tensor],
    *,
    target_modules: Sequence[str],
    in_features: Mapping[str, int],
    out_features: Mapping[str, int],
) -> dict[str, torch.Tensor]:
    """Rename and reshape parameters of the published hypernetwork into the state dict of our `Hypernetwork`.

    The head of several modules becomes one tensor a module, without the columns the published code never reads.
    Tensors that already have the right form share memory with `published`.

    Args:
        published: parameters by published name; an `_orig_mod.` of `torch.compile` is stripped.
        target_modules: module names; their sorted order is the published module axis.
        in_features: input width of each.
        out_features: output width of each.

    Raises:
        PublishedCheckpointError: a tensor is missing, unexpected, not finite, or of a shape the others contradict.
    """
    tensors = _strip_compile_prefix(published)
    modules = sorted(target_modules)
    sizes = _Sizes.measure({name: tuple(tensor.shape) for name, tensor in tensors.items()}, modules)
    table = _name_table(sizes, modules, in_features, out_features)
    _check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, table)
    converted: dict[str, torch.Tensor] = {}
    for name, (ours, _) in table.items():
        tensor = tensors[name].detach().to("cpu", torch.float32)
        if not torch.isfinite(tensor).all():
            raise PublishedCheckpointError(f"tensor {name!r} holds NaN or infinite values.")
        if name == "head.weight":
            per_module = [tensor] if len(modules) == 1 else list(tensor.unbind(1))
            for module, weight in zip(modules, per_module, strict=True):
                converted[f"head.{module}"] = weight[..., : in_features[module] + out_features[module]].contiguous()
        elif name.startswith("scaler_"):
            converted[ours] = tensor.reshape(sizes.num_layers, sizes.rank)
        else:
            converted[ours] = tensor.contiguous()
    return _own_memory(converted)


def _own_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share their storage with another or use part of it: safetensors refuses both."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
        seen.add(tensors[name].untyped_storage().data_ptr())
    return tensors


# The config objects


def _read(file: io.BufferedReader) -> PublishedCheckpoint:
    archive = PublishedArchive(file)
    content = archive.load()
    if not isinstance(content, Entries) or not {"hypernet_config", "ctx_encoder_args"} <= content.keys():
        raise PublishedCheckpointError(
            "it holds no 'hypernet_config' and 'ctx_encoder_args'. Give the `<name>.pt` of a hypernetwork; "
            "`<name>.trainer.pt` is the optimizer's state."
        )
    base = content.pop("base_model_name_or_path", None)
    hypernet = _known_fields(content.pop("hypernet_config"), "HypernetConfig")
    aggregator = _known_fields(hypernet.get("aggregator_config"), "AggregatorConfig")
    lora = _known_fields(hypernet.get("lora_config"), "LoraConfig")
    context = _known_fields(content.pop("ctx_encoder_args"), "CtxEncoderArguments")
    _check_base(base, context)
    declared, use_static_lora = _declared_parameters(content, hypernet)
    modules = _target_modules(lora)
    in_features, out_features = _feature_sizes(hypernet, modules)
    shapes = {name: value.shape for name, value in declared.items()}
    sizes = _Sizes.measure(shapes, modules)
    _check_shapes(shapes, _name_table(sizes, modules, in_features, out_features))
    _check_config(archive, sizes, hypernet, aggregator, lora)
    archive.check_total(declared.values())
    tensors = {name: archive.tensor(name, value) for name, value in declared.items()}
    return PublishedCheckpoint(
        config={
            "base_model_name_or_path": base,
            "rank": sizes.rank,
            "lora_scaling": _scaling(lora),
            "target_modules": modules,
            "use_static_lora": use_static_lora,
            "latent_size": sizes.latent_size,
            "num_latents": sizes.num_latents,
            "num_blocks": sizes.num_blocks,
            "num_self_attn_per_block": sizes.num_self_attn_per_block,
            "num_pre_head_layers": sizes.num_pre_head_layers,
        },
        state_dict=convert_state_dict(
            tensors, target_modules=modules, in_features=in_features, out_features=out_features
        ),
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        in_features=in_features,
        out_features=out_features,
    )


def _check_base(base: Any, context: Mapping[str, Any]) -> None:
    if base is not None and type(base) is not str:
        raise PublishedCheckpointError(f"base_model_name_or_path is {short_repr(base)}, expected a name.")
    encoder = context.get("ctx_encoder_model_name_or_path")
    if encoder not in (None, "precomputed", base):
        raise PublishedCheckpointError(
            f"ctx_encoder_model_name_or_path is {short_repr(encoder)}: the video is read by another model than "
            f"the one adapted ({base!r}), which is not supported."
        )


def _declared_parameters(
    content: Mapping[Any, Any], hypernet: Mapping[str, Any]
) -> tuple[dict[str, DeclaredTensor], bool]:
    """Parameters by published name, and whether there is a static part; without one, biases are left out."""
    for name, value in content.items():
        if type(name) is not str or type(value) is not DeclaredTensor or value.storage.dtype != torch.float32:
            raise PublishedCheckpointError(f"entry {short_repr(name)} is not a float32 tensor.")
    declared = _strip_compile_prefix(content)
    biases = [name for name in declared if name.startswith(("bias_A.", "bias_B."))]
    use_static_lora = hypernet.get("use_bias", bool(biases))
    if type(use_static_lora) is not bool:
        raise PublishedCheckpointError(f"use_bias is {short_repr(use_static_lora)}, expected a bool.")
    if not use_static_lora:  # the published code would not read them either
        declared = {name: value for name, value in declared.items() if name not in biases}
    return declared, use_static_lora


def _scaling(lora: Mapping[str, Any]) -> float:
    """The direct multiplier s, which published files keep in `lora_alpha`."""
    scaling = lora.get("lora_alpha")
    if not isinstance(scaling, (int, float)) or not 0 < scaling < 1e9:
        raise PublishedCheckpointError(f"LoraConfig.lora_alpha is {short_repr(scaling)}, expected a positive number.")
    return float(scaling)


def _known_fields(value: Any, kind: str) -> dict[str, Any]:
    """Fields of a config object, after a check of those whose other values are refused."""
    if not isinstance(value, ConfigObject) or type(value).__name__ != kind:
        raise PublishedCheckpointError(f"expected a {kind}, found {short_repr(value)}.")
    fields: dict[str, Any] = getattr(value, "fields", {})
    for name, known in _KNOWN_VALUES[kind].items():
        if name in fields and fields[name] not in known:
            raise PublishedCheckpointError(
                f"{kind}.{name} is {short_repr(fields[name])}; only {known[0]!r} is supported, the value in every "
                "file this reader was checked against."
            )
    return fields


def _target_modules(lora: Mapping[str, Any]) -> list[str]:
    names = lora.get("target_modules")
    if not isinstance(names, (frozenset, list, tuple)) or not names:
        raise PublishedCheckpointError(f"LoraConfig.target_modules is {short_repr(names)}, expected a set of names.")
    if any(type(name) is not str or not name or "." in name for name in names):
        raise PublishedCheckpointError(f"LoraConfig.target_modules is {short_repr(names)}, expected undotted names.")
    return sorted(set(names))


def _feature_sizes(hypernet: Mapping[str, Any], modules: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Input and output widths of the target modules."""
    pair = hypernet.get("feature_sizes")
    if type(pair) is not tuple or len(pair) != 2:
        raise PublishedCheckpointError(f"HypernetConfig.feature_sizes is {short_repr(pair)}, expected two dicts.")
    for widths in pair:
        numbers = isinstance(widths, dict) and all(type(n) is int and n > 0 for n in widths.values())
        if not numbers or set(widths) != set(modules):
            raise PublishedCheckpointError(
                f"HypernetConfig.feature_sizes is {short_repr(pair)}, expected a positive width for each of {modules}."
            )
    return {m: pair[0][m] for m in modules}, {m: pair[1][m] for m in modules}


def _check_config(
    archive: PublishedArchive,
    sizes: _Sizes,
    hypernet: Mapping[str, Any],
    aggregator: Mapping[str, Any],
    lora: Mapping[str, Any],
) -> None:
    """Raise where a number in the config is not the one of the tensors."""
    claims = [
        (hypernet, "HypernetConfig.latent_size", sizes.latent_size),
        (hypernet, "HypernetConfig.base_hidden_size", sizes.hidden_size),
        (hypernet, "HypernetConfig.num_pre_head_layers", sizes.num_pre_head_layers),
        (hypernet, "HypernetConfig.use_bias", sizes.has_bias),
        (aggregator, "AggregatorConfig.num_layers", sizes.num_layers),
        (aggregator, "AggregatorConfig.num_modules", sizes.num_modules),
        (aggregator, "AggregatorConfig.output_size", sizes.latent_size),
        (aggregator, "AggregatorConfig.feature_size", sizes.hidden_size),
        (aggregator, "AggregatorConfig.lora_r", sizes.rank),
        (aggregator, "AggregatorConfig.n_latent_queries", sizes.num_latents),
        (aggregator, "AggregatorConfig.num_blocks", sizes.num_blocks),
        (aggregator, "AggregatorConfig.num_self_attn_per_block", sizes.num_self_attn_per_block),
        (lora, "LoraConfig.r", sizes.rank),
    ]
    for fields, name, measured in claims:
        value = fields.get(name.split(".")[1], measured)
        if value != measured:
            raise PublishedCheckpointError(f"{name} is {short_repr(value)}, but the tensors say {measured}.")
    indices = hypernet.get("layer_indices")
    if type(indices) is DeclaredTensor:
        if len(indices.shape) != 1 or indices.storage.dtype != torch.int64:
            raise PublishedCheckpointError("HypernetConfig.layer_indices is not a vector of integers.")
        indices = archive.tensor("layer_indices", indices).tolist()
    if indices is not None and indices not in (every := list(range(sizes.num_layers)), tuple(every)):
        raise PublishedCheckpointError(
            f"HypernetConfig.layer_indices is {short_repr(indices)}; only all layers, 0 to {sizes.num_layers - 1}, "
            "are supported: what the published code reads for a subset is not verified."
        )


# The tensors' names and shapes


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a hypernetwork, as its tensors have them."""

    num_layers: int
    num_modules: int
    rank: int
    hidden_size: int
    latent_size: int
    num_latents: int
    num_blocks: int
    num_self_attn_per_block: int
    num_pre_head_layers: int
    has_bias: bool

    @classmethod
    def measure(cls, shapes: Mapping[str, tuple[int, ...]], modules: Sequence[str]) -> _Sizes:
        """Read the sizes off the names and shapes that set them; `_check_shapes` then checks all the others."""
        prefix = "aggregator.perceiver."

        def shape(name: str, dimensions: int) -> tuple[int, ...]:
            if name not in shapes:
                raise PublishedCheckpointError(f"there is no tensor {name!r}.")
            if len(shapes[name]) != dimensions:
                raise PublishedCheckpointError(
                    f"tensor {name!r} has shape {list(shapes[name])}, expected {dimensions} dimensions."
                )
            return shapes[name]

        def count(pattern: str) -> int:
            numbers = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
            if numbers != set(range(len(numbers))):
                raise PublishedCheckpointError(f"tensors {pattern!r} are numbered {short_repr(sorted(numbers))}.")
            return len(numbers)

        layers = count(r"aggregator\.perceiver\.encoder\.layers\.(\d{1,6})\.")
        is_cross = [f"{prefix}encoder.layers.{i}.input_context_layernorm.weight" in shapes for i in range(layers)]
        period = len(is_cross) // max(sum(is_cross), 1)
        if not layers or is_cross != [i % period == 0 for i in range(layers)] or layers % period:
            raise PublishedCheckpointError(
                f"the encoder's {layers} layers are not blocks of one cross-attention layer and equally many "
                "self-attention layers."
            )
        num_latents, latent_size = shape(f"{prefix}encoder.latents_q", 2)
        queries, rest = divmod(shape(f"{prefix}decoder.latents_q", 2)[0], len(modules))
        if rest:
            raise PublishedCheckpointError(f"the decoder's queries do not divide by the target modules {modules}.")
        return cls(
            num_layers=shape("head.weight", 3 if len(modules) == 1 else 4)[0],
            num_modules=len(modules),
            rank=queries,
            hidden_size=shape(f"{prefix}modality_projection.gate_proj.weight", 2)[1],
            latent_size=latent_size,
            num_latents=num_latents,
            num_blocks=sum(is_cross),
            num_self_attn_per_block=period - 1,
            num_pre_head_layers=count(r"layers\.(\d{1,6})\."),
            has_bias=any(name.startswith(("bias_A.", "bias_B.")) for name in shapes),
        )


def _name_table(
    sizes: _Sizes, modules: Sequence[str], in_features: Mapping[str, int], out_features: Mapping[str, int]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published name -> our name and the published shape, for every tensor of a hypernetwork of these sizes."""
    d, h, depth, rank = sizes.latent_size, sizes.hidden_size, sizes.num_layers, sizes.rank
    published, ours = "aggregator.perceiver", "perceiver"
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for projection, shape in _mlp_shapes(h, d).items():
        table[f"{published}.modality_projection.{projection}"] = (f"{ours}.modality_projection.{projection}", shape)
    period = 1 + sizes.num_self_attn_per_block
    stacks = {"encoder": (sizes.num_latents, sizes.num_blocks * period), "decoder": (sizes.num_modules * rank, 1)}
    for stack, (latents, layers) in stacks.items():
        table[f"{published}.{stack}.latents_q"] = (f"{ours}.{stack}.latents", (latents, d))
        table[f"{published}.{stack}.layernorm.weight"] = (f"{ours}.{stack}.norm.weight", (d,))
        for i in range(layers):
            for name, (new_name, shape) in _layer_table(d, is_cross=i % period == 0).items():
                table[f"{published}.{stack}.layers.{i}.{name}"] = (f"{ours}.{stack}.layers.{i}.{new_name}", shape)
    wide = MLP_FACTOR * d
    residual = {"0": ("norm_in", (d,), d), "2": ("linear_in", (wide, d), wide)}
    residual |= {"5": ("linear_out", (d, wide), d), "6": ("norm_out", (d,), d)}
    for j in range(sizes.num_pre_head_layers):
        for index, (name, weight, bias) in residual.items():
            table[f"layers.{j}.mlp.{index}.weight"] = (f"residual_mlps.{j}.{name}.weight", weight)
            table[f"layers.{j}.mlp.{index}.bias"] = (f"residual_mlps.{j}.{name}.bias", (bias,))
    d_lora = max(in_features[m] + out_features[m] for m in modules)
    table["head.weight"] = ("head", (depth, d, d_lora) if len(modules) == 1 else (depth, len(modules), d, d_lora))
    for m in modules:
        for side, width in (("A", in_features[m]), ("B", out_features[m])):
            table[f"scaler_{side}.{m}"] = (f"scaler_{side}.{m}", (1, depth, rank, 1))
            if sizes.has_bias:
                table[f"bias_{side}.{m}"] = (f"bias_{side}.{m}", (depth, rank, width))
    return table


def _mlp_shapes(width_in: int, width_out: int) -> dict[str, tuple[int, ...]]:
    wide = MLP_FACTOR * width_in
    return {
        "gate_proj.weight": (wide, width_in),
        "up_proj.weight": (wide, width_in),
        "down_proj.weight": (width_out, wide),
    }


def _layer_table(d: int, is_cross: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published name -> our name and shape inside one perceiver layer."""
    queries, keys = NUM_HEADS * HEAD_DIM, NUM_KEY_VALUE_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, d),
        "self_attn.k_proj": (keys, d),
        "self_attn.v_proj": (keys, d),
        "self_attn.o_proj": (d, queries),
    }
    shapes |= {f"mlp.{name.removesuffix('.weight')}": shape for name, shape in _mlp_shapes(d, d).items()}
    names = {old: new for old, new in _LAYER_NAMES.items() if is_cross or old != "input_context_layernorm"}
    return {f"{old}.weight": (f"{new}.weight", shapes.get(old, (d,))) for old, new in names.items()}


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], table: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise unless exactly the tensors of the table are there, in its shapes."""
    missing = [name for name in table if name not in shapes]
    unexpected = [name for name in shapes if name not in table]
    if missing or unexpected:
        raise PublishedCheckpointError(
            f"its tensors are not those of the hypernetwork: missing {short_repr(missing)}, "
            f"unexpected {short_repr(unexpected)}."
        )
    for name, (_, expected) in table.items():
        if tuple(shapes[name]) != expected:
            raise PublishedCheckpointError(
                f"tensor {name!r} has shape {list(shapes[name])}, expected {list(expected)} by the other tensors."
            )


def _strip_compile_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Names without the `_orig_mod.` that `torch.compile` puts into them."""
    stripped = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    if len(stripped) != len(tensors):
        raise PublishedCheckpointError("two tensors have the same name once '_orig_mod.' is stripped.")
    return stripped
