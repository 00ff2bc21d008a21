"""Adapters: arithmetic on stacked low-rank factors, without ever forming the full product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..modeling.lora import LoraWeights


def concatenate_generated(parts: Sequence[LoraWeights], factors: Sequence[float]) -> LoraWeights:
    """Join the generated ranks of batches of one, each times its factor, and append the static part of the first.

    The change is `sum_i factor_i dW_generated_i + dW_static`; scaling must be 1 in all parts.
    """
    first = parts[0]
    static = first.static_rank

    def generated(tensor: Tensor, part: LoraWeights) -> Tensor:
        return tensor[:, :, : part.ranks[0] - static].to(first.device)

    def appended(tensors: dict[str, Tensor], name: str) -> Tensor:
        return tensors[name][:, :, first.ranks[0] - static :]

    lora_A, lora_B = {}, {}
    for name in first.lora_A:
        a = [generated(part.lora_A[name], part) for part in parts]
        b = [factor * generated(part.lora_B[name], part) for part, factor in zip(parts, factors, strict=True)]
        lora_A[name] = torch.cat([*a, appended(first.lora_A, name)], dim=2)
        lora_B[name] = torch.cat([*b, appended(first.lora_B, name)], dim=2)
    rank = sum(part.ranks[0] - static for part in parts) + static
    return LoraWeights(lora_A, lora_B, 1.0, (rank,), static)


def truncate(weights: LoraWeights, rank: int) -> tuple[LoraWeights, float]:
    """The best approximation of every layer's change at a lower rank (Eckart-Young), for a batch of one.

    `lora_B^T lora_A = Q_b (R_b R_a^T) Q_a^T` with a QR decomposition of each factor, then an SVD of the small core, in
    float64. Singular values are shared equally between the factors.

    Returns:
        The weights at `rank`, with no static part of their own, and the relative error in the Frobenius norm over all
        layers and modules: sqrt(sum of squares lost / sum of squares); 0 for an adapter that changes nothing.
    """
    lora_A, lora_B = {}, {}
    lost = total = 0.0
    for name, a in weights.lora_A.items():
        q_b, r_b = torch.linalg.qr(weights.lora_B[name].double().mT)  # [1, layers, d_out, rank]
        q_a, r_a = torch.linalg.qr(a.double().mT)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        lost += s[..., rank:].square().sum().item()
        total += s.square().sum().item()
        root = s[..., :rank].sqrt()
        new_a = root[..., None] * (vh[..., :rank, :] @ q_a.mT)
        new_b = root[..., None] * (q_b @ u[..., :rank]).mT
        missing = rank - root.shape[-1]  # a layer may be narrower than the rank
        lora_A[name] = pad(new_a, (0, 0, 0, missing)).to(a.dtype)
        lora_B[name] = pad(new_b, (0, 0, 0, missing)).to(a.dtype)
    error = (lost / total) ** 0.5 if total else 0.0
    return LoraWeights(lora_A, lora_B, 1.0, (rank,), 0), error
