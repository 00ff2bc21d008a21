"""Pipelines: registers `pipeline("video-to-lora")`."""

from transformers.pipelines import PIPELINE_REGISTRY

from ..modeling import Video2LoraModel
from .video_to_lora import VideoToLoraPipeline

if PIPELINE_REGISTRY.supported_tasks.get("video-to-lora", {}).get("impl") is not VideoToLoraPipeline:
    PIPELINE_REGISTRY.register_pipeline(
        "video-to-lora", pipeline_class=VideoToLoraPipeline, pt_model=Video2LoraModel, type="multimodal"
    )

__all__ = ["VideoToLoraPipeline"]
