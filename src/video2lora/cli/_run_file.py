"""Command line: the YAML file of a training run, read strictly: a wrong key or kind of value is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._errors import CommandError
from ._yaml import check_keys, checked_value, parse_yaml

SECTIONS = ("model", "data", "training")
MODEL_KEYS = {"base": "str", "checkpoint": "str", "revision": "str", "dtype": "str", "attn_implementation": "str"}
DATA_KEYS = {
    "train": "str | list",
    "eval": "str | list",
    "split": "str",
    "eval_split": "str",
    "video_root": "str",
    "eval_rows": "int",
    "group_queries": "bool",
}
DTYPES = ("auto", "bfloat16", "float16", "float32")
_NOT_SET_HERE = {"vlm_config", "base_model_name_or_path", "base_model_revision", "bundle_base", "format_version"}


@dataclass(frozen=True)
class RunFile:
    """A training run as its file describes it.

    Attributes:
        model: where the model comes from, and fields of its configuration.
        data: where the rows come from.
        training: fields of `Video2LoraTrainingArguments`.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]

    @property
    def config_fields(self) -> dict[str, Any]:
        """The fields of `Video2LoraConfig` in `model`."""
        return {name: value for name, value in self.model.items() if name not in MODEL_KEYS}


def read_run_file(path: Path, overrides: Sequence[str] = ()) -> RunFile:
    """Read the file of a run.

    Args:
        path: YAML with the sections `model`, `data` and `training`.
        overrides: `section.key=value`, the value as YAML; they win over the file.

    Raises:
        CommandError: a key that is not known, with the closest one that is, or a value of the wrong kind.
        OSError: the file cannot be read.
    """
    document = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(document, dict):
        raise CommandError(f"{path}: expected the sections {', '.join(SECTIONS)}, got {document!r}.")
    known = _known_keys()
    check_keys(document, known, str(path), "section")
    sections = {name: _section(document.get(name), f"{path}: {name}") for name in SECTIONS}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise CommandError(f"--set {override}: expected section.key=value, such as training.learning_rate=1e-4.")
        check_keys([section], known, f"--set {override}", "section")
        sections[section][key] = parse_yaml(text, f"--set {override}")
    for section, values in sections.items():
        check_keys(values, known[section], f"{path}: {section}", "key")
        for key, value in values.items():
            values[key] = checked_value(value, known[section][key], f"{path}: {section}.{key}")
    run = RunFile(**sections)
    _check_sense(run, path)
    return run


def _known_keys() -> dict[str, dict[str, str]]:
    """The keys of each section and the kinds of their values."""
    from ..modeling import Video2LoraConfig
    from ..trainer import Video2LoraTrainingArguments

    own = Video2LoraConfig.__annotations__  # without what all configurations of transformers have
    config = {name: _kind(kind) for name, kind in own.items() if name not in _NOT_SET_HERE and not name.isupper()}
    config = {name: kind for name, kind in config.items() if name in Video2LoraConfig.__dataclass_fields__}
    fields = dataclasses.fields(Video2LoraTrainingArguments)
    training = {
        # an option that may stand on a command line without its value takes true, whatever it is annotated with: fsdp
        field.name: _kind(field.type) + " | bool" * (field.metadata.get("const") is True)
        for field in fields
        if field.init
    }
    return {"model": MODEL_KEYS | config, "data": DATA_KEYS, "training": training}


def _kind(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _section(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise CommandError(f"{where} is {value!r}, expected a section with keys of its own.")
    return dict(value or {})


def _check_sense(run: RunFile, path: Path) -> None:
    """Refuse what no field can judge by itself."""
    model, data = run.model, run.data
    if (model.get("base") is None) == (model.get("checkpoint") is None):
        raise CommandError(f"{path}: model needs either `base` (a fresh hypernetwork) or `checkpoint` (to train on).")
    if model.get("dtype") not in (None, *DTYPES):
        raise CommandError(f"{path}: model.dtype is {model['dtype']!r}, expected {', '.join(DTYPES)}.")
    if data.get("train") is None:
        raise CommandError(f"{path}: data.train is missing: a JSONL file, or dataset folder or Hub id, of rows.")
    if data.get("eval_rows") is not None and data["eval_rows"] < 1:
        raise CommandError(f"{path}: data.eval_rows is {data['eval_rows']}, expected 1 or more.")
    if data.get("eval_split") is not None and data.get("eval") is None:
        raise CommandError(f"{path}: data.eval_split is a split of data.eval, which is missing.")
    if run.training.get("output_dir") is None:
        raise CommandError(f"{path}: training.output_dir is missing: the folder for checkpoints and the model.")
