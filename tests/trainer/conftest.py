"""Fixtures of the trainer's tests: bases, clips and rows, tiny and made here."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from video2lora.testing import save_tiny_vlm, tiny_clip

from ..hub.fixtures import hub, patched_hub

__all__ = ["hub", "patched_hub"]


@pytest.fixture(autouse=True)
def _no_garbage(modules_are_no_garbage: None) -> None:
    """What a test left, such as an error's traceback, may hold a decoder, which has threads.

    A forked worker that collects it waits for them for ever, and with little else to search it soon would.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Qwen2.5-VL with its processor; read it, never write to it."""
    return save_tiny_vlm("qwen2_5_vl", tmp_path_factory.mktemp("qwen") / "base")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four clips of 2 seconds."""
    folder = tmp_path_factory.mktemp("clips")
    return [str(tiny_clip(folder / f"{seed}.mp4", seed=seed)) for seed in range(4)]


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that is no video."""
    path = tmp_path_factory.mktemp("broken") / "broken.mp4"
    path.write_text("no video")
    return str(path)


@pytest.fixture(scope="session")
def rows(clips: list[str]) -> list[dict[str, Any]]:
    """Eight rows with 1, 2 or 3 queries each, answers of unequal length."""
    return [
        {
            "id": f"row-{i}",
            "video": clips[i % 4],
            "conversations": [
                {"prompt": f"what {i} {j}?", "response": "yes " * (1 + (i + j) % 3) + str(j)} for j in range(1 + i % 3)
            ],
        }
        for i in range(8)
    ]
