"""Command line: loading what commands work on, each with one clear error. Imports torch: only inside commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel

from ..adapters import VideoAdapter
from ..modeling import Video2LoraConfig, Video2LoraModel, Video2LoraProcessor
from ..modeling.base import load_base
from ..pipelines import VideoToLoraPipeline
from ._errors import CommandError, about
from ._options import torch_device
from ._output import note

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "vlm_processor",
    "README.md",
    ".gitattributes",
)
WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def load_config(name: str, revision: str | None = None) -> Video2LoraConfig:
    """The configuration of a checkpoint.

    Raises:
        CommandError: it is a checkpoint of something else, or its configuration is wrong.
        OSError: there is none, or the Hub cannot be reached.
    """
    check_is_there(name)
    with about(name):
        values, _ = PreTrainedConfig.get_config_dict(name, **_at(revision))
        if values.get("model_type") != Video2LoraConfig.model_type:
            raise CommandError(
                f"{name} is a {values.get('model_type') or 'nameless'} model, not a video2lora checkpoint. Give a "
                "checkpoint trained for it (`video2lora import-checkpoint` makes one of a published `.pt`)."
            )
        return Video2LoraConfig.from_pretrained(name, **_at(revision))


def load_pipeline(name: str, *, revision: str | None = None, device: str | None = None) -> VideoToLoraPipeline:
    """The pipeline of a checkpoint; raises as `load_config`, and what loading the model raises."""
    where = torch_device(device)
    load_config(name, revision)
    note(f"loading {name}")
    with about(name):
        model = Video2LoraModel.from_pretrained(name, revision=revision)
        processor = Video2LoraProcessor.from_pretrained(name, revision=revision)
    return VideoToLoraPipeline(model=model, processor=processor, device=where)


def load_base_of(
    adapter: VideoAdapter, base: str | None, device: str | None
) -> tuple[PreTrainedModel, Video2LoraProcessor, str]:
    """The base an adapter was made for, or `base`, with its processor and its name.

    Raises:
        CommandError: the adapter names no base, or the directory is not there.
        BaseModelError: it cannot be had.
    """
    name = base or adapter.provenance.base_model
    if name is None:
        raise CommandError("the adapter does not say which base model it was made for: pass --base.")
    where = torch_device(device)
    revision = None if base is not None or Path(name).is_dir() else adapter.provenance.base_revision
    check_is_there(name, "the base model ")
    note(f"loading {name}")
    with about(name):
        vlm = load_base(name, revision)
        processor = AutoProcessor.from_pretrained(name, revision=revision)
    return vlm.to(where), Video2LoraProcessor(processor), name


def _at(revision: str | None) -> dict[str, Any]:
    return {} if revision is None else {"revision": revision}


def check_is_there(name: str, what: str = "") -> None:
    """Raise `CommandError` for a path that is not there and cannot be a Hub id either."""
    if not Path(name).exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name):
        raise CommandError(f"{what}{name} is not there: give a directory or a Hub id.")


def is_model_directory(directory: Path) -> bool:
    """Whether a directory is empty or holds a video2lora checkpoint and nothing else."""
    names = {path.name for path in directory.iterdir()}
    others = {name for name in names if name not in MODEL_FILES and not WEIGHT_FILES.fullmatch(name)}
    if others or not names:
        return not names
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return config.get("model_type") == Video2LoraConfig.model_type
