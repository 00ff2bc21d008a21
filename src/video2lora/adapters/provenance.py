"""Adapters: where an adapter comes from, as it is written to `video2lora.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

LIBRARIES = ("video2lora", "peft", "torch", "transformers")


@dataclass(frozen=True)
class Segment:
    """One stretch of video in an adapter, and the ranks it became.

    Attributes:
        source: name of the video, without directories or a URL's query (cut off here: they may hold secrets).
        sha256: hash of the video file's bytes.
        start: first second of the span.
        end: last second of the span.
        timestamps: seconds of the frames that were really used.
        num_frames: frames that were really used; the number of timestamps if that is known.
        num_decode_errors: packets or frames of a damaged file that did not decode.
        num_visual_tokens: visual tokens the VLM read.
        prompt: the text that followed the video.
        ranks: `(first, past the last)` of the generated ranks; `None` once a truncation has mixed them.
        weight: factor of this segment's change in a composition.
    """

    source: str | None = None
    sha256: str | None = None
    start: float | None = None
    end: float | None = None
    timestamps: tuple[float, ...] | None = None
    num_frames: int | None = None
    num_decode_errors: int = 0
    num_visual_tokens: int | None = None
    prompt: str | None = None
    ranks: tuple[int, int] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.source is not None:
            object.__setattr__(self, "source", _base_name(self.source))
        if self.timestamps is not None:
            object.__setattr__(self, "timestamps", tuple(float(t) for t in self.timestamps))
            if self.num_frames is None:
                object.__setattr__(self, "num_frames", len(self.timestamps))
        if self.ranks is not None:
            object.__setattr__(self, "ranks", (int(self.ranks[0]), int(self.ranks[1])))


@dataclass(frozen=True)
class Truncation:
    """One reduction of the rank.

    Attributes:
        from_rank: stored rank before.
        to_rank: stored rank after.
        relative_error: Frobenius norm of what this reduction lost over that of the whole change before it; ranks that
            are shared as chunks come (`max_rank`) are reduced many times.
        static_part_folded: whether a static part was mixed into the ranks, so that it can no longer be told apart.
    """

    from_rank: int
    to_rank: int
    relative_error: float
    static_part_folded: bool


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that make an adapter."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a source tree on the path
            continue
    return versions


@dataclass(frozen=True)
class AdapterProvenance:
    """Where an adapter comes from.

    Attributes:
        segments: the stretches of video in it, in the order of their ranks.
        base_model: Hub id or directory of the base; `VideoAdapter.from_weights` reads it off the VLM if it is `None`.
        base_revision: commit hash of the base.
        base_sha256: hash of two of the base's weights (`base_fingerprint`), where it has no name.
        hypernetwork: Hub id or directory of the hypernetwork.
        hypernetwork_revision: commit hash of the hypernetwork.
        hypernetwork_sha256: hash of its weights, where it has no commit.
        truncations: reductions of the rank, oldest first.
        library_versions: versions of the libraries that made it.
    """

    segments: tuple[Segment, ...] = ()
    base_model: str | None = None
    base_revision: str | None = None
    base_sha256: str | None = None
    hypernetwork: str | None = None
    hypernetwork_revision: str | None = None
    hypernetwork_sha256: str | None = None
    truncations: tuple[Truncation, ...] = ()
    library_versions: dict[str, str] = field(default_factory=installed_versions)

    @property
    def static_part_folded(self) -> bool:
        """Whether a truncation has mixed the static part into the ranks."""
        return any(truncation.static_part_folded for truncation in self.truncations)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; local directories of base and hypernetwork are cut to their last part."""
        public = replace(self, base_model=public_name(self.base_model), hypernetwork=public_name(self.hypernetwork))
        return asdict(public)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterProvenance:
        """From what `to_dict` gave.

        Raises:
            TypeError: a field is unknown or has the wrong type.
        """
        nested = {
            "segments": tuple(Segment(**segment) for segment in values.get("segments", ())),
            "truncations": tuple(Truncation(**truncation) for truncation in values.get("truncations", ())),
        }
        return cls(**{**values, **nested})


def is_local(name: str) -> bool:
    """Whether `name` is a directory rather than a Hub id (`name` or `user/name`)."""
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name)
    return hub_id is None or Path(name).is_dir()


def public_name(name: str | None) -> str | None:
    """`name` as it may be published: a Hub id as it is, a directory without the directories above it."""
    return PurePosixPath(name).name if name and is_local(name) else name


def same_repository(first: str | None, second: str | None) -> bool:
    """Whether two names can mean one repository: equal, or equal in the last part where one is a directory.

    An unknown name can be any.
    """
    if not first or not second or first == second:
        return True
    local = is_local(first) or is_local(second)
    return local and PurePosixPath(first).name == PurePosixPath(second).name


def _base_name(source: str) -> str:
    if "://" in source:
        source = urlsplit(source).path
    return PureWindowsPath(PurePosixPath(source).name).name
