"""Pipelines: what a call is given: one video or many, in any form, and rows with spans of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ..video import VideoError, VideoFrames, VideoReader, is_frame
from ..video.frames import is_frames
from ..video.sources import source_name
from .options import checked_sampling

_BYTES = (bytes, bytearray, memoryview)


def is_one_video(videos: Any) -> bool:
    """Whether `videos` is one video rather than a list, dataset or generator of them."""
    if isinstance(videos, (str, Path, *_BYTES, Mapping, VideoFrames, np.ndarray, torch.Tensor)):
        return True
    if isinstance(videos, (list, tuple)):
        return bool(videos) and is_frame(videos[0])
    return hasattr(videos, "read")


def one_by_one(videos: Any) -> Iterator[Any]:
    """Each of `videos`; a torch dataset may be such that it can only be indexed."""
    if isinstance(videos, Dataset) and not isinstance(videos, IterableDataset):
        return (videos[i] for i in range(len(videos)))  # type: ignore[arg-type]
    return iter(videos)


def checked_videos(videos: Any, asked: Collection[str]) -> Iterator[Any]:
    """Each of `videos`, of which none may be a picture, or frames that are to be sampled again (`check_sampled`).

    Raises:
        VideoError: one is, when its turn comes.
    """
    for video in one_by_one(videos):
        if is_frame(video):
            raise VideoError(
                f"a {type(videos).__name__} is taken for one of videos, but there is a picture in it: pass "
                "list(frames) for the frames of one video, or internalize them as they come with .stream(frames)."
            )
        check_sampled(video, asked)
        yield video


def check_sampled(video: Any, asked: Collection[str]) -> None:
    """Raise `VideoError` for frames that are sampled already, if they are to be sampled in another way.

    Args:
        video: as in a call of the pipeline.
        asked: names of the sampling options that were given with it.
    """
    frames, own = span_of(video, {})
    if isinstance(frames, VideoFrames) and (names := [*asked, *own]):
        raise VideoError(
            f"{frames.source}: these frames are sampled already, so {', '.join(dict.fromkeys(names))} cannot be "
            "applied: pass the file, or the array of frames, or ask for nothing."
        )


def span_of(video: Any, sampling: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The video of a row, and the sampling options with the row's own span first.

    Raises:
        VideoSpanError: there is no such span.
    """
    if not isinstance(video, Mapping) or "video" not in video:
        return video, sampling
    own = {name: video[name] for name in ("start", "end") if video.get(name) is not None}
    return video["video"], checked_sampling(sampling | own, name_of(video)) if own else sampling


def name_of(video: Any) -> str:
    """A video's name in errors and adapters: as `Segment.source`, but a URL with its place."""
    if isinstance(video, Mapping) and "video" in video:
        video = video["video"]
    return video.source if isinstance(video, VideoFrames) else source_name(video)


def content_of(video: Any) -> dict[str, Any]:
    """What tells a video from others, but where it lies.

    Raises:
        VideoError: it cannot be read.
    """
    if isinstance(video, VideoFrames):
        digest = hashlib.sha256(np.ascontiguousarray(video.frames).data).hexdigest()
        content = {"frames": digest, "shape": video.frames.shape, "timestamps": video.timestamps}
        return content | {"start": video.start, "end": video.end, "duration": video.duration}
    with VideoReader(video) as reader:
        content = {"sha256": reader.sha256}
        if is_frames(video):  # the same bytes are other pictures at another width
            content["shape"] = [len(reader.times), *reader.info.size]
        return content
