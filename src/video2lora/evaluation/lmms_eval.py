"""Evaluation: what lmms-eval finds at our entry point of its group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of the model name `video2lora`; every run of lmms-eval asks for it, whatever its model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("video2lora", simple_class_path="video2lora.evaluation.lmms_eval_model.Video2Lora")
