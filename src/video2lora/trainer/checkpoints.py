"""Trainer: which checkpoint folders are whole, and which fit the model that wants to resume."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..modeling.configuration import Video2LoraConfig

MARKER = "checkpoint_complete.json"
HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "*processor*", "training_args.json"]
"""Files of a checkpoint that make a model: no optimizer, no pickle."""
FIXED = (
    "rank",
    "lora_scaling",
    "target_modules",
    "layers_to_transform",
    "use_static_lora",
    "latent_size",
    "num_latents",
    "num_blocks",
    "num_self_attn_per_block",
    "num_pre_head_layers",
    "base_model_name_or_path",
    "base_model_revision",
)
"""Fields of the configuration that a resumed run may not change."""


def mark_complete(folder: str | os.PathLike, step: int, position: tuple[int, int] | None = None) -> None:
    """Say in `folder` that everything was written to it; a folder cut short by a kill does not have this.

    Args:
        folder: the checkpoint.
        step: the global step.
        position: passes over the data that are finished, and batches of the one begun.
    """
    part = Path(folder) / (MARKER + ".part")
    fields: dict[str, int] = {"global_step": step}
    if position is not None:
        fields |= {"passes": position[0], "batches": position[1]}
    part.write_text(json.dumps(fields), encoding="utf-8")
    os.replace(part, Path(folder) / MARKER)


def position_in_data(folder: str | os.PathLike) -> tuple[int, int] | None:
    """What `mark_complete` was told of the position in the data; `None` in folders of earlier versions."""
    fields = json.loads((Path(folder) / MARKER).read_text(encoding="utf-8"))
    return (fields["passes"], fields["batches"]) if "passes" in fields else None


def mark_incomplete(folder: str | os.PathLike) -> None:
    """Take the mark away before `folder` is written again."""
    (Path(folder) / MARKER).unlink(missing_ok=True)


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint folder was written to its end."""
    return (Path(folder) / MARKER).is_file()


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole `checkpoint-N` in `output_dir`; folders that a kill cut short are skipped."""
    steps = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and path.is_dir() and is_complete(path):
            steps[int(step.group(1))] = str(path)
    return steps[max(steps)] if steps else None


def check_same_model(folder: str | os.PathLike, config: Video2LoraConfig) -> None:
    """Refuse to go on from a checkpoint of another model.

    Raises:
        ValueError: a field that fixes the model differs; all such fields are named with both values.
    """
    saved = Video2LoraConfig.from_pretrained(folder)
    pairs: list[tuple[str, Any, Any]] = [(name, getattr(saved, name), getattr(config, name)) for name in FIXED]
    pairs.append(("base hidden_size", saved.get_text_config().hidden_size, config.get_text_config().hidden_size))
    differences = [f"{name} {was!r} (now {now!r})" for name, was, now in pairs if was != now]
    if differences:
        raise ValueError(f"{folder} is a checkpoint of another model: it has {', '.join(differences)}.")
