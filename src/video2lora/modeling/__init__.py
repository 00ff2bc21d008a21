"""Modeling: configuration, hypernetwork, injection and the bundled model; registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .base import BaseModelError
from .checkpoint import CheckpointError
from .configuration import Video2LoraConfig
from .hypernetwork import Hypernetwork
from .injection import inject_lora, merge_lora
from .lora import LoraWeights, stack_lora
from .model import Video2LoraModel, Video2LoraOutput
from .processor import Video2LoraProcessor
from .targets import LoraTargets, resolve_targets

AutoConfig.register("video2lora", Video2LoraConfig, exist_ok=True)
AutoModel.register(Video2LoraConfig, Video2LoraModel, exist_ok=True)
AutoProcessor.register(Video2LoraConfig, Video2LoraProcessor, exist_ok=True)

__all__ = [
    "BaseModelError",
    "CheckpointError",
    "Hypernetwork",
    "LoraTargets",
    "LoraWeights",
    "Video2LoraConfig",
    "Video2LoraModel",
    "Video2LoraOutput",
    "Video2LoraProcessor",
    "inject_lora",
    "merge_lora",
    "resolve_targets",
    "stack_lora",
]
