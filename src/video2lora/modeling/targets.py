"""Modeling: which Linear modules of a vision-language model an adapter changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LoraTargets:
    """The target modules of an adapter, resolved on one base.

    Attributes:
        layer_indices: decoder layers that are adapted, in ascending order.
        paths: for each target module name, the full module path inside the VLM for each of those layers.
        in_features: input width d_in of each target module.
        out_features: output width d_out of each target module.
    """

    layer_indices: tuple[int, ...]
    paths: dict[str, tuple[str, ...]]
    in_features: dict[str, int]
    out_features: dict[str, int]

    @property
    def module_names(self) -> tuple[str, ...]:
        """Target module names, sorted: the order of the hypernetwork's queries."""
        return tuple(self.paths)

    def all_paths(self) -> tuple[str, ...]:
        """Every adapted module's path, sorted."""
        return tuple(sorted(path for paths in self.paths.values() for path in paths))


def base_fingerprint(vlm: nn.Module, targets: LoraTargets) -> str | None:
    """SHA-256 of a base's first and last adapted weight, in bfloat16: the same whatever dtype it is loaded in.

    None where the weights are not there as they were trained: quantised, in float16, or on the meta device.
    """
    digest = hashlib.sha256()
    for path in (targets.all_paths()[0], targets.all_paths()[-1]):
        weight = getattr(vlm.get_submodule(path), "weight", None)  # some quantised layers have none
        if not isinstance(weight, torch.Tensor) or weight.is_meta:
            return None
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            return None
        digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def decoder_layers(vlm: nn.Module) -> nn.ModuleList:
    """The text decoder's layers of `vlm` (`vlm.get_decoder().layers`).

    Raises:
        ValueError: the model has no such list of layers.
    """
    get_decoder: Any = getattr(vlm, "get_decoder", None)
    layers = getattr(get_decoder(), "layers", None) if get_decoder is not None else None
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise ValueError(
            f"{type(vlm).__name__} has no decoder layers at `get_decoder().layers`; video2lora works on models behind "
            "AutoModelForImageTextToText whose text decoder is a list of layers."
        )
    return layers


def resolve_targets(
    vlm: nn.Module, target_modules: Sequence[str], layers_to_transform: Sequence[int] | None = None
) -> LoraTargets:
    """Find the Linear modules called `target_modules` in each decoder layer of `vlm`.

    Only the text decoder is searched: a vision tower may have modules of the same names (Qwen2.5-VL does).

    Raises:
        ValueError: a layer does not exist, or a name matches no Linear module of a layer, or more than one, or its
            size differs between layers.
    """
    layers = decoder_layers(vlm)
    indices = tuple(range(len(layers))) if layers_to_transform is None else tuple(sorted(layers_to_transform))
    if indices and not 0 <= indices[0] <= indices[-1] < len(layers):
        raise ValueError(
            f"layers_to_transform {list(indices)} must lie in 0..{len(layers) - 1}, the decoder's layers."
        )
    path_of = {id(module): name for name, module in vlm.named_modules()}
    paths: dict[str, tuple[str, ...]] = {}
    in_features: dict[str, int] = {}
    out_features: dict[str, int] = {}
    for name in sorted(set(target_modules)):
        found = [_find_linear(layers[index], name, index) for index in indices]
        sizes = {(module.in_features, module.out_features) for module in found}
        if len(sizes) != 1:
            raise ValueError(f"{name!r} has different sizes in different decoder layers: {sorted(sizes)}.")
        paths[name] = tuple(path_of[id(module)] for module in found)
        in_features[name], out_features[name] = sizes.pop()
    return LoraTargets(indices, paths, in_features, out_features)


def _find_linear(layer: nn.Module, name: str, index: int) -> nn.Linear:
    matches = [m for n, m in layer.named_modules() if n.rpartition(".")[2] == name and isinstance(m, nn.Linear)]
    if len(matches) != 1:
        if any(hasattr(m, "base_layer") for m in layer.modules()):
            raise ValueError("the base carries a PEFT adapter: pass the plain base (`unload()` gives it back).")
        linears = sorted({n.rpartition(".")[2] for n, m in layer.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"decoder layer {index} has {len(matches)} Linear modules called {name!r}, expected exactly one; "
            f"its Linear modules are {linears}."
        )
    return matches[0]
