"""Modeling: getting hold of the frozen base model, the right one or none."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

HUB_ERRORS = (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    EntryNotFoundError,
    OfflineModeIsEnabled,
    OSError,
    ValueError,
)
COMPARED_SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
COMPARED_SIZES += ["num_key_value_heads", "head_dim", "vocab_size"]


class BaseModelError(OSError):
    """The base model of a checkpoint cannot be had, or is another one than the hypernetwork was made for."""


def load_base(name_or_path: str, revision: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a vision-language model with AutoModelForImageTextToText.

    Args:
        name_or_path: Hub id or directory.
        revision: commit hash, branch or tag; ignored for a directory.
        kwargs: what `from_pretrained` takes, such as `dtype`, `device_map`, `attn_implementation`, `token`. Code of a
            repository runs only with `trust_remote_code=True`; a checkpoint that names such a base never suffices.

    Raises:
        BaseModelError: it is missing, gated, not at that revision, or there is no network.
    """
    if os.path.isdir(name_or_path):
        revision = None
    try:
        arguments = {"trust_remote_code": False} | kwargs
        return AutoModelForImageTextToText.from_pretrained(name_or_path, revision=revision, **arguments)
    except HUB_ERRORS as error:
        raise BaseModelError(_explain(name_or_path, revision, error)) from error


def resolve_commit(name_or_path: str, revision: str | None = None, **kwargs: Any) -> str | None:
    """Commit hash of a Hub repository at `revision`; `None` for a directory or when the cache does not know it."""
    if os.path.isdir(name_or_path):
        return None
    kwargs = {k: v for k, v in kwargs.items() if k in ("token", "cache_dir", "local_files_only", "subfolder")}
    try:
        path = hf_hub_download(name_or_path, "config.json", revision=revision, **kwargs)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, EntryNotFoundError, OSError):
        return None
    commit = Path(path).parent.name
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def check_same_base(expected: PreTrainedConfig, got: PreTrainedConfig, name: str) -> None:
    """Raise [`BaseModelError`] unless `got` has the architecture and sizes of `expected`, naming every difference."""
    pairs: list[tuple[str, Any, Any]] = [("model_type", expected.model_type, got.model_type)]
    ours, theirs = expected.get_text_config(), got.get_text_config()
    pairs += [(size, getattr(ours, size, None), getattr(theirs, size, None)) for size in COMPARED_SIZES]
    differences = [f"{size} {wanted} (got {found})" for size, wanted, found in pairs if wanted != found]
    if differences:
        raise BaseModelError(
            f"{name!r} is not the base this hypernetwork was made for: expected {', '.join(differences)}. "
            "Load the checkpoint with its own base."
        )


def _explain(name: str, revision: str | None, error: BaseException) -> str:
    """One sentence on why the base could not be loaded and what to do, from the chain of causes."""
    at = f" at revision {revision!r}" if revision else ""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    # GatedRepoError is a RepositoryNotFoundError: the more specific one first
    reasons: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
        (GatedRepoError, "it is gated: accept its terms on the Hub, then `hf auth login`"),
        (RevisionNotFoundError, "the repository has no such revision"),
        (RepositoryNotFoundError, "there is no such repository, or it is private: check the name, or `hf auth login`"),
        ((OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError), _OFFLINE),
    )
    for kinds, reason in reasons:
        if any(isinstance(link, kinds) for link in chain):
            return f"the base model {name!r}{at} could not be loaded: {reason}."
    if constants.HF_HUB_OFFLINE and not os.path.exists(name):
        return f"the base model {name!r}{at} could not be loaded: {_OFFLINE}."
    what, foreign, _ = str(error).partition("\nModel type should be one of")  # and then names a hundred classes
    if foreign:
        return f"{name!r}{at} is no vision-language model of AutoModelForImageTextToText: {what}"
    return f"the base model {name!r}{at} could not be loaded: {error}"


_OFFLINE = (
    "it is not in the local cache and the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set). Go online "
    "once, or name a local directory that holds it as the base"
)
