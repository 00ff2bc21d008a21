"""Trainer: training hypernetworks with the habits of transformers' Trainer."""

from .arguments import Video2LoraTrainingArguments
from .collator import Video2LoraCollator
from .trainer import Video2LoraTrainer

__all__ = ["Video2LoraCollator", "Video2LoraTrainer", "Video2LoraTrainingArguments"]
