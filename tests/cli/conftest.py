"""Command line's tests: a tiny checkpoint, an adapter made with it, and a way to run commands in process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.cli import app
from video2lora.cli.demo import _random_checkpoint

from ..hub.fixtures import hub, patched_hub
from ..pipelines.bulk_runs import damaged_clip

__all__ = ["hub", "patched_hub"]


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """Run a command in process; `stdout`, `stderr`, `exit_code` and `exception` of the result."""

    def invoke(*arguments: object, **options: Any) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)

    return invoke


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A light checkpoint of a tiny model, with its base beside it; read it, never write to it."""
    return _random_checkpoint(tmp_path_factory.mktemp("cli-model"))


@pytest.fixture(scope="session")
def base_dir(model_dir: Path) -> Path:
    """The tiny base of `model_dir`."""
    return model_dir.parent / "base"


@pytest.fixture(scope="session")
def bundled_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model_dir` with its base inside, whose name nobody knows; read it, never write to it."""
    directory = tmp_path_factory.mktemp("cli-bundled") / "box"
    model = Video2LoraModel.from_pretrained(model_dir)
    model.config.base_model_name_or_path = model.vlm.name_or_path = model.vlm.config.name_or_path = None
    model.save_pretrained(directory, bundle_base=True)
    Video2LoraProcessor.from_pretrained(model_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of which two frames at the end do not decode; read it, never write to it."""
    return damaged_clip(tmp_path_factory.mktemp("cli-damaged") / "damaged.mp4")


@pytest.fixture(scope="session")
def adapter_dir(
    run: Callable[..., Any], clip: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An adapter of the tiny clip; read it, never write to it."""
    directory = tmp_path_factory.mktemp("cli-adapter") / "clip-lora"
    result = run("internalize", clip, "-m", model_dir, "-o", directory)
    assert result.exit_code == 0, result.stderr
    return directory
