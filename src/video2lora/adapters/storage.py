"""Adapters: the files of an adapter directory, written and read with every key, shape and value checked.

An adapter is an ordinary PEFT directory (`adapter_config.json`, `adapter_model.safetensors`, `README.md`) with
`video2lora.json` beside it: what PEFT has no field for. That file is

    format_version, layout, dtype, rank, static_ranks, targets, base, provenance, content_hash

with `static_ranks` the `[first, past the last]` of the static part or null, `targets` the adapted modules as they are
called in the VLM, `base` what must be known of the base, and `content_hash` the SHA-256 of the stored tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.errors import RevisionNotFoundError as HubRevisionNotFoundError
from huggingface_hub.utils import HFValidationError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..modeling.lora import LoraWeights
from ..modeling.targets import LoraTargets
from .errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    ForeignAdapterError,
    NonFiniteAdapterError,
    check_keys,
)
from .layouts import (
    BaseDescription,
    check_layout,
    from_state_dict,
    key_shapes,
    named_tensors,
    peft_config,
    peft_config_dict,
)
from .layouts import to_state_dict as layout_state_dict
from .provenance import AdapterProvenance

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "video2lora.json"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE, CARD_FILE)

# Fields of adapter_config.json that change what PEFT computes. The others may get other defaults in other versions.
_MEANINGFUL: tuple[str, ...] = ("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "bias")
_MEANINGFUL += ("rank_pattern", "alpha_pattern", "fan_in_fan_out", "layers_to_transform", "layer_replication")
_MEANINGFUL += ("modules_to_save",)

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter directory holds."""

    weights: LoraWeights
    targets: LoraTargets
    base: BaseDescription
    provenance: AdapterProvenance


def is_replaceable(directory: Path) -> bool:
    """Whether `directory` is empty, or a video2lora adapter with no file of another kind in it."""
    names = {path.name for path in directory.iterdir()}
    return not names or (PROVENANCE_FILE in names and names <= {*FILES, ".gitattributes"})


