"""Adapters: arithmetic on stacked low-rank factors, without ever forming the full product."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..modeling.lora import LoraWeights
from .errors import AdapterError


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
    float64; where the rank is no smaller than a side of the change, the SVD of the change itself. Layer by layer: all
    at once would take gigabytes for an adapter of many chunks. Singular values are shared equally between the factors.

    Returns:
        The weights at `rank`, with no static part of their own, and the relative error in the Frobenius norm over all
        layers and modules: sqrt(sum of squares lost / sum of squares); 0 for an adapter that changes nothing.
    """
    lora_A, lora_B = {}, {}
    lost = total = torch.zeros((), dtype=torch.float64, device=weights.device)
    for name in weights.lora_A:
        new_a, new_b = [], []
        for a, b in _layers(weights, name):
            u, s, vh = _svd(a, b)
            lost = lost + s[rank:].square().sum()  # read once, at the end: a GPU need not be waited for
            total = total + s.square().sum()
            root = s[:rank, None].sqrt()
            missing = (0, 0, 0, rank - len(root))  # a layer may be narrower than the rank
            new_a.append(pad(root * vh[:rank], missing).to(weights.lora_A[name]))
            new_b.append(pad(root * u[:, :rank].mT, missing).to(weights.lora_B[name]))
        lora_A[name], lora_B[name] = torch.stack(new_a)[None], torch.stack(new_b)[None]
    error = float((lost / total).sqrt()) if total else 0.0
    return LoraWeights(lora_A, lora_B, 1.0, (rank,), 0), error


def _layers(weights: LoraWeights, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The factors of each layer, `[rank, d_in]` and `[rank, d_out]`, in float64, of a batch of one."""
    if len(weights.lora_A[name]) != 1:
        raise AdapterError(f"expected the weights of one adapter, got a batch of {len(weights.lora_A[name])}.")
    for a, b in zip(weights.lora_A[name][0], weights.lora_B[name][0], strict=True):
        yield a.double(), b.double()


def _svd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of `b^T a`."""
    if len(a) >= min(a.shape[1], b.shape[1]):
        return torch.linalg.svd(b.mT @ a, full_matrices=False)
    q_b, r_b = torch.linalg.qr(b.mT)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ u, s, vh @ q_a.mT


def keep_ranks(weights: LoraWeights, ranks: Sequence[int]) -> LoraWeights:
    """The chosen generated ranks, in the order given, and the static part behind them; for a batch of one."""
    static = list(range(weights.ranks[0] - weights.static_rank, weights.ranks[0]))
    index = torch.tensor([*ranks, *static], dtype=torch.long, device=weights.device)
    lora_A = {name: tensor.index_select(2, index) for name, tensor in weights.lora_A.items()}
    lora_B = {name: tensor.index_select(2, index) for name, tensor in weights.lora_B.items()}
    return LoraWeights(lora_A, lora_B, weights.scaling, (len(index),), weights.static_rank)


def check_weights(weights: Sequence[float] | None, segments: int) -> list[float]:
    """Weights of segments as positive numbers; 1 each by default."""
    if weights is None:
        return [1.0] * segments
    if len(weights) != segments or not all(math.isfinite(w) and w > 0 for w in weights):
        raise AdapterError(f"expected {segments} positive weights, one a segment; got {list(weights)}.")
    return [float(weight) for weight in weights]


def truncate_segments(
    weights: LoraWeights, spans: Sequence[tuple[int, int]], rank: int, factors: Sequence[float]
) -> tuple[LoraWeights, list[tuple[int, int]], float]:
    """Reduce every segment by itself to its share of `rank`; the static part stays as it is, for a batch of one.

    A segment keeps its first k singular directions in every layer. The shares are those that keep most of
    `sum_segments factor^2 sum_layers sum_k s_k^2`, with at least one rank a segment; since s_k falls, taking
    the largest gain again and again finds them.

    Returns:
        The weights, the ranks of each segment in them, and the relative error of the whole change (Frobenius).
    """
    parts = [_slice(weights, start, end) for start, end in spans]
    gains = []
    for part, factor in zip(parts, factors, strict=True):
        values = [torch.linalg.svdvals(_core(part, name)) for name in part.lora_A]
        squares = [pad(v.square().sum(dim=(0, 1)), (0, part.ranks[0] - v.shape[-1])) for v in values]
        gains.append((factor**2 * torch.stack(squares).sum(0)).tolist())
    shares = _share(gains, rank - weights.static_rank)
    cut = [truncate(p, share)[0] if share < p.ranks[0] else p for p, share in zip(parts, shares, strict=True)]
    static = keep_ranks(weights, [])
    lora_A = {n: torch.cat([p.lora_A[n] for p in cut] + [static.lora_A[n]], dim=2) for n in weights.lora_A}
    lora_B = {n: torch.cat([p.lora_B[n] for p in cut] + [static.lora_B[n]], dim=2) for n in weights.lora_B}
    reduced = LoraWeights(lora_A, lora_B, weights.scaling, (sum(shares) + weights.static_rank,), weights.static_rank)
    ends = torch.tensor([0, *shares]).cumsum(0).tolist()
    less = [(part, kept) for part, kept in zip(parts, cut, strict=True) if kept is not part]
    return reduced, list(zip(ends, ends[1:], strict=False)), _relative_error(weights, less)


def _share(gains: Sequence[Sequence[float]], rank: int) -> list[int]:
    """How many of each segment's ranks to keep: one, then wherever the next gains most."""
    shares = [1] * len(gains)
    for _ in range(rank - len(gains)):
        open_ = [i for i, gain in enumerate(gains) if shares[i] < len(gain)]
        shares[max(open_, key=lambda i: gains[i][shares[i]])] += 1
    return shares


def _core(weights: LoraWeights, name: str) -> Tensor:
    """A small matrix with the singular values of each layer's change."""
    r_b = torch.linalg.qr(weights.lora_B[name].double().mT).R
    r_a = torch.linalg.qr(weights.lora_A[name].double().mT).R
    return r_b @ r_a.mT


def _slice(weights: LoraWeights, start: int, end: int) -> LoraWeights:
    """Some of the ranks, as a view."""
    lora_A = {name: tensor[:, :, start:end] for name, tensor in weights.lora_A.items()}
    lora_B = {name: tensor[:, :, start:end] for name, tensor in weights.lora_B.items()}
    return LoraWeights(lora_A, lora_B, weights.scaling, (end - start,), 0)


def _relative_error(whole: LoraWeights, less: Sequence[tuple[LoraWeights, LoraWeights]]) -> float:
    """Frobenius norm of what parts of a change have lost over that of the whole, without forming either.

    Args:
        whole: all of it.
        less: parts of it that were reduced, and what is left of each.
    """
    lost = total = 0.0
    for name in whole.lora_A:
        for layer, (a, b) in enumerate(_layers(whole, name)):
            # |B^T A|^2 = sum of (B B^T) * (A A^T)
            total += ((b @ b.mT) * (a @ a.mT)).sum().item()
            if less:
                parts = [part for pair in less for part in pair]
                signs = [1.0, -1.0] * len(less)
                a = torch.cat([part.lora_A[name][0, layer].double() for part in parts])
                b = torch.cat([s * p.lora_B[name][0, layer].double() for p, s in zip(parts, signs, strict=True)])
                lost += ((b @ b.mT) * (a @ a.mT)).sum().item()
    return (max(lost, 0.0) / total) ** 0.5 if total else 0.0
