"""video2lora: turn a video into a LoRA adapter in one forward pass.

Importing it registers the model with transformers' Auto classes and `pipeline("video-to-lora")`, and nothing else.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("video2lora")
except PackageNotFoundError:  # a source tree on the path
    __version__ = "0.0.0"

_EXPORTS = {
    "VideoAdapter": "adapters",
    "VideoAdapterStore": "adapters",
    "compose_adapters": "adapters",
    "LoraWeights": "modeling",
    "Video2LoraConfig": "modeling",
    "Video2LoraModel": "modeling",
    "Video2LoraProcessor": "modeling",
    "Video2LoraTrainer": "trainer",
    "Video2LoraTrainingArguments": "trainer",
    "inject_lora": "modeling",
    "internalize_many": "pipelines.bulk",
    "VideoToLoraPipeline": "pipelines",
    "VideoError": "video",
    "VideoFrames": "video",
    "load_video": "video",
    "probe_video": "video",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    """Whether this process is the command line (`video2lora`, `python -m video2lora`), which imports what it needs."""
    arguments = getattr(sys, "argv", [])
    if arguments[:1] == ["-m"]:  # still in the place of the module that it will run
        return sys.orig_argv[-len(arguments)] == __name__
    return "_video2lora_cli" in sys.modules


if not _is_command():  # it must answer --help at once
    importlib.import_module(f"{__name__}.pipelines")