def content_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values, independent of the order of the keys."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().float().cpu().contiguous()
        digest.update(f"{key}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def check_finite(state: Mapping[str, Tensor], why: str = "Nothing sensible can be computed with it") -> None:
    """Raise `NonFiniteAdapterError` naming the first tensor that holds NaN or Inf."""
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteAdapterError(f"{key} holds NaN or Inf. {why}.")


def encode(stored: StoredAdapter, layout: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the content of `video2lora.json`, checked and ready to be written.

    Raises:
        AdapterError: an unknown layout or dtype.
        NonFiniteAdapterError: a tensor holds NaN or Inf, or would in this dtype.
    """
    check_layout(layout)
    if dtype not in DTYPES:
        raise AdapterError(f"dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}.")
    weights, targets, base = stored.weights, stored.targets, stored.base
    rank = weights.ranks[0]
    check_finite(named_tensors(weights, targets, base, layout))
    weights = weights.to("cpu", dtype)
    state = layout_state_dict(weights, targets, base, layout)
    check_finite(state, f"Its values are too large for {DTYPES[dtype]}: save with dtype=torch.float32 or bfloat16")
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    check_keys(key_shapes(targets, base, layout, rank), shapes, "the adapter in memory")
    modules = {
        name: {"in_features": targets.in_features[name], "out_features": targets.out_features[name], "paths": paths}
        for name, paths in targets.paths.items()
    }
    document = {
        "format_version": FORMAT_VERSION,
        "layout": layout,
        "dtype": DTYPES[dtype],
        "rank": rank,
        "static_ranks": [rank - weights.static_rank, rank] if weights.static_rank else None,
        "targets": {"layer_indices": targets.layer_indices, "modules": modules},
        "base": asdict(base),
        "provenance": stored.provenance.to_dict(),
        "content_hash": content_hash(named_tensors(weights, targets, base, "vlm")),
    }
    return state, document


def write_files(
    directory: Path, config: LoraConfig, state: dict[str, Tensor], document: Mapping[str, Any], card: str
) -> None:
    """Write the four files of an adapter into an empty directory."""
    save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(directory / CONFIG_FILE, peft_config_dict(config), sort_keys=True)
    shutil.copymode(directory / CONFIG_FILE, directory / WEIGHTS_FILE)  # safetensors' may be read by the owner alone
    (directory / CARD_FILE).write_text(card, encoding="utf-8")
    _write_json(directory / PROVENANCE_FILE, document, sort_keys=False)


def _write_json(path: Path, values: Mapping[str, Any], *, sort_keys: bool) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n", encoding="utf-8")


def locate(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local directory of an adapter: `name_or_path` itself, or a snapshot of a Hub repository at one commit.

    Raises:
        AdapterNotFoundError: there is none, or the Hub cannot be asked.
        ForeignAdapterError: video2lora did not write it.
    """
    directory = Path(name_or_path).expanduser()
    if directory.is_dir():
        return directory
    name, commit = str(name_or_path), revision
    if directory.exists():
        raise AdapterNotFoundError(f"{name} is a file; expected the directory of an adapter or a Hub id.")
    for file in (CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE):
        try:
            path = hf_hub_download(
                name, file, revision=commit, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            )
        except HFValidationError as error:
            raise AdapterNotFoundError(f"{name} is neither a directory nor a Hub id of the form user/name.") from error
        except LocalEntryNotFoundError as error:
            raise AdapterNotFoundError(
                f"{name} is not a directory, and its file {file} is neither in the Hub cache nor can it be fetched "
                "(no connection, or offline mode). Check the name and the connection."
            ) from error
        except GatedRepoError as error:
            raise AdapterNotFoundError(f"{name} is gated: ask for access on its Hub page and log in.") from error
        except HubRevisionNotFoundError as error:
            raise AdapterNotFoundError(f"{name} has no revision {revision!r} on the Hub.") from error
        except RepositoryNotFoundError as error:
            raise AdapterNotFoundError(
                f"{name} is neither a directory nor a repository on the Hub that you may read. If it is private, pass "
                "token= or log in."
            ) from error
        except EntryNotFoundError as error:
            raise _missing_file(name, file) from error
        commit = Path(path).parent.name  # all three files from the commit that the first one came from
    return Path(path).parent


def _missing_file(where: str | Path, file: str) -> AdapterError:
    if file == PROVENANCE_FILE:
        return ForeignAdapterError(
            f"{where} is a PEFT adapter, but has no {PROVENANCE_FILE}: video2lora did not write it. Load it with "
            "peft.PeftModel.from_pretrained(base, ...) instead."
        )
    if file == CONFIG_FILE:
        return AdapterNotFoundError(f"{where} holds no adapter: it has no {CONFIG_FILE}.")
    return AdapterFormatError(f"{where} has no {file}: the adapter is incomplete. Fetch or make it again.")


def read_directory(directory: Path) -> StoredAdapter:
    """Read an adapter directory in any layout and dtype, as float32.

    Raises:
        AdapterNotFoundError: there is no adapter in it.
        ForeignAdapterError: video2lora did not write it.
        AdapterFormatError: a file is damaged, or one does not fit the others.
        AdapterKeyError: a tensor is missing, unexpected or mis-shaped.
        NonFiniteAdapterError: a tensor holds NaN or Inf.
    """
    for file in (CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE):
        if not (directory / file).is_file():
            raise _missing_file(directory, file)
    config = _read_json(directory / CONFIG_FILE)
    document = _read_json(directory / PROVENANCE_FILE)
    format_version = document.get("format_version")
    if isinstance(format_version, int) and format_version > FORMAT_VERSION:
        raise AdapterFormatError(
            f"{directory / PROVENANCE_FILE} has format_version {format_version}, but this video2lora reads up to "
            f"{FORMAT_VERSION}: upgrade with `pip install -U video2lora`."
        )
    try:
        layout, rank = str(document["layout"]), int(document["rank"])
        static_rank = _read_static_rank(document["static_ranks"], rank)
        targets = _read_targets(document["targets"])
        base = BaseDescription(**{**document["base"], "short_names": tuple(document["base"]["short_names"])})
        provenance = AdapterProvenance.from_dict(document["provenance"])
        expected_hash = str(document["content_hash"])
        check_layout(layout)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise AdapterFormatError(
            f"{directory / PROVENANCE_FILE} is damaged ({type(error).__name__}: {error}). Make the adapter again."
        ) from error
    # adapter_config.json names the base as PEFT must find it; the provenance may hold a shortened directory.
    provenance = replace(
        provenance, base_model=config.get("base_model_name_or_path"), base_revision=config.get("revision")
    )
    _check_config(directory / CONFIG_FILE, config, peft_config_dict(peft_config(targets, base, layout, rank)))
    state = _read_tensors(directory / WEIGHTS_FILE, key_shapes(targets, base, layout, rank))
    weights = from_state_dict(state, targets, base, layout, rank, static_rank)
    if content_hash(named_tensors(weights, targets, base, "vlm")) != expected_hash:
        raise AdapterFormatError(
            f"{directory / WEIGHTS_FILE} is not the file that {PROVENANCE_FILE} beside it describes: their hashes "
            "differ. Fetch or make the adapter again."
        )
    return StoredAdapter(weights, targets, base, provenance)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterFormatError(f"{path} is not valid JSON: {error}. Fetch or make the adapter again.") from error
    if not isinstance(values, dict):
        raise AdapterFormatError(f"{path} must hold a JSON object, found {type(values).__name__}.")
    return values


def _read_static_rank(static_ranks: Sequence[int] | None, rank: int) -> int:
    if not static_ranks:
        return 0
    first, end = static_ranks
    if not 0 <= first < end == rank:  # the tensors' hash does not cover it, and composing goes by it
        raise ValueError(f"static_ranks {static_ranks} must be the last of {rank} ranks")
    return end - first


def _read_targets(values: Mapping[str, Any]) -> LoraTargets:
    modules = {name: values["modules"][name] for name in sorted(values["modules"])}
    indices = tuple(int(index) for index in values["layer_indices"])
    paths = {name: tuple(module["paths"]) for name, module in modules.items()}
    if not modules or not indices or any(len(group) != len(indices) for group in paths.values()):
        raise ValueError(f"targets name {len(indices)} layers and {[len(group) for group in paths.values()]} paths")
    return LoraTargets(
        indices,
        paths,
        {name: int(module["in_features"]) for name, module in modules.items()},
        {name: int(module["out_features"]) for name, module in modules.items()},
    )


def _check_config(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a PEFT config that would make PEFT compute something else than `video2lora.json` says."""
    for key in _MEANINGFUL:
        if found.get(key) != expected[key]:
            raise AdapterFormatError(
                f"{path} has {key} = {_short(found.get(key))}, but {PROVENANCE_FILE} beside it says "
                f"{_short(expected[key])}. Fetch or make the adapter again."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_tensors(path: Path, expected: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise AdapterFormatError(f"{path} is damaged: {error}. Fetch or make the adapter again.") from error
    except RuntimeError as error:  # how torch says that it cannot open a file
        with open(path, "rb"):  # says why: gone by now, not allowed, too many open files
            raise OSError(f"{path} could not be opened: {error}") from error
    check_keys(expected, {key: tuple(tensor.shape) for key, tensor in state.items()}, str(path))
    for key, tensor in state.items():
        if tensor.dtype not in DTYPES:
            raise AdapterFormatError(f"{path}: {key} is {tensor.dtype}, expected one of {list(DTYPES.values())}.")
    check_finite(state, f"{path} is damaged: fetch or make the adapter again")
    return state
