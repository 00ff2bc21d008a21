"""Pipelines: what a call asks for, checked before anything is read, and each option in one type."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from ..adapters import VideoAdapterStore
from ..video.sampling import check_request

SAMPLING = ("num_frames", "fps", "start", "end", "longest_edge", "chunk_seconds", "max_rank")
_COUNTS = ("num_frames", "longest_edge", "max_rank")


def checked_sampling(asked: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Options that are not None, numbers of frames, pixels and ranks as int, seconds and rates as float.

    So equal requests are one request, and have one key in a store, whatever types of numbers they came as.

    Args:
        asked: some of `SAMPLING`.
        source: what is to be sampled so, for errors.

    Raises:
        VideoSpanError: no video could be sampled so.
        ValueError: `max_rank` is no rank, or there are no chunks to share it.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    check_request(**{name: value for name, value in given.items() if name != "max_rank"}, source=source)
    if "max_rank" in given:
        whole_number("max_rank", given["max_rank"], at_least=1)
        if "chunk_seconds" not in given:
            raise ValueError("max_rank is shared by the chunks of a video: pass chunk_seconds= too.")
    return {name: operator.index(value) if name in _COUNTS else float(value) for name, value in given.items()}


def whole_number(name: str, value: Any, at_least: int) -> int:
    """An option's value as an int.

    Raises:
        ValueError: it is none, or less than `at_least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = at_least - 1
    if number < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}.")
    return number


def first_given(*values: Any) -> Any:
    """The first that is not None: what a call says, what the pipeline says, the default."""
    return next(value for value in values if value is not None)


def check_store(store: Any) -> None:
    """Raise `TypeError` for anything but a store, such as the name of its folder."""
    if store is not None and not isinstance(store, VideoAdapterStore):
        raise TypeError(
            f"store must be a VideoAdapterStore, got {store!r}: pass store=VideoAdapterStore(directory), with the "
            "folder that it keeps adapters in."
        )
