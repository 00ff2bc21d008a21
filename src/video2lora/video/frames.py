"""What the video room hands out, and frames that are in memory already."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np

from .errors import UnreadableVideoError, VideoError
from .pixels import FrameConverter, fit
from .sampling import end_of_display


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Frames sampled from one video, and what they really are.

    Attributes:
        frames: uint8 [num_frames, height, width, 3], RGB, upright, never enlarged. Colours on PyAV 15 and
            16 can differ in detail from those on later ones (`RgbScaler`).
        timestamps: presentation time of each frame in seconds; the file's first presentation is 0.
        start: seconds, start of the span that was sampled.
        end: seconds, end of that span (exclusive; where nothing tells when the last frame's display ends, its time).
        duration: seconds the whole video stream is on display; None when nothing tells.
        source: file name, URL, "<bytes>", "<file>" or "<frames>"; never a local directory.
        sha256: of the file's bytes, or of the bytes of frames in memory, in hexadecimal.
        size: (width, height) in pixels, upright, before shrinking; pixels are taken to be square.
        num_decode_errors: packets that could not be read or decoded and frames decoded damaged, as far as sampling
            came by them, and packets missing from a cut MP4; 0 for a sound file. On PyAV 15 and 16 the packets missing
            from a cut fragmented MP4 are not counted.
    """

    frames: np.ndarray = field(repr=False)
    timestamps: tuple[float, ...]
    start: float
    end: float
    duration: float | None
    source: str
    sha256: str | None
    size: tuple[int, int]
    num_decode_errors: int


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, from its packets.

    Attributes:
        source: as in `VideoFrames`.
        duration: seconds the video stream is on display; None when nothing tells.
        fps: frames per second on average; None for one frame of unknown duration.
        size: (width, height) in pixels, upright; pixels are taken to be square.
        codec: name of the video codec ("h264"); "frames" for frames in memory.
        num_frames: frames that are shown (edit lists applied), by their packets.
        rotation: degrees the stored picture is turned counterclockwise for display (-180..180), as ffprobe has it.
        stream: number of the stream that is read.
        streams: type and codec of every stream of the file, such as "video h264".
    """

    source: str
    duration: float | None
    fps: float | None
    size: tuple[int, int]
    codec: str
    num_frames: int
    rotation: int = 0
    stream: int = 0
    streams: tuple[str, ...] = ()


class MemoryFrames:
    """Frames in memory, read as if they were a file.

    Takes a list of PIL images or arrays [H, W, 3] of one size, or a numpy array or torch tensor [T, H, W, 3] or
    [T, 3, H, W] (where both fit, channels are last). Values are uint8, or floats in 0..1, which are scaled by 255 and
    rounded; anything else is refused, since its range would be a guess.

    Args:
        timestamps: [T] seconds, ascending; default: one second a frame.

    Raises:
        UnreadableVideoError: there are no frames.
        VideoError: shapes, types, values or timestamps are not as above.
    """

    name = "<frames>"
    tick = 0.0

    def __init__(self, frames: Any, timestamps: Sequence[float] | None = None):
        self._frames = _as_uint8_frames(frames)
        self.times = _as_times(timestamps, len(self._frames))
        self.duration = end_of_display(self.times) if timestamps is not None else float(len(self._frames))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        height, width, _ = self._frames[0].shape
        return width, height

    def sha256(self) -> str:
        """SHA-256 of all frames' bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for frame in self._frames:
            digest.update(np.ascontiguousarray(frame).data)
        return digest.hexdigest()

    def read(self, indices: np.ndarray, convert: FrameConverter) -> tuple[np.ndarray, np.ndarray, int]:
        """The frames at `indices`, shrunk; the same contract as `VideoDecoder.read`."""
        chosen = (np.ascontiguousarray(self._frames[index]) for index in indices)
        if fit(*self.size, convert.longest_edge) == self.size:
            convert.size = self.size
            return np.stack(list(chosen)), indices, 0
        return np.stack([convert(av.VideoFrame.from_ndarray(frame, "rgb24")) for frame in chosen]), indices, 0

    def close(self) -> None:
        """Nothing to close."""


def is_frame(item: Any) -> bool:
    """Whether `item` is a single picture, so that a list of such is one video rather than several."""
    return (hasattr(item, "mode") and hasattr(item, "convert")) or getattr(item, "ndim", 0) == 3


def is_frames(video: Any) -> bool:
    """Whether `video` is frames in memory rather than a file."""
    return isinstance(video, (list, tuple)) or (hasattr(video, "shape") and hasattr(video, "dtype"))


def _as_uint8_frames(frames: Any) -> Sequence[np.ndarray] | np.ndarray:
    if len(getattr(frames, "shape", (1,))) == 0 or len(frames) == 0:
        raise UnreadableVideoError("<frames>: there are no frames in it; give at least one.")
    if isinstance(frames, (list, tuple)):
        pictures = [_to_uint8(_channels_last(_to_numpy(frame), 3, f"frame {i}")) for i, frame in enumerate(frames)]
        shapes = {picture.shape for picture in pictures}
        if len(shapes) > 1:
            raise VideoError(f"<frames>: all frames must have one size, but their shapes are {sorted(shapes)}.")
        return pictures
    return _to_uint8(_channels_last(_to_numpy(frames), 4, "the array"))


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "convert"):  # a PIL image of any mode
        return np.asarray(value.convert("RGB"))
    if hasattr(value, "detach"):  # a torch tensor, wherever it is
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    if isinstance(value, (str, bytes, os.PathLike)):
        raise VideoError("<frames>: a list is taken for the frames of one video; give files one at a time.")
    if not hasattr(value, "__array__"):
        raise VideoError(f"<frames>: a frame of type {type(value).__name__}; expected PIL images, arrays or tensors.")
    return np.asarray(value)


def _channels_last(array: np.ndarray, ndim: int, what: str) -> np.ndarray:
    if array.ndim != ndim or 3 not in (array.shape[-1], array.shape[-3]) or 0 in array.shape:
        expected = "[T, H, W, 3] or [T, 3, H, W]" if ndim == 4 else "[H, W, 3] or [3, H, W]"
        raise VideoError(f"<frames>: {what} has shape {array.shape}; expected RGB, {expected}.")
    return array if array.shape[-1] == 3 else np.moveaxis(array, -3, -1)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise VideoError(f"<frames>: values of type {array.dtype}; expected uint8 (0..255) or floats in 0..1.")
    if not (np.min(array) >= 0 and np.max(array) <= 1):  # so that NaN is refused too
        raise VideoError(
            f"<frames>: float values from {np.min(array)} to {np.max(array)}; expected 0..1. Undo the normalisation, "
            "or give uint8 (0..255)."
        )
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _as_times(timestamps: Sequence[float] | None, num_frames: int) -> np.ndarray:
    if timestamps is None:
        return np.arange(num_frames, dtype=np.float64)
    try:
        times = np.asarray(timestamps, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise VideoError(f"<frames>: timestamps must be numbers of seconds ({error}).") from error
    if times.shape != (num_frames,):
        raise VideoError(f"<frames>: timestamps of shape {times.shape} for {num_frames} frames; give one a frame.")
    if not (np.isfinite(times).all() and times[0] >= 0 and (np.diff(times) > 0).all()):
        raise VideoError("<frames>: timestamps must be seconds, 0 or more, each later than the one before.")
    return times
