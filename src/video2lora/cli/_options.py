"""Command line: options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ._errors import CommandError


class Layout(str, Enum):
    """Which model an adapter's keys are for."""

    vlm = "vlm"
    text = "text"


class Dtype(str, Enum):
    """Number format of a file."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote there.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu, cuda or cuda:1; by default an accelerator if there is one.")
]
LayoutOption = Annotated[
    Layout, typer.Option("--layout", help="Keys for the whole model, or for its text tower as a plain causal LM.")
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Number format of the adapter file.")]


def torch_dtype(dtype: Dtype) -> Any:
    """The `torch.dtype` of this name."""
    import torch

    return getattr(torch, dtype.value)


def torch_device(device: str | None) -> Any:
    """The `torch.device` asked for, or this machine's best.

    Raises:
        CommandError: there is no such device here.
    """
    import torch

    if device is None:
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return best or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # builds without CUDA assert
        raise CommandError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return found
