"""Modeling: per-sample LoRA on a frozen model, as a context manager that always takes itself off again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .lora import LoraWeights
from .targets import LoraTargets


@contextmanager
def inject_lora(
    vlm: nn.Module,
    targets: LoraTargets,
    weights: LoraWeights,
    queries_per_adapter: int | Sequence[int] = 1,
) -> Iterator[None]:
    """Run `vlm` with an adapter of its own for each row of the batch, inside a `with` block.

    Forward hooks add `scaling * lora_B^T (lora_A x)` to the target modules' outputs; no weight is copied or changed,
    gradients flow into `weights`. It acts only in the thread that entered it, so several threads can share one base.

    Args:
        vlm: the frozen base.
        targets: the modules to adapt, resolved on `vlm`.
        weights: the adapters.
        queries_per_adapter: how many consecutive rows of the batch each adapter answers; one number for all, or one
            each. A single adapter answers every row. Rows multiplied by generation (beams, several sequences a
            prompt) follow their prompt.

    Raises:
        ValueError: the adapters do not fit the targets, or, inside the block, the batch does not fit the adapters.
    """
    _check_fit(targets, weights)
    counts = (
        [queries_per_adapter] * len(weights) if isinstance(queries_per_adapter, int) else list(queries_per_adapter)
    )
    if len(counts) != len(weights) or min(counts, default=1) < 1:
        raise ValueError(
            f"queries_per_adapter {counts} must hold a positive number for each of {len(weights)} adapters."
        )
    thread = threading.get_ident()
    with ExitStack() as hooks:
        for name, paths in targets.paths.items():
            for position, path in enumerate(paths):
                module = vlm.get_submodule(path)
                delta = _LoraDelta(
                    weights.lora_A[name][:, position],
                    weights.lora_B[name][:, position],
                    weights.scaling,
                    counts,
                    module,
                )

                def add_delta(module, args, output, delta=delta):
                    if threading.get_ident() != thread:
                        return None
                    return output + delta(args[0]).to(output.dtype)  # a quantised module's may not be its weight's

                hooks.callback(module.register_forward_hook(add_delta).remove)
        yield


class _LoraDelta:
    """The update of one Linear module: `scaling * lora_B^T (lora_A x)` for every row."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float, counts: list[int], module: nn.Module) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        # a quantised weight's dtype is storage, not what the module computes in
        dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else lora_A.dtype
        self.lora_A = lora_A.to(weight.device, dtype).transpose(1, 2)
        self.lora_B = (lora_B * scaling).to(weight.device, dtype)
        self.counts = counts

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"expected [rows, tokens, features] at an adapted module, got {tuple(x.shape)}.")
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        if len(self.counts) == 1:
            return (x @ self.lora_A[0]) @ self.lora_B[0]
        rows = sum(self.counts)
        if x.shape[0] % rows:
            raise ValueError(f"a batch of {x.shape[0]} rows does not fit adapters made for {rows} rows.")
        repeat = x.shape[0] // rows
        if len(set(self.counts)) == 1:
            # consecutive rows of one adapter become one longer row: no copy of the adapters
            grouped = x.reshape(len(self.counts), -1, x.shape[-1])
            return ((grouped @ self.lora_A) @ self.lora_B).view(*x.shape[:-1], -1)
        counts = torch.tensor(self.counts, device=x.device) * repeat
        lora_A = self.lora_A.repeat_interleave(counts, dim=0, output_size=x.shape[0])
        lora_B = self.lora_B.repeat_interleave(counts, dim=0, output_size=x.shape[0])
        return (x @ lora_A) @ lora_B


def _check_fit(targets: LoraTargets, weights: LoraWeights) -> None:
    expected = {
        name: (len(paths), targets.in_features[name], targets.out_features[name])
        for name, paths in targets.paths.items()
    }
    given = {name: (a.shape[1], a.shape[3], weights.lora_B[name].shape[3]) for name, a in weights.lora_A.items()}
    if expected != given:
        raise ValueError(
            f"the adapters do not fit this model: expected (layers, d_in, d_out) {expected}, got {given}. "
            "Was the adapter made for another base?"
        )
