"""Trainer: what a training run can be told, on top of transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments

RECIPE: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "seed": 42,
}
"""The published recipe's optimisation: the defaults here (warm-up as a fraction of all steps)."""


@dataclass
class Video2LoraTrainingArguments(TrainingArguments):
    """Arguments of [`Video2LoraTrainer`]: transformers' own, with the published recipe as defaults, and these.

    A batch counts videos (`per_device_train_batch_size`); each may bring several queries.

    Args:
        ce_weight: weight of the cross-entropy on the responses.
        kl_weight: weight of the divergence from the base that sees the video.
        kl_temperature: temperature of that divergence, which is multiplied by its square.
        teacher: where the base's answers with the video in context come from: `"online"` runs it in every step,
            a directory is one that `video2lora teach --top-k` wrote; needed if `kl_weight` is not 0.
        composition_probability: chance that a video is cut into consecutive segments, each internalized by itself and
            composed into one adapter, so that composing is trained.
        max_segments: most segments such a video is cut into (at least 2).
        max_queries_per_video: queries used of a video in one step, drawn anew every epoch; all by default.
        num_frames_range: least and most frames taken of a video (of each segment, where it is cut), drawn anew every
            epoch, log-uniformly, so that adapters are trained for other lengths than one; the model's `num_frames` by
            default, and always in evaluation.
        pack_queries: put the queries of a video one behind the other in one row (several where they are many) instead
            of padding each to the longest of the batch. Every loss and gradient is the same; many short questions cost
            a fraction. Needs `attn_implementation` "sdpa" or "eager" and a base with one position a token (not
            Qwen2.5-VL).
        max_bad_fraction: share of videos that may be unreadable before the run stops.
        num_eval_samples: answers generated at every evaluation, written as a table; 0 for none.
        eval_max_new_tokens: tokens of such an answer at most.
    """

    learning_rate: float = field(default=RECIPE["learning_rate"])
    lr_scheduler_type: SchedulerType | str = field(default=RECIPE["lr_scheduler_type"])
    warmup_steps: float = field(default=RECIPE["warmup_steps"])
    weight_decay: float = field(default=RECIPE["weight_decay"])
    max_grad_norm: float = field(default=RECIPE["max_grad_norm"])
    remove_unused_columns: bool = field(default=False)
    ddp_find_unused_parameters: bool | None = field(default=False)
    ce_weight: float = field(default=1.0)
    kl_weight: float = field(default=0.0)
    kl_temperature: float = field(default=1.0)
    teacher: str | None = field(default=None)
    composition_probability: float = field(default=0.0)
    max_segments: int = field(default=2)
    max_queries_per_video: int | None = field(default=None)
    num_frames_range: list[int] | None = field(default=None)
    pack_queries: bool = field(default=False)
    max_bad_fraction: float = field(default=0.05)
    num_eval_samples: int = field(default=4)
    eval_max_new_tokens: int = field(default=64)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn at every epoch that it does not
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the rows hold the video, no argument of the model.")
        if self.ce_weight < 0 or self.kl_weight < 0 or self.ce_weight + self.kl_weight == 0:
            raise ValueError(
                f"ce_weight ({self.ce_weight}) and kl_weight ({self.kl_weight}) must not be negative, nor both 0."
            )
        if self.kl_weight and not self.teacher:
            raise ValueError(f"kl_weight is {self.kl_weight}, but there is no teacher: 'online' or a directory.")
        if self.kl_temperature <= 0:
            raise ValueError(f"kl_temperature must be positive, got {self.kl_temperature}.")
        if self.kl_temperature != 1 and self.teacher not in (None, "online"):
            raise ValueError(
                f"kl_temperature is {self.kl_temperature}, but the logits stored in {self.teacher!r} know only 1: use "
                "teacher='online'."
            )
        if not 0 <= self.composition_probability <= 1:
            raise ValueError(f"composition_probability must lie in 0..1, got {self.composition_probability}.")
        if self.max_segments < 2:
            raise ValueError(f"max_segments must be at least 2, got {self.max_segments}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must lie in 0..1, got {self.max_bad_fraction}.")
        if self.max_queries_per_video is not None and self.max_queries_per_video < 1:
            raise ValueError(f"max_queries_per_video must be at least 1 or None, got {self.max_queries_per_video}.")
        if self.num_frames_range is not None:
            self.num_frames_range = _frames_range(self.num_frames_range)
        config: Any = self.accelerator_config
        if config.dispatch_batches:
            raise ValueError("dispatch_batches must not be set: batches hold what one process cannot send to others.")
        config.dispatch_batches = False  # of a stream too: every process reads its own rows


def _frames_range(given: Any) -> list[int]:
    if isinstance(given, (list, tuple)) and len(given) == 2 and all(type(number) is int for number in given):
        if 1 <= given[0] <= given[1]:
            return list(given)
    raise ValueError(f"num_frames_range must be two integers, 1 <= least <= most, got {given!r}.")
