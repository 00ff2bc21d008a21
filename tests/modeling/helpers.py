"""Helpers of the modeling tests: hypernetworks that do something, and the naive way to do what the model does."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from video2lora.modeling import LoraTargets, LoraWeights

# Small, and with numbers that are all different where they may be.
SMALL: dict[str, Any] = {
    "rank": 3,
    "latent_size": 24,
    "num_latents": 5,
    "num_blocks": 2,
    "perceiver_num_heads": 4,
    "perceiver_num_key_value_heads": 2,
    "perceiver_head_dim": 8,
    "num_frames": 3,
}


def awaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter away from its initial value, so that adapters are as large as the base's weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if name.startswith(("bias_A", "bias_B")):
                parameter.copy_(0.1 * noise)
            elif name.startswith(("scaler_A", "scaler_B")):
                parameter.copy_(0.3 + 0.1 * noise)
            else:
                parameter.add_(0.1 * noise)
    return module


def random_lora(targets: LoraTargets, batch: int, rank: int = 4, seed: int = 0, scaling: float = 3.0) -> LoraWeights:
    """Adapters whose change is about as large as the weights of a tiny base."""
    generator = torch.Generator().manual_seed(seed)

    def draw(sizes: dict[str, int]) -> dict[str, Tensor]:
        layers = len(targets.layer_indices)
        return {n: 0.08 * torch.randn(batch, layers, rank, sizes[n], generator=generator) for n in targets.paths}

    return LoraWeights(draw(targets.in_features), draw(targets.out_features), scaling, (rank,) * batch)


def merged(vlm: nn.Module, targets: LoraTargets, *adapters: LoraWeights) -> nn.Module:
    """A copy of `vlm` with `scaling * B^T A` of adapters of one sample each added to its weights."""
    copied = copy.deepcopy(vlm)
    for adapter in adapters:
        assert len(adapter) == 1
        for name, paths in targets.paths.items():
            for place, path in enumerate(paths):
                a, b = adapter.lora_A[name][0, place], adapter.lora_B[name][0, place]
                weight = copied.get_submodule(path).weight
                weight.data += (adapter.scaling * (b.T @ a)).to(weight.dtype)
    return copied


def num_hooks(module: nn.Module) -> int:
    """Forward hooks and pre-hooks of a module and everything in it, but those transformers keeps for its outputs."""
    hooks = [
        hook for m in module.modules() for kind in (m._forward_hooks, m._forward_pre_hooks) for hook in kind.values()
    ]
    return sum(not getattr(hook, "__module__", "").startswith("transformers") for hook in hooks)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer (buffers that are not saved included)."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Every parameter and buffer is bit for bit what it was."""
    after = snapshot(module)
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed


def assert_same_lora(ours: LoraWeights, theirs: LoraWeights, atol: float = 0.0) -> None:
    """The same adapters, to `atol`."""
    assert ours.ranks == theirs.ranks and ours.scaling == theirs.scaling and ours.static_rank == theirs.static_rank
    assert ours.lora_A.keys() == theirs.lora_A.keys()
    for name in ours.lora_A:
        torch.testing.assert_close(ours.lora_A[name], theirs.lora_A[name], atol=atol, rtol=0)
        torch.testing.assert_close(ours.lora_B[name], theirs.lora_B[name], atol=atol, rtol=0)


def text_batch(rows: int, tokens: int = 9, seed: int = 0) -> Tensor:
    """Random printable bytes as token ids `[rows, tokens]`; the tiny models have 256 of them behind a few tokens."""
    return torch.randint(40, 100, (rows, tokens), generator=torch.Generator().manual_seed(seed))
