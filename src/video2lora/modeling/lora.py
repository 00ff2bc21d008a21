"""Modeling: a batch of LoRA adapters as stacked tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class LoraWeights:
    """A batch of adapters, stacked over the adapted decoder layers.

    An adapter changes a frozen Linear `y = W x` into `y = W x + scaling * lora_B^T (lora_A x)`.

    Attributes:
        lora_A: for each target module `[batch, layers, rank, d_in]`.
        lora_B: for each target module `[batch, layers, rank, d_out]` (PEFT stores the transpose).
        scaling: the direct multiplier (not alpha / rank).
        ranks: rows each adapter really uses; the rows behind them are zero.
        static_rank: how many of those, the last ones, are the hypernetwork's static part (0: none).
    """

    lora_A: dict[str, Tensor]
    lora_B: dict[str, Tensor]
    scaling: float
    ranks: tuple[int, ...]
    static_rank: int = 0

    def __len__(self) -> int:
        return len(self.ranks)

    def __getitem__(self, index: int) -> LoraWeights:
        """Adapter `index` alone, as a batch of one without padding rows."""
        rank = self.ranks[index]
        row = range(len(self))[index]
        return LoraWeights(
            {name: a[row : row + 1, :, :rank] for name, a in self.lora_A.items()},
            {name: b[row : row + 1, :, :rank] for name, b in self.lora_B.items()},
            self.scaling,
            (rank,),
            self.static_rank,
        )

    def __iter__(self) -> Iterator[LoraWeights]:
        return (self[i] for i in range(len(self)))

    @property
    def num_layers(self) -> int:
        return next(iter(self.lora_A.values())).shape[1]

    @property
    def device(self) -> torch.device:
        return next(iter(self.lora_A.values())).device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LoraWeights:
        """The same adapters on `device`, in `dtype`."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def detach(self) -> LoraWeights:
        """The same adapters outside the autograd graph."""
        return self._map(lambda tensor: tensor.detach())

    def fold(self) -> LoraWeights:
        """The same adapters with `scaling` multiplied into `lora_B` in float32, so that the multiplier left is 1."""
        if self.scaling == 1:
            return self
        lora_B = {name: (b.float() * self.scaling).to(b.dtype) for name, b in self.lora_B.items()}
        return LoraWeights(self.lora_A, lora_B, 1.0, self.ranks, self.static_rank)

    def _map(self, fn) -> LoraWeights:
        return LoraWeights(
            {name: fn(a) for name, a in self.lora_A.items()},
            {name: fn(b) for name, b in self.lora_B.items()},
            self.scaling,
            self.ranks,
            self.static_rank,
        )


def stack_lora(parts: Sequence[LoraWeights]) -> LoraWeights:
    """Join batches of adapters of any ranks into one batch, zero rows filling the shorter ones.

    Raises:
        ValueError: nothing to join, or the parts differ in target modules or sizes.
    """
    if not parts:
        raise ValueError("expected at least one adapter to stack, got none.")
    first = parts[0]
    shapes = {n: (a.shape[1], a.shape[3], first.lora_B[n].shape[3]) for n, a in first.lora_A.items()}
    for part in parts[1:]:
        other = {n: (a.shape[1], a.shape[3], part.lora_B[n].shape[3]) for n, a in part.lora_A.items()}
        if other != shapes:
            raise ValueError(f"adapters of different targets or sizes cannot be stacked: {shapes} and {other}.")
    if any(part.scaling != first.scaling for part in parts):
        parts = [part.fold() for part in parts]
    ranks = tuple(rank for part in parts for rank in part.ranks)

    def join(tensors: list[Tensor]) -> Tensor:
        missing = [max(ranks) - t.shape[2] for t in tensors]
        # where nothing is missing, pad copies
        return torch.cat([pad(t, (0, 0, 0, n)) if n else t for t, n in zip(tensors, missing, strict=True)])

    return LoraWeights(
        {n: join([part.lora_A[n] for part in parts]) for n in shapes},
        {n: join([part.lora_B[n] for part in parts]) for n in shapes},
        parts[0].scaling,
        ranks,
        first.static_rank if len({part.static_rank for part in parts}) == 1 else 0,
    )
