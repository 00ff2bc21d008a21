"""Build: a wheel made from the repository brings the trained moving-shapes models along, for `video2lora demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "examples/moving_shapes/checkpoint"
PLACE = "video2lora/data/moving_shapes/checkpoint"  # where cli/demo.py looks first


class CheckpointHook(BuildHookInterface):
    """Copies the checkpoint where there is one. An editable install reads it from where it lies."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable" and (Path(self.root) / SOURCE / "config.json").is_file():
            build_data["force_include"][SOURCE] = PLACE
