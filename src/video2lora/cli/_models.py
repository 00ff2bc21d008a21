"""Command line: loading what commands work on, each with one clear error. Imports torch: only inside commands."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel

from ..adapters import AdapterNotFoundError, VideoAdapter
from ..adapters.provenance import AdapterProvenance
from ..adapters.storage import PROVENANCE_FILE, locate
from ..modeling import Video2LoraConfig, Video2LoraModel, Video2LoraProcessor
from ..modeling.base import load_base, resolve_commit
from ..pipelines import VideoToLoraPipeline
from ._errors import CommandError, about, check_is_there, one_line
from ._options import torch_device
from ._output import directory_bytes, note

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "vlm_processor",
    "README.md",
    ".gitattributes",
)
WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def load_config(name: str, revision: str | None = None) -> Video2LoraConfig:
    """The configuration of a checkpoint.

    Raises:
        CommandError: it is a checkpoint of something else, or its configuration is wrong.
        OSError: there is none, or the Hub cannot be reached.
    """
    check_is_there(name)
    with about(name):
        try:
            values, _ = PreTrainedConfig.get_config_dict(name, **_at(revision))
        except OSError as error:
            if Path(name).exists():
                raise
            raise CommandError(
                f"there is no directory {name} here, and it could not be had from the Hub either: {one_line(error)}"
            ) from error
        if values.get("model_type") != Video2LoraConfig.model_type:
            raise CommandError(_not_a_checkpoint(name, revision, values.get("model_type")))
        return Video2LoraConfig.from_pretrained(name, **_at(revision))


def _not_a_checkpoint(name: str, revision: str | None, model_type: str | None) -> str:
    """What `name` is instead of a video2lora checkpoint, and what to give."""
    if model_type is None and (adapter := _adapter_at(name, revision)) is not None:
        made_with = adapter.get("provenance", {}).get("hypernetwork")
        known = f" ({made_with!r})" if made_with else ""
        return (
            f"{name} is an adapter, which holds a video, not a video2lora checkpoint, which makes adapters. Give the "
            f"checkpoint it was made with{known}; `video2lora ask {name}` asks the adapter."
        )
    what = f"a {model_type} model" if model_type else "no model (its config.json has no model_type, or is not there)"
    return (
        f"{name} is {what}, not a video2lora checkpoint. Give a checkpoint trained for it (`video2lora "
        "import-checkpoint` makes one of a published `.pt`)."
    )


def _adapter_at(name: str, revision: str | None) -> dict[str, Any] | None:
    """What the adapter of this name tells of itself, empty where it is a foreign one; `None` where there is none."""
    try:
        directory = locate(name, revision=revision)
    except AdapterNotFoundError:
        return None
    try:
        return json.loads((directory / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def load_pipeline(name: str, *, revision: str | None = None, device: str | None = None) -> VideoToLoraPipeline:
    """The pipeline of a checkpoint; raises as `load_config`, and what loading the model raises."""
    where = torch_device(device)
    load_config(name, revision)
    note(f"loading {name}")
    with about(name):
        model = Video2LoraModel.from_pretrained(name, revision=revision)
        processor = Video2LoraProcessor.from_pretrained(name, revision=revision)
    return VideoToLoraPipeline(model=model, processor=processor, device=where)


@dataclass(frozen=True)
class LoadedBase:
    """A base model ready to answer.

    Attributes:
        vlm: the model.
        processor: what makes its inputs.
        name: Hub id or directory of the base, or of the checkpoint that holds it.
        revision: commit that was loaded, or what was asked for where none is known.
    """

    vlm: PreTrainedModel
    processor: Video2LoraProcessor
    name: str
    revision: str | None


def load_base_of(adapter: VideoAdapter, base: str | None, device: str | None) -> LoadedBase:
    """The base an adapter was made for, or that of `base`.

    Raises:
        CommandError: the adapter names no base, or the directory is not there.
        BaseModelError: it cannot be had.
    """
    made_by = adapter.provenance
    name = base or made_by.base_model
    if name is None:
        raise CommandError(_no_base_named(made_by))
    revision = made_by.base_revision if base is None else None
    if base is not None and base == made_by.hypernetwork:
        revision = made_by.hypernetwork_revision  # the weights that the adapter was made with
    return load_base_or_bundled(name, revision, torch_device(device))


def _no_base_named(made_by: AdapterProvenance) -> str:
    """Why an adapter names no base, and what to pass."""
    if made_by.hypernetwork is None and made_by.hypernetwork_sha256 is None:
        return "the adapter does not say which base model it was made for: pass --base, its Hub id or directory."
    version = made_by.hypernetwork_revision or f"SHA-256 {(made_by.hypernetwork_sha256 or 'unknown')[:12]}"
    name = made_by.hypernetwork or ""
    where = name if "/" in name else "CHECKPOINT"  # of a directory only the last part is known
    return (
        "the adapter names no base model: that is inside the checkpoint the adapter was made with, "
        f"{repr(name) if name else 'which has no name'} ({version}). Pass `--base {where}`: that checkpoint's Hub id "
        "or directory."
    )


def load_base_or_bundled(name: str, revision: str | None, device: Any, **kwargs: Any) -> LoadedBase:
    """A base by its own name, or by that of a video2lora checkpoint: the one inside it, or the one it names.

    Args:
        name, revision: of the base or checkpoint.
        device: where to.
        kwargs: what `from_pretrained` takes, such as `dtype`.

    Raises:
        CommandError: the directory is not there, or the checkpoint neither holds nor names a base.
        BaseModelError: it cannot be had.
    """
    check_is_there(name, "the base model ")
    note(f"loading {name}")
    with about(name):
        revision = None if Path(name).is_dir() else resolve_commit(name, revision) or revision
        config = _checkpoint_config(name, revision)
        if config is not None and config.bundle_base:
            return _bundled_base(name, revision, device, config, **kwargs)
        if config is not None:
            name, revision = _named_base(name, config)
        vlm = load_base(name, revision, **kwargs)
        processor = AutoProcessor.from_pretrained(name, revision=revision)
    return LoadedBase(vlm.to(device), Video2LoraProcessor(processor), name, revision)


def _checkpoint_config(name: str, revision: str | None) -> Video2LoraConfig | None:
    """The configuration of a video2lora checkpoint; `None` for anything else, also for what cannot be had."""
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, **_at(revision))
    except (OSError, ValueError):
        return None  # loading it tells why
    if values.get("model_type") != Video2LoraConfig.model_type:
        return None
    return Video2LoraConfig.from_pretrained(name, **_at(revision))


def _bundled_base(name: str, revision: str | None, device: Any, config: Video2LoraConfig, **kwargs: Any) -> LoadedBase:
    """The base whose weights are in a checkpoint, called as adapters made with it call it."""
    vlm = Video2LoraModel.from_pretrained(name, revision=revision, **kwargs).vlm
    processor = Video2LoraProcessor.from_pretrained(name, revision=revision).vlm_processor
    if config.base_model_name_or_path is not None:
        name, revision = config.base_model_name_or_path, config.base_model_revision
    vlm.name_or_path = vlm.config.name_or_path = name
    return LoadedBase(vlm.to(device), Video2LoraProcessor(processor), name, revision)


def _named_base(name: str, config: Video2LoraConfig) -> tuple[str, str | None]:
    """Name and revision of the base of a light checkpoint."""
    base = config.base_model_name_or_path
    if base is None:
        raise CommandError(f"{name} neither holds its base model nor names it: pass the base itself as --base.")
    return base, None if Path(base).is_dir() else config.base_model_revision


def _at(revision: str | None) -> dict[str, Any]:
    return {} if revision is None else {"revision": revision}


def model_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's own files; training leaves other checkpoints and plots beside them."""
    own = [path for path in directory.iterdir() if path.name in MODEL_FILES or WEIGHT_FILES.fullmatch(path.name)]
    return sum(directory_bytes(path) if path.is_dir() else path.stat().st_size for path in own)


def is_model_directory(directory: Path) -> bool:
    """Whether a directory is empty or holds a video2lora checkpoint and nothing else."""
    names = {path.name for path in directory.iterdir()}
    others = {name for name in names if name not in MODEL_FILES and not WEIGHT_FILES.fullmatch(name)}
    if others or not names:
        return not names
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return config.get("model_type") == Video2LoraConfig.model_type
