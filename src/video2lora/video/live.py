"""Video in: sources that are still growing, cut into chunks as they come; every frame is decoded once."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

from .arriving import KINDS, Arriving, ArrivingFrames, ArrivingPackets
from .errors import UnreadableVideoError, VideoError, VideoSpanError
from .frames import VideoFrames
from .sampling import SNAP, check_request, frame_at, is_number, select_frames
from .sources import source_name

logger = logging.getLogger(__name__)


class LiveVideo:
    """A video that is still coming in, as an iterator over its chunks.

    The chunks are `[first, first + chunk_seconds)`, `[first + chunk_seconds, ...)` and so on, with `first` the time of
    the first frame, and a shorter one at the end; each gives what `VideoReader.sample(start=, end=)` of the finished
    file gives. Those in which no frame comes up are left out, if the picture that stands still was sampled before.

    Packets of one chunk are kept compressed until it is complete, then only the frames asked for (and those that they
    refer to) are decoded, so the memory needed is that of one chunk's bytes and sampled frames. Frames that come
    decoded are kept, shrunk, until their chunk is complete.

    Args:
        video: the path of a file that is being written; a pipe or another binary file object, which is read once from
            front to end; or an iterable of frames (PIL images, arrays or tensors `[height, width, 3]`), or of pairs
            `(seconds, frame)`. Files and pipes must be of a kind that can be read as it comes: MPEG-TS, MKV, WebM,
            fragmented MP4, FLV, raw H.264.
        chunk_seconds: length of a chunk.
        num_frames, fps: how each chunk is sampled, as in `load_video`.
        longest_edge: pixels to which frames are shrunk.
        frame_rate: frames a second of an iterable that gives no times.
        timeout: seconds without anything new after which a file or pipe counts as ended; None: never (a pipe still
            ends where its writer closes it). An iterable ends by itself.

    Raises:
        VideoSpanError: sampling, a length or a rate that no video could have.

    Raises (while iterated):
        UnreadableVideoError: it cannot be opened, has no video stream, or nothing in it decodes; or its times go back.
        VideoError: a frame or a time is none.
    """

    def __init__(
        self,
        video: Any,
        *,
        chunk_seconds: float,
        num_frames: int | None = None,
        fps: float | None = None,
        longest_edge: int | None = None,
        frame_rate: float | None = None,
        timeout: float | None = 10.0,
    ):
        asked: dict[str, Any] = {"num_frames": num_frames, "fps": fps, "longest_edge": longest_edge}
        check_request(**asked, chunk_seconds=chunk_seconds, source=source_name(video))
        if frame_rate is not None and not (is_number(frame_rate) and frame_rate > 0):
            raise VideoSpanError(f"frame_rate={frame_rate!r}, but it must be a number above 0 (frames per second).")
        if timeout is not None and not (isinstance(timeout, Real) and timeout >= 0):
            raise VideoSpanError(f"timeout={timeout!r}, but it must be a number of seconds, 0 or more, or None.")
        self._length, self._read = float(chunk_seconds), -math.inf  # the last frame that was sampled
        self._sampling: dict[str, Any] = {"num_frames": num_frames, "fps": fps}
        self._source: Arriving
        if isinstance(video, (str, os.PathLike)) or hasattr(video, "read"):
            if frame_rate is not None:
                raise VideoError("a video file has its own times; give frame_rate only with frames.")
            self._source = ArrivingPackets(video, timeout, longest_edge)
        elif isinstance(video, Iterable) and not isinstance(video, (bytes, bytearray, memoryview, Mapping)):
            self._source = ArrivingFrames(video, frame_rate, longest_edge)
        else:
            raise VideoError(
                f"cannot read a video from {type(video).__name__} as it comes; expected the path of a file that is "
                "being written, a binary file object such as a pipe, a URL, or an iterator of frames."
            )

    def stop(self) -> None:
        """End the source as if nothing more came, from any thread. (A URL's end comes with its timeout.)"""
        self._source.stop()

    def __iter__(self) -> Iterator[VideoFrames]:
        source, number, decoded = self._source, 0, False
        try:
            source.read_until(0.0)  # now it is known when the first frame came up
            while True:
                ended = not source.read_until(self._edge(number + 1))
                times = source.times
                if not len(times):
                    break
                first, end = self._edge(number), self._edge(number + 1)
                whole = not ended or times[-1] >= end - SNAP
                if ((times >= first - SNAP) & (times < end - SNAP)).any() or self._is_unread(first, whole):
                    chunk = self._sample(number, whole)
                    if chunk is not None:
                        decoded = True
                        yield chunk
                if not whole and not self._is_unread(end, whole):
                    break
                source.forget_before(end)
                number = self._next(number)
        finally:
            source.close()
        if source.failure is not None:
            raise source.failure
        if not decoded:
            hint = f" {KINDS}" if isinstance(source, ArrivingPackets) else ""
            raise UnreadableVideoError(f"{source.name}: no frame came of it.{hint}")

    def _edge(self, number: int) -> float:
        """Where chunk `number` begins."""
        return (self._source.first or 0.0) + number * self._length

    def _is_unread(self, time: float, whole: bool) -> bool:
        """Whether a picture is on display at `time` that no chunk has sampled; unless `whole`, it is the last one."""
        times = self._source.times
        if not whole and (self._source.end_of_display() or float(times[-1])) <= time + SNAP:
            return False
        return bool(times[max(frame_at(times, time), 0)] > self._read)

    def _next(self, number: int) -> int:
        """The next chunk, past those that show what was sampled already."""
        end = self._edge(number + 1)
        if self._is_unread(end, whole=True):
            return number + 1
        later = self._source.times[self._source.times >= end - SNAP]
        if len(later) and later[0] >= self._edge(number + 2) - SNAP:
            # a frame that others refer to comes before those that are shown before it
            self._source.read_until(float(later[0]))
            later = self._source.times[self._source.times >= end - SNAP]
        return max(number + 1, int((later[0] + SNAP - self._edge(0)) / self._length)) if len(later) else number + 1

    def _sample(self, number: int, whole: bool) -> VideoFrames | None:
        """The frames of a chunk, or of what came of it; None if none decodes."""
        source, end = self._source, self._edge(number + 1)
        indices, start, end = select_frames(
            source.times,
            start=self._edge(number),
            end=end,
            duration=end if whole else source.end_of_display(),
            tick=source.tick,
            source=source.name,
            **self._sampling,
        )
        self._read = float(source.times[indices[-1]])
        taken = source.take(indices)
        if taken is None:
            logger.warning("%s: nothing of %.3f..%.3f s decodes; it is left out.", source.name, start, end)
            return None
        return VideoFrames(
            frames=taken.frames,
            timestamps=tuple(taken.times),
            start=start,
            end=end,
            duration=end,
            source=source.name,
            sha256=None,
            size=taken.size,
            num_decode_errors=taken.num_errors,
        )
