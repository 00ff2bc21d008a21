"""Video in: decoding and frame sampling on the presentation timeline, from files, URLs, bytes or frames in memory."""

from .errors import UnreadableVideoError, VideoError, VideoSpanError
from .frames import VideoFrames, VideoInfo, is_frame
from .live import LiveVideo
from .reader import VideoReader, load_video, probe_video

__all__ = [
    "LiveVideo",
    "UnreadableVideoError",
    "VideoError",
    "VideoFrames",
    "VideoInfo",
    "VideoReader",
    "VideoSpanError",
    "is_frame",
    "load_video",
    "probe_video",
]
