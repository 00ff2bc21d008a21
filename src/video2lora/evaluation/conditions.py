"""Evaluation: the conditions by name, which answer the same questions about the same frames, each in its own way."""

from __future__ import annotations

from .condition import Condition, Decoding, PreparedSample, PreparedVideo
from .condition_adapter import AdapterCondition, NoAdapterCondition, OtherAdapterCondition
from .condition_cache import CacheCondition
from .condition_lora import LoraFromAdapterCondition, LoraFromZeroCondition
from .condition_video import CaptionCondition, VideoCondition
from .prepare import prepare_sample, prepare_samples

__all__ = [
    "CONDITIONS",
    "Condition",
    "Decoding",
    "PreparedSample",
    "PreparedVideo",
    "prepare_sample",
    "prepare_samples",
]

CONDITIONS: dict[str, type[Condition]] = {
    condition.name: condition
    for condition in (
        VideoCondition,
        AdapterCondition,
        NoAdapterCondition,
        OtherAdapterCondition,
        CaptionCondition,
        CacheCondition,
        LoraFromZeroCondition,
        LoraFromAdapterCondition,
    )
}
"""Made as `CONDITIONS[name](model, processor, **options)`; their docstrings say which options there are."""
