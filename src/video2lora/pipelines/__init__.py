"""Pipelines: registers `pipeline("video-to-lora")`."""

from typing import NoReturn

from transformers.pipelines import PIPELINE_REGISTRY

from ..modeling import Video2LoraModel
from .video_to_lora import VideoToLoraPipeline

__all__ = ["VideoToLoraPipeline"]


class _NoDefault(dict[str, None]):
    """Where transformers looks up a task's default model; without, it raises a bare `KeyError: 'default'`."""

    def __getitem__(self, name: str) -> NoReturn:
        raise ValueError(
            'pipeline("video-to-lora") has no default model, since a hypernetwork belongs to one base: pass model=, '
            "the Hub id or directory of a video2lora checkpoint, or a Video2LoraModel with its processor= "
            "(Video2LoraModel.from_vlm(name) makes one to be trained)."
        )


if PIPELINE_REGISTRY.supported_tasks.get("video-to-lora", {}).get("impl") is not VideoToLoraPipeline:
    PIPELINE_REGISTRY.register_pipeline(
        "video-to-lora",
        pipeline_class=VideoToLoraPipeline,
        pt_model=Video2LoraModel,
        default=_NoDefault(model=None),
        type="multimodal",
    )
