"""The room's front: open a video once and sample it, as a whole or span by span."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from .decoder import VideoDecoder
from .errors import VideoError
from .frames import MemoryFrames, VideoFrames, VideoInfo, is_frames
from .pixels import FrameConverter, orientation
from .sampling import check_request, select_frames
from .sources import VideoSource, source_name


class VideoReader:
    """A video opened for sampling, as a context manager; index once, sample as many spans as wanted.

    Spans in ascending order cost no more than one pass: decoding goes on where the last span ended and seeks only to
    skip something.

    Args:
        video: a path, URL (`http`, `https`, `file`, `data`, or any that fsspec knows), bytes, binary file object,
            `{"path": ..., "bytes": ...}` (a row of `datasets`), or frames in memory (`MemoryFrames`). Of several video
            streams FFmpeg's best is read (`best_video_stream`).
        longest_edge: pixels; frames are shrunk to it, keeping their ratio, and never enlarged.
        timestamps: seconds, one for each frame in memory; default: one second a frame.

    Attributes:
        name: file name, URL without credentials and query, "<bytes>", "<file>" or "<frames>".
        times: float64 [n]; presentation time of each frame in seconds, the first being 0 in a file.
        duration: seconds until the last frame's display ends; None when nothing tells.
        tick: seconds, the resolution of the file's clock; 0 for frames in memory.

    Raises:
        UnreadableVideoError: the video cannot be had or opened, has no video stream, or is empty.
        VideoError: the value is nothing a video comes as, `timestamps` or `longest_edge` make no sense, or the reader
            is used after it was closed.
    """

    def __init__(self, video: Any, *, longest_edge: int | None = None, timestamps: Sequence[float] | None = None):
        check_request(longest_edge=longest_edge, source=source_name(video))
        self._closed = False
        self._source: VideoSource | None = None
        self._sha256: str | None = None
        self._frames: VideoDecoder | MemoryFrames
        if is_frames(video):
            self._frames = MemoryFrames(video, timestamps)
            self._convert = FrameConverter(longest_edge, "frames")
            self.name, self.tick = self._frames.name, 0.0
            self.times, self.duration = self._frames.times, self._frames.duration
            return
        if timestamps is not None:
            name = source_name(video)
            raise VideoError(f"{name}: a video file has its own timestamps; give them only with frames in memory.")
        self._source = VideoSource(video)
        try:
            self._frames = VideoDecoder(self._source)
        except BaseException:
            self._source.close()
            raise
        self._convert = FrameConverter(longest_edge, self._frames.stream.codec_context.codec.canonical_name)
        index = self._frames.index
        self.name, self.tick = self._source.name, float(index.time_base)
        self.times, self.duration = index.times, index.duration

    def sample(
        self,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> VideoFrames:
        """Sample the span `[start, end)` by number of frames, by rate, or whole; see `load_video`."""
        self._check_open()
        indices, start, end = select_frames(
            self.times,
            num_frames=num_frames,
            fps=fps,
            start=start,
            end=end,
            duration=self.duration,
            tick=self.tick,
            source=self.name,
        )
        frames, indices, num_errors = self._frames.read(indices, self._convert)
        assert self._convert.size is not None
        return VideoFrames(
            frames=frames,
            timestamps=tuple(self.times[indices].tolist()),
            start=start,
            end=end,
            duration=self.duration,
            source=self.name,
            sha256=self.sha256,
            size=self._convert.size,
            num_decode_errors=num_errors,
        )

    @property
    def sha256(self) -> str:
        """SHA-256 of the file's bytes, or of all frames in memory; computed on first use."""
        if self._sha256 is None:
            hashed = self._frames if isinstance(self._frames, MemoryFrames) else self._frames.source
            self._sha256 = hashed.sha256()
        return self._sha256

    @property
    def info(self) -> VideoInfo:
        """What the video is; decodes one frame, since only a frame tells its rotation."""
        self._check_open()
        n, span = len(self.times), float(self.times[-1] - self.times[0])
        fps = (n - 1) / span if n > 1 else 1 / self.duration if self.duration else None
        if isinstance(self._frames, MemoryFrames):
            return VideoInfo(self.name, self.duration, fps, self._frames.size, codec="frames", num_frames=n)
        frame = self._frames.first_frame()
        stream = self._frames.stream
        codec = stream.codec_context
        width, height = (codec.width, codec.height) if frame is None else (frame.width, frame.height)
        turned = frame is not None and orientation(frame)[0]
        return VideoInfo(
            source=self.name,
            duration=self.duration,
            fps=fps,
            size=(height, width) if turned else (width, height),
            codec=codec.codec.canonical_name,
            num_frames=n,
            rotation=frame.rotation if frame is not None else 0,
            stream=stream.index,
            streams=tuple(
                f"{s.type} {s.codec_context.codec.canonical_name if s.codec_context else 'unknown'}"
                for s in self._frames.container.streams
            ),
        )

    def close(self) -> None:
        """Close the file and remove what was downloaded."""
        self._closed = True
        self._frames.close()
        if self._source is not None:
            self._source.close()

    def _check_open(self) -> None:
        if self._closed:
            raise VideoError(f"{self.name}: this reader is closed; open the video again.")

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_video(
    video: Any,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    longest_edge: int | None = None,
    timestamps: Sequence[float] | None = None,
) -> VideoFrames:
    """Decode a video, or take frames in memory, and sample frames from it on its presentation timeline.

    At any time the frame on display is meant: the last one whose presentation time is not later. So `timestamps` of
    the result may begin a little before `start`. A frame is returned once: a short clip gives fewer frames than asked.

    Args:
        video: see `VideoReader`.
        num_frames: that many targets evenly spaced from `start` to the time of the span's last frame, both included
            (one: the middle). On n frames of constant rate: `np.linspace(0, n - 1, num_frames).astype(int)`.
        fps: frames per second; targets at `start`, `start + 1 / fps`, ... before `end`. With neither: all frames
            (in memory, 3 bytes a pixel).
        start: seconds from the first presentation, where the span starts.
        end: seconds, where it ends (exclusive); cut to the end of the video.
        longest_edge: pixels, see `VideoReader`.
        timestamps: seconds, see `VideoReader`.

    Returns:
        The frames, uint8 [num_frames, height, width, 3], with their true timestamps. Of a damaged file, what decodes.

    Raises:
        UnreadableVideoError: the video cannot be had or opened, has no video stream, is empty, or nothing decodes.
        VideoSpanError: `start` not before `end` or outside the video, a negative time, fewer than one frame, a rate
            that is not above 0, or both `num_frames` and `fps`.
        VideoError: the value is nothing a video comes as.
    """
    # Before anything is downloaded.
    check_request(num_frames=num_frames, fps=fps, start=start, end=end, source=source_name(video))
    with VideoReader(video, longest_edge=longest_edge, timestamps=timestamps) as reader:
        return reader.sample(num_frames=num_frames, fps=fps, start=start, end=end)


def probe_video(video: Any) -> VideoInfo:
    """Tell duration, rate, size, codec and number of frames of a video from its packets, decoding one frame.

    Raises:
        UnreadableVideoError: the video cannot be had or opened, has no video stream, or is empty.
        VideoError: the value is nothing a video comes as.
    """
    with VideoReader(video) as reader:
        return reader.info
