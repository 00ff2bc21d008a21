"""Shared fixtures, and the environment, set before anything imports torch or transformers: no network, no cache."""

import atexit
import gc
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="video2lora-tests-")  # what somebody's cache holds must not matter
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only get in each other's way
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _torch_threads() -> None:
    """Pin torch's threads, also where its build reads no OMP variable: with them the order of sums changes."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="module")
def modules_are_no_garbage() -> Iterator[None]:
    """What was imported is not searched for garbage: every training run's end collects, 0.3 s for modules alone."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout: real tokenizer files and awkward clips that cannot be committed."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is missing: this test reads third-party files that are not part of the repository")
    return path


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Inputs, weights and outputs of the published implementation at a small size (tests/parity/README.md)."""
    return REPOSITORY / "tests" / "parity"


@pytest.fixture(scope="module")
def recipe_module() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of examples/moving_shapes by its name; another test file gets modules of its own."""
    folder = str(REPOSITORY / "examples" / "moving_shapes")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(folder)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(folder):
                sys.modules.pop(name)


@pytest.fixture(scope="session")
def tiny_vlm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny SmolVLM with its processor; read it, never write to it."""
    from video2lora.testing import save_tiny_vlm

    return save_tiny_vlm("smolvlm", tmp_path_factory.mktemp("vlm") / "tiny-smolvlm")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mp4 of 2 seconds, 16 frames of 64 x 48 pixels; read it, never write to it."""
    from video2lora.testing import tiny_clip

    return tiny_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")
