"""Adapters: several videos, or stretches of one, in one adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from ..modeling.lora import LoraWeights
from .adapter import VideoAdapter
from .errors import CompositionError
from .provenance import AdapterProvenance, Segment, same_repository
from .rank_space import concatenate_generated

COARSE_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes of files that round a static part."""


def compose_adapters(adapters: Iterable[VideoAdapter], *, weights: Sequence[float] | None = None) -> VideoAdapter:
    """Put several adapters of one base and one hypernetwork together, the static part counted once.

    Generated ranks are concatenated in the order given, so n adapters of rank 2r give rank (n + 1) r and
    `dW = sum_i weights_i dW_generated_i + dW_static`. A composition can be composed again. Of
    adapters of one hypernetwork, by hash or commit, in files of different dtypes the most precise static part counts.

    Args:
        adapters: one or more.
        weights: a factor for each one's generated part; 1 by default.

    Raises:
        TypeError: something else in place of an adapter, such as its name.
        CompositionError: nothing to compose, different bases, static parts of different hypernetworks, or an adapter
            whose static part a truncation has mixed into its ranks (it would count more than once).
    """
    adapters = _as_adapters(adapters)
    factors = [1.0] * len(adapters) if weights is None else list(weights)
    if len(factors) != len(adapters):
        raise CompositionError(f"got {len(factors)} weights for {len(adapters)} adapters.")
    if not all(isinstance(factor, Real) and math.isfinite(factor) for factor in factors):
        raise CompositionError(f"weights must be finite numbers, got {factors}.")
    factors = [float(factor) for factor in factors]
    first = adapters[0]
    for position, adapter in enumerate(adapters):
        _check_composable(first, adapter, position, alone=len(adapters) == 1 and factors == [1.0])
    finest = _most_precise(adapters)
    for position, adapter in enumerate(adapters):
        _check_static_part(adapters[finest], adapter, finest, position)
    segments: list[Segment] = []
    start = 0
    for adapter, factor in zip(adapters, factors, strict=True):
        for segment in adapter.segments:
            ranks = None if segment.ranks is None else (segment.ranks[0] + start, segment.ranks[1] + start)
            segments.append(replace(segment, ranks=ranks, weight=segment.weight * factor))
        start += adapter.generated_rank
    truncations = tuple(record for adapter in adapters for record in adapter.provenance.truncations)
    provenance = replace(first.provenance, segments=tuple(segments), truncations=truncations)
    parts = [adapter.weights for adapter in adapters]
    if finest:
        parts[0] = _with_static_part(parts[0], parts[finest])
    joined = concatenate_generated(parts, factors)
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
    if ours.base_sha256 and theirs.base_sha256 and ours.base_sha256 != theirs.base_sha256:
        raise CompositionError(
            f"adapters 0 and {position} were made for bases with other weights ({ours.base_sha256[:12]} and "
            f"{theirs.base_sha256[:12]}), neither of which has a name: compose adapters of one checkpoint."
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


def _as_adapters(adapters: Iterable[VideoAdapter]) -> list[VideoAdapter]:
    """Adapters as a list, one or more.

    Raises:
        TypeError: something else is among them.
        CompositionError: there are none.
    """
    single = isinstance(adapters, VideoAdapter | str | Path)
    given: list[VideoAdapter] = [adapters] if single else list(adapters)  # type: ignore[list-item]
    for item in given:
        if isinstance(item, str | Path):
            name = repr(str(item))
            raise TypeError(
                f"expected adapters, got a name, {name}: load it with VideoAdapter.from_pretrained({name})."
            )
        if not isinstance(item, VideoAdapter):
            raise TypeError(f"expected adapters (VideoAdapter), got {type(item).__name__}.")
    if not given:
        raise CompositionError("expected at least one adapter to compose, got none.")
    return given


def _most_precise(adapters: Sequence[VideoAdapter]) -> int:
    """Which adapter has a static part that others' are roundings of; the first where all are the same."""
    finest = 0
    for position, adapter in enumerate(adapters):
        best = adapters[finest]
        if not _rounds_to(best, adapter) and _rounds_to(adapter, best):
            finest = position
    return finest


def _check_static_part(finest: VideoAdapter, other: VideoAdapter, position: int, other_position: int) -> None:
    """Raise `CompositionError` unless `other` has the static part of `finest`, or a rounding of it."""
    if _rounds_to(finest, other):
        return
    first, second = sorted([(position, finest), (other_position, other)], key=lambda item: item[0])
    raise CompositionError(
        f"adapters {first[0]} and {second[0]} have different static parts (ranks {first[1].static_rank} and "
        f"{second[1].static_rank}): {_why_different(first[1].provenance, second[1].provenance)}"
    )


def _why_different(ours: AdapterProvenance, theirs: AdapterProvenance) -> str:
    """What the provenances tell of different static parts, and what to do."""
    names = f"{ours.hypernetwork or 'unknown'} and {theirs.hypernetwork or 'unknown'}"
    same = _same_hypernetwork(ours, theirs)
    if same is None:
        return (
            f"they come from different hypernetworks ({names}), or were saved in different dtypes, and at least one "
            "does not say by hash or commit which it is. Make both again with one hypernetwork."
        )
    if same:
        return (
            f"both come from one hypernetwork ({_identity(ours)}), but neither part is a rounding of the other to "
            "bfloat16 or float16: both were rounded, or one was changed. Compose float32 adapters, or make both again."
        )
    return (
        f"they come from different hypernetworks ({names}; {_identity(ours)} and {_identity(theirs)}). Make both "
        "with one."
    )


def _same_hypernetwork(ours: AdapterProvenance, theirs: AdapterProvenance) -> bool | None:
    """Whether two adapters are of one hypernetwork, by its weights' hash or its commit; None where one has neither."""
    for a, b in (
        (ours.hypernetwork_sha256, theirs.hypernetwork_sha256),
        (ours.hypernetwork_revision, theirs.hypernetwork_revision),
    ):
        if a and b:
            return a == b
    return None


def _identity(provenance: AdapterProvenance) -> str:
    if provenance.hypernetwork_sha256:
        return f"sha256 {provenance.hypernetwork_sha256[:12]}"
    return f"commit {(provenance.hypernetwork_revision or 'unknown')[:12]}"


def _rounds_to(fine: VideoAdapter, coarse: VideoAdapter) -> bool:
    """Whether a static part is another, or, of one hypernetwork, becomes it in a dtype of lower precision."""
    if fine.static_rank != coarse.static_rank:
        return False
    pairs = _static_parts(fine.weights, coarse.weights)
    if all(torch.equal(a, b) for a, b in pairs):
        return True
    if not _same_hypernetwork(fine.provenance, coarse.provenance):
        return False
    return any(all(torch.equal(a.to(dtype).to(a.dtype), b) for a, b in pairs) for dtype in COARSE_DTYPES)


def _static_parts(first: LoraWeights, other: LoraWeights) -> list[tuple[Tensor, Tensor]]:
    """The static parts of two adapters of one static rank, tensor by tensor, on the first one's device."""
    start, other_start = (weights.ranks[0] - weights.static_rank for weights in (first, other))
    pairs = [(first.lora_A[name], other.lora_A[name]) for name in first.lora_A]
    pairs += [(first.lora_B[name], other.lora_B[name]) for name in first.lora_B]
    return [(a[:, :, start:], b[:, :, other_start:].to(a.device)) for a, b in pairs]


def _with_static_part(weights: LoraWeights, other: LoraWeights) -> LoraWeights:
    """`weights` with the static part of `other`, which has the same rank."""
    start, other_start = (part.ranks[0] - part.static_rank for part in (weights, other))

    def joined(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.cat([ours[:, :, :start], theirs[:, :, other_start:].to(ours.device)], dim=2)

    lora_A = {name: joined(tensor, other.lora_A[name]) for name, tensor in weights.lora_A.items()}
    lora_B = {name: joined(tensor, other.lora_B[name]) for name, tensor in weights.lora_B.items()}
    return replace(weights, lora_A=lora_A, lora_B=lora_B)
