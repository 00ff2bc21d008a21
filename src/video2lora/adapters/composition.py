"""Adapters: several videos, or stretches of one, in one adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..modeling.lora import LoraWeights
from .adapter import VideoAdapter
from .errors import CompositionError
from .provenance import Segment, same_repository
from .rank_space import concatenate_generated


def compose_adapters(adapters: Sequence[VideoAdapter], *, weights: Sequence[float] | None = None) -> VideoAdapter:
    """Put several adapters of one base and one hypernetwork together, the static part counted once.

    Generated ranks are concatenated in the order given, so n adapters of rank 2r give rank (n + 1) r and
    `dW = sum_i weights_i dW_generated_i + dW_static`. A composition can be composed again.

    Args:
        adapters: one or more.
        weights: a factor for each one's generated part; 1 by default.

    Raises:
        CompositionError: nothing to compose, different bases, static parts of different hypernetworks, or an adapter
            whose static part a truncation has mixed into its ranks (it would count more than once).
    """
    if not adapters:
        raise CompositionError("expected at least one adapter to compose, got none.")
    factors = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(adapters):
        raise CompositionError(f"got {len(factors)} weights for {len(adapters)} adapters.")
    if not all(map(math.isfinite, factors)):
        raise CompositionError(f"weights must be finite, got {factors}.")
    first = adapters[0]
    for position, adapter in enumerate(adapters):
        _check_composable(first, adapter, position, alone=len(adapters) == 1 and factors == [1.0])
    segments: list[Segment] = []
    start = 0
    for adapter, factor in zip(adapters, factors, strict=True):
        for segment in adapter.segments:
            ranks = None if segment.ranks is None else (segment.ranks[0] + start, segment.ranks[1] + start)
            segments.append(replace(segment, ranks=ranks, weight=segment.weight * factor))
        start += adapter.generated_rank
    truncations = tuple(record for adapter in adapters for record in adapter.provenance.truncations)
    provenance = replace(first.provenance, segments=tuple(segments), truncations=truncations)
    joined = concatenate_generated([adapter.weights for adapter in adapters], factors)
    return VideoAdapter(joined, first.targets, first.base, provenance)


def _check_composable(first: VideoAdapter, other: VideoAdapter, position: int, *, alone: bool) -> None:
    """Raise `CompositionError` if `other`, number `position`, cannot be composed with the first adapter."""
    ours, theirs = first.provenance, other.provenance
    if other.targets != first.targets or other.base != first.base:
        raise CompositionError(f"adapters 0 and {position} adapt different modules or bases: {first!r} and {other!r}.")
    if not same_repository(ours.base_model, theirs.base_model):
        raise CompositionError(
            f"adapters 0 and {position} were made for different bases: {ours.base_model} and {theirs.base_model}."
        )
    if ours.base_revision and theirs.base_revision and ours.base_revision != theirs.base_revision:
        raise CompositionError(
            f"adapters 0 and {position} were made for different revisions of {ours.base_model}: "
            f"{ours.base_revision} and {theirs.base_revision}."
        )
    if theirs.static_part_folded and not alone:
        raise CompositionError(
            f"adapter {position} was truncated, which mixed the static part into its ranks: it would count more than "
            "once, and with the wrong weight. Compose the adapters as they were before, and truncate the result."
        )
    if not _same_static_part(first.weights, other.weights):
        raise CompositionError(
            f"adapters 0 and {position} have different static parts (ranks {first.static_rank} and "
            f"{other.static_rank}): they come from different hypernetworks ({ours.hypernetwork or 'unknown'} and "
            f"{theirs.hypernetwork or 'unknown'}), or were saved in different dtypes."
        )


def _same_static_part(first: LoraWeights, other: LoraWeights) -> bool:
    static = first.static_rank
    if other.static_rank != static:
        return False
    if static == 0:
        return True
    pairs = [(first.lora_A[name], other.lora_A[name]) for name in first.lora_A]
    pairs += [(first.lora_B[name], other.lora_B[name]) for name in first.lora_B]
    return all(torch.equal(a[:, :, -static:], b[:, :, -static:].to(a.device)) for a, b in pairs)
