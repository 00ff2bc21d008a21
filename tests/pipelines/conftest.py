"""Fixtures of the pipeline tests: those of bulk runs, which other files replace by their own of the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.pipelines import bulk
from video2lora.pipelines.bulk import internalize_many
from video2lora.testing import save_tiny_vlm, tiny_clip
from video2lora.video import VideoReader

from ..hub.fixtures import hub, patched_hub
from .bulk_runs import NAMES, OPTIONS, SIZES

__all__ = ["hub", "patched_hub"]


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips of different lengths in folders, two of one name, and files that are none; never write to it."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(NAMES):
        (folder / name).parent.mkdir(exist_ok=True)
        tiny_clip(folder / f"{name}.mp4", seed=seed, seconds=1 + seed % 3)
    (folder / "notes.txt").write_text("no video")
    (folder / "b" / "._long.mp4").write_bytes(b"what a Mac leaves behind")
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose adapters change something; read it, never write to it."""
    folder = tmp_path_factory.mktemp("model")
    base = save_tiny_vlm("smolvlm", folder / "base")
    torch.manual_seed(0)
    model = Video2LoraModel.from_vlm(base, dtype=torch.float32, **SIZES)
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler)
    model.save_pretrained(folder / "checkpoint")
    Video2LoraProcessor.from_config(model.config).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def pipe(model_dir: Path) -> Any:
    return pipeline("video-to-lora", model=str(model_dir), device="cpu")


@pytest.fixture(scope="session")
def whole(pipe: Any, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run never stopped; read it, never write to it."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    internalize_many(pipe, clips, folder, **OPTIONS)
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos that were opened."""
    names: list[str] = []

    class Counting(VideoReader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            names.append(self.name)

    monkeypatch.setattr(bulk, "VideoReader", Counting)
    return names


@pytest.fixture
def made(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the model has read."""
    counts: list[int] = []
    generate = pipe.model.generate_segments

    def counting(**inputs: Any) -> Any:
        counts.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(pipe.model, "generate_segments", counting)
    return counts
