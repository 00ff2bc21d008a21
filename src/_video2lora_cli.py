"""Entry point of the `video2lora` command: by its presence the package knows not to import torch for a `--help`."""

from video2lora.cli import main

__all__ = ["main"]
