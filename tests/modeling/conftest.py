"""Modeling's tests: tiny bases of three families, and hypernetworks whose adapters do something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedModel, ProcessorMixin

from video2lora import testing
from video2lora.modeling import Video2LoraModel, Video2LoraProcessor

from ..hub.fixtures import hub, patched_hub
from .helpers import SMALL, awaken

__all__ = ["hub", "patched_hub"]

FAMILIES = ("smolvlm", "idefics3", "qwen2_5_vl")


class Family(NamedTuple):
    """A tiny base, its processor, and where both are saved; never change or write to them."""

    name: str
    vlm: PreTrainedModel
    processor: ProcessorMixin
    path: Path


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Load a tiny base by its family's name, once."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded: dict[str, Family] = {}

    def load(name: str) -> Family:
        if name not in loaded:
            path = testing.save_tiny_vlm(name, tmp_path_factory.mktemp("vlm") / f"tiny-{name}")
            vlm = AutoModelForImageTextToText.from_pretrained(path)
            loaded[name] = Family(name, vlm, AutoProcessor.from_pretrained(path), path)
        return loaded[name]

    return load


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, families) -> Family:
    return families(request.param)


@pytest.fixture(scope="session")
def smolvlm(families) -> Family:
    return families("smolvlm")


@pytest.fixture(scope="session")
def qwen(families) -> Family:
    return families("qwen2_5_vl")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Video2LoraModel]:
    """A small hypernetwork on a loaded base, its parameters moved away from their initial values."""

    def make(vlm: PreTrainedModel, asleep: bool = False, **fields: Any) -> Video2LoraModel:
        model = Video2LoraModel.from_vlm(vlm, **SMALL | fields)
        if not asleep:
            awaken(model.hypernetwork)
        return model

    return make


@pytest.fixture(scope="session")
def make_processor() -> Callable[..., Video2LoraProcessor]:
    def make(family: Family, **fields: Any) -> Video2LoraProcessor:
        return Video2LoraProcessor(family.processor, **{"num_frames": SMALL["num_frames"]} | fields)

    return make


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Clips of different lengths and frame counts, at one frame a second: 2, 5 and 3 frames."""
    folder = tmp_path_factory.mktemp("clips")
    return [
        testing.tiny_clip(folder / f"{n}.mp4", seconds=seconds, fps=2, seed=n) for n, seconds in enumerate((2, 5, 3))
    ]
