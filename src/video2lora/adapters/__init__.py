"""Adapters: a video as a LoRA adapter, in memory and as an ordinary PEFT directory."""

from .adapter import VideoAdapter
from .composition import compose_adapters
from .errors import (
    AdapterError,
    AdapterFormatError,
    AdapterKeyError,
    AdapterNotFoundError,
    BaseMismatchError,
    CompositionError,
    ForeignAdapterError,
    NonFiniteAdapterError,
    OutputExistsError,
)
from .layouts import extract_text_model
from .provenance import AdapterProvenance, Segment, Truncation
from .store import VideoAdapterStore

__all__ = [
    "AdapterError",
    "AdapterFormatError",
    "AdapterKeyError",
    "AdapterNotFoundError",
    "AdapterProvenance",
    "BaseMismatchError",
    "CompositionError",
    "ForeignAdapterError",
    "NonFiniteAdapterError",
    "OutputExistsError",
    "Segment",
    "Truncation",
    "VideoAdapter",
    "VideoAdapterStore",
    "compose_adapters",
    "extract_text_model",
]
