"""Video in: frames of a source that is still coming in, as packets to be decoded or as pictures; each is read once."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from fractions import Fraction
from numbers import Real
from typing import Any, NamedTuple, Protocol

import av
import numpy as np

from . import decoder, index, sampling
from .compat import read_only
from .errors import UnreadableVideoError, VideoError
from .frames import MemoryFrames
from .pixels import FrameConverter
from .sources import best_video_stream, is_playlist, source_name
from .waiting import WaitingFile

KINDS = (
    "Expected a kind that can be read from front to end: MPEG-TS, MKV, WebM, FLV, fragmented MP4, raw H.264. An "
    "ordinary MP4 has its index at the end: wait until it is finished."
)
_BACK_S = 1.0  # a stream whose times go back further has begun anew


class Taken(NamedTuple):
    """Frames of a chunk: uint8 [k, height, width, 3], their k times in seconds, their (width, height) before they were
    shrunk, and how much was damaged."""

    frames: np.ndarray
    times: list[float]
    size: tuple[int, int]
    num_errors: int


class Arriving(Protocol):
    """What is still coming in. Times are seconds, those of a file or pipe from its first presentation."""

    name: str
    tick: float
    failure: Exception | None
    """What ended it, if it did not end by itself."""

    @property
    def first(self) -> float | None:
        """When the first frame came up: 0 for a file or pipe; None before."""

    @property
    def times(self) -> np.ndarray:
        """Times of the frames that are known and not forgotten, ascending."""

    def read_until(self, end: float) -> bool:
        """Read on until every frame before `end` is known; False if the source ended before."""

    def take(self, indices: np.ndarray) -> Taken | None:
        """The frames at these indices of `times`, in ascending calls; None if none decodes."""

    def forget_before(self, end: float) -> None:
        """Let go of the frames that are not on display at `end` or later, but for the one before it, without which
        `end` would seem to be where the video begins."""

    def end_of_display(self) -> float | None:
        """Until when the last frame is on display; None if nothing tells."""

    def stop(self) -> None:
        """End the source as if nothing more came; from any thread."""

    def close(self) -> None:
        """Let go of everything."""


class ArrivingFrames:
    """Pictures from an iterator, with their times or at a constant rate; kept, shrunk, until they are forgotten."""

    name, tick = "<frames>", 0.0

    def __init__(self, frames: Iterable[Any], frame_rate: float | None, longest_edge: int | None):
        self._convert = FrameConverter(longest_edge, "frames")
        self._frame_rate = frame_rate
        self._items = enumerate(frames)
        self._kept: list[tuple[float, np.ndarray]] = []
        self._size: tuple[int, int] | None = None
        self._stopped = False
        self.failure: Exception | None = None
        self._first: float | None = None

    @property
    def first(self) -> float | None:
        return self._first

    @property
    def times(self) -> np.ndarray:
        return np.array([time for time, _ in self._kept], dtype=np.float64)

    def read_until(self, end: float) -> bool:
        while not self._kept or self._kept[-1][0] < end - sampling.SNAP:
            try:
                item = None if self._stopped or self.failure else next(self._items, None)
                if item is None:
                    return False
                self._keep(*item)
            except Exception as error:
                self.failure = error
                return False
        return True

    def take(self, indices: np.ndarray) -> Taken | None:
        chosen = [self._kept[i] for i in indices]
        assert self._size is not None
        return Taken(np.stack([picture for _, picture in chosen]), [time for time, _ in chosen], self._size, 0)

    def forget_before(self, end: float) -> None:
        del self._kept[: max(sampling.frame_at(self.times, end) - 1, 0)]

    def end_of_display(self) -> float | None:
        return sampling.end_of_display(self.times)

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        self._kept.clear()

    def _keep(self, number: int, item: Any) -> None:
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Real):
            time, frame = float(item[0]), item[1]
        elif self._frame_rate is not None:
            time, frame = number / self._frame_rate, item
        else:
            raise VideoError(
                f"{self.name}: frame {number} has no time: give (seconds, frame) pairs, or frame_rate= for frames at "
                "a constant rate."
            )
        if not np.isfinite(time) or time < 0 or (self._kept and time <= self._kept[-1][0]):
            after = f", but the one before is at {self._kept[-1][0]} s" if self._kept else ""
            raise VideoError(
                f"{self.name}: frame {number} is at {time} s{after}; expected seconds, 0 or more, each later than the "
                "one before."
            )
        picture = MemoryFrames([frame])
        self._first = time if self._first is None else self._first
        self._size = self._size or picture.size
        if picture.size != self._size:
            raise VideoError(
                f"{self.name}: frame {number} has {picture.size} pixels, those before {self._size}; expected one size."
            )
        frames, _, _ = picture.read(np.array([0]), self._convert)  # a copy: the caller may use the memory again
        self._kept.append((time, frames[0]))


class ArrivingPackets:
    """A file or pipe. Packets wait undecoded until somebody asks for frames; then everything up to the last one asked
    for is decoded, less what is neither wanted nor referred to (see `decoder._SKIPS_NONREF`).

    On one thread: it gives frames soonest, and how it conceals damage is the same on every machine.
    """

    tick = 0.0

    def __init__(self, video: Any, timeout: float | None, longest_edge: int | None):
        self._file: str | WaitingFile = video if _is_url(video) else WaitingFile(video, timeout)
        self._timeout = timeout
        self.name, self._longest_edge = source_name(video), longest_edge
        self._container: av.container.InputContainer | None = None
        self._waiting: deque[av.Packet] = deque()
        self._pts: set[int] = set()  # of the frames that are known and not forgotten
        self._origin: int | None = None  # the first presentation; final once all packets before it in time are known
        self._known_until: int | None = None  # packets still to come are shown later than this
        self._last: tuple[int, int] | None = None  # presentation time of the last frame, and how long it is on display
        self._oldest: int | None = None  # frames before this are forgotten
        self._num_packets = self._num_errors = self._step = 0
        self._ended = False
        self.failure: Exception | None = None
        self._wanted: frozenset[int] = frozenset()
        self._wanted_until: int | None = None
        self._on_display: tuple[int, av.VideoFrame] | None = None
        self._ahead: tuple[int, av.VideoFrame] | None = None
        self._frames = self._decode()

    @property
    def first(self) -> float | None:
        return None if self._origin is None else 0.0

    @property
    def times(self) -> np.ndarray:
        return np.array([self._seconds(pts) for pts in sorted(self._pts)], dtype=np.float64)

    def read_until(self, end: float) -> bool:
        if self._container is None:
            self._open()
        while (
            self._origin is None or self._known_until is None or self._seconds(self._known_until) < end - sampling.SNAP
        ):
            if not self._read():
                return False
        return True

    def take(self, indices: np.ndarray) -> Taken | None:
        known = sorted(self._pts)
        targets = [known[i] for i in indices]
        self._wanted, self._wanted_until = frozenset(targets), targets[-1] if self._skips else None
        pictures: list[np.ndarray] = []
        got: list[int] = []
        for target in targets:
            self._advance(target)
            if self._on_display is not None and (not got or self._on_display[0] > got[-1]):
                got.append(self._on_display[0])
                pictures.append(self._convert(self._on_display[1]))
        num_errors, self._num_errors = self._num_errors, 0
        if self._convert.size is None or not got:
            return None
        return Taken(np.stack(pictures), [self._seconds(pts) for pts in got], self._convert.size, num_errors)

    def forget_before(self, end: float) -> None:
        known = np.array(sorted(self._pts), dtype=np.int64)
        self._oldest = int(known[max(sampling.frame_at(self.times, end) - 1, 0)])
        self._pts = {pts for pts in self._pts if pts >= self._oldest}

    def end_of_display(self) -> float | None:
        last, duration = self._last or (0, 0)
        return self._seconds(last + duration) if duration > 0 else sampling.end_of_display(self.times)

    def stop(self) -> None:
        if isinstance(self._file, WaitingFile):
            self._file.stop()  # what was read of it is still taken in
        else:
            self._ended = True

    def close(self) -> None:
        self.stop()
        self._waiting.clear()
        self._on_display = self._ahead = None
        if self._container is not None:
            self._frames.close()
            self._container.close()
        if isinstance(self._file, WaitingFile):
            self._file.close()

    def _open(self) -> None:
        try:
            timeout = self._timeout if isinstance(self._file, str) else None
            self._container = av.open(self._file, mode="r", metadata_errors="replace", timeout=timeout)
        except av.FFmpegError as error:
            raise UnreadableVideoError(
                f"{self.name}: FFmpeg cannot read it as it comes ({error.strerror}). {KINDS}"
            ) from error
        if is_playlist(self._container):
            raise UnreadableVideoError(f"{self.name}: a playlist of other files, not a video.")
        self._stream = best_video_stream(self._container, self.name)
        read_only(self._container, self._stream)
        self._stream.thread_type, self._stream.thread_count = "NONE", 1
        codec = self._stream.codec_context
        # Packets of AVI do not say when their frames are shown, nor do those of a bare stream.
        self._counted = self._container.format.name == "avi" and bool(codec.has_b_frames)
        self._in_order: deque[int] = deque()  # the times of frames that are counted
        assert self._stream.time_base is not None
        self._time_base = self._stream.time_base
        self._skips = not self._counted and codec.codec.canonical_name in decoder._SKIPS_NONREF
        self.tick = float(self._time_base)
        self._convert = FrameConverter(self._longest_edge, codec.codec.canonical_name)
        self._packets = index.packets(self._container, self._stream)

    def _seconds(self, pts: int) -> float:
        assert self._origin is not None
        return (pts - self._origin) * float(self._time_base)

    def _read(self) -> bool:
        """Take in one more packet; False at the end, or where reading fails: what came before can still be had."""
        if self._ended:
            return False
        try:
            for packet in self._packets:
                if packet is None:
                    self._num_errors += 1
                    continue
                self._note(packet)
                self._waiting.append(packet)
                return True
        except Exception as error:
            self.failure = error
        self._ended = True
        return False

    def _note(self, packet: av.Packet) -> None:
        """Enter a packet's frame in what is known."""
        number, self._num_packets = self._num_packets, self._num_packets + 1
        pts, dts, duration = packet.pts, packet.dts, packet.duration or 0
        if number == 0 and pts is None and dts is None:
            self._begin_without_times(duration)
        if self._step:
            pts = dts = number * self._step
            duration = self._step
        if dts is None and not self._stream.codec_context.has_b_frames:
            dts = pts
        if dts is not None:
            self._check_order(dts)
            self._known_until = max(dts, dts if self._known_until is None else self._known_until)
        if pts is None or packet.size == 0 or not index.is_shown(packet, self._stream):
            return
        if self._counted:
            self._in_order.append(pts)
        if self._oldest is not None and pts < self._oldest:
            return  # too late to be shown
        self._pts.add(pts)
        if self._oldest is None:
            self._origin = pts if self._origin is None else min(self._origin, pts)
        self._last = max(self._last or (pts, duration), (pts, duration))

    def _begin_without_times(self, duration: int) -> None:
        """A bare stream: frames one `duration` apart, counted as they come out of the decoder."""
        self._counted, self._skips, self._step = True, False, duration
        if duration <= 0:
            self._time_base, self._step = 1 / Fraction(self._stream.average_rate or index.FALLBACK_RATE), 1
            self.tick = float(self._time_base)

    def _check_order(self, dts: int) -> None:
        if self._known_until is not None and (self._known_until - dts) * self._time_base > _BACK_S:
            raise UnreadableVideoError(
                f"{self.name}: its times go back by {float((self._known_until - dts) * self._time_base):.1f} s: it "
                "has begun anew. Take it up again as a new stream."
            )

    def _advance(self, target: int) -> None:
        """Decode until the frame on display at `target` is there."""
        while self._on_display is None or self._on_display[0] < target:
            self._ahead = self._ahead or next(self._frames, None)
            if self._ahead is None or self._ahead[0] > target:
                break
            self._on_display, self._ahead = self._ahead, None

    def _decode(self) -> Generator[tuple[int, av.VideoFrame], None, None]:
        """Every frame that the decoder gives, with its presentation time, in order."""
        previous: int | None = None
        for frame in self._decoded():
            time = (self._in_order.popleft() if self._in_order else None) if self._counted else frame.pts
            if time is None or time < (self._origin or time) or (previous is not None and time <= previous):
                continue
            if frame.is_corrupt:
                self._note_damage()
            previous = time
            yield time, frame

    def _decoded(self) -> Iterator[av.VideoFrame]:
        codec = self._stream.codec_context
        while self._waiting or self._read():
            packet = self._waiting.popleft()
            until, time = self._wanted_until, packet.pts
            skip = self._skips and until is not None and time is not None and time < until
            codec.skip_frame = "NONREF" if skip and time not in self._wanted else "DEFAULT"
            try:
                yield from self._stream.decode(packet)
            except av.FFmpegError:
                self._note_damage()
        try:
            yield from self._stream.decode(None)
        except av.FFmpegError:
            self._note_damage()

    def _note_damage(self) -> None:
        self._num_errors += 1
        self._skips = False  # which frames conceal the damage must not depend on what is asked for


def _is_url(video: Any) -> bool:
    return isinstance(video, str) and "://" in video and not video.lower().startswith("file://")
