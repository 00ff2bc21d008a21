"""What PyAV 15 to 18 do differently: all that depends on the installed version is here, and nothing of it elsewhere.

What is decoded (frames, times, damage, rotation) is the same on all of them. The feature itself is asked for, not a
version number.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import av
from av.container import InputContainer
from av.filter import Graph
from av.video.reformatter import VideoReformatter

if TYPE_CHECKING:
    from .sources import VideoSource

# From 17.0 on PyAV scales with `sws_scale_frame`, which goes by the colour matrix, range and chroma position that the
# frame declares. Before, it took every video for BT.601 and full-range 10-bit video for limited: off by up to 25.
_SCALES_BY_FRAME = hasattr(av.VideoFrame, "color_trc")
_UNSPECIFIED = 2  # AVCOL_TRC_UNSPECIFIED, AVCOL_PRI_UNSPECIFIED
# Codecs whose decoders, for these pixel formats, declare chroma samples left of the centre unless the stream says
# otherwise. PyAV shows it nowhere.
_CHROMA_LEFT = {
    "dvvideo": "yuv",
    "h264": "yuv",
    "hevc": "yuv420",
    "mpeg2video": "yuv",
    "mpeg4": "yuv",
    "vc1": "yuv",
    "vvc": "yuv420",
}


class RgbScaler:
    """Converts frames to RGB of any size by the colour matrix, range and chroma position that each frame declares.

    On PyAV 15 and 16 FFmpeg's `scale` filter does it, with the same pixels as PyAV 17 and later but for two things: a
    stream that declares another chroma position than is usual for its codec comes out with colours shifted by a
    fraction of a pixel, and on PyAV 15 (FFmpeg 7) the colour edges of 10-bit video are coarser at full size.

    Args:
        codec: canonical name of the video codec ("h264"), which tells the chroma position on PyAV 15 and 16.
    """

    def __init__(self, codec: str):
        self._codec = codec
        self._reformatter = VideoReformatter()
        self._graph: Graph | None = None
        self._built_for: tuple[object, ...] = ()

    def __call__(self, frame: av.VideoFrame, width: int, height: int, interpolation: str) -> av.VideoFrame:
        """The frame as rgb24 of this size; `interpolation` is a name in PyAV's `Interpolation`."""
        # On one thread, for the pixels must not depend on the number of cores. Transfer curve and primaries convert
        # nothing here, but swscale of FFmpeg 8 refuses reserved values of them, which some VP9 files have.
        if not _SCALES_BY_FRAME:
            return self._through_graph(frame, width, height, interpolation)
        frame.color_trc = frame.color_primaries = _UNSPECIFIED
        return self._reformatter.reformat(frame, width, height, "rgb24", interpolation=interpolation, threads=1)

    def _through_graph(self, frame: av.VideoFrame, width: int, height: int, interpolation: str) -> av.VideoFrame:
        declared = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        wanted = (width, height, interpolation)
        if self._graph is None or self._built_for != (*declared, *wanted):
            self._graph, self._built_for = self._build_graph(frame, *wanted), (*declared, *wanted)
        self._graph.push(frame)
        return self._graph.vpull()

    def _build_graph(self, frame: av.VideoFrame, width: int, height: int, interpolation: str) -> Graph:
        left = frame.format.name.startswith(_CHROMA_LEFT.get(self._codec, "none"))
        scale = f"{width}:{height}:flags={interpolation.lower()}:interl=-1:threads=1"
        graph = Graph()
        graph.link_nodes(
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)),
            graph.add("setparams", "color_primaries=unknown:color_trc=unknown"),
            graph.add("scale", scale + ":in_chroma_loc=left" if left else scale),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        )
        graph.configure()
        return graph


def read_only(container: InputContainer, stream: av.VideoStream) -> None:
    """Have the demuxer skip the other streams' bytes. PyAV below 17.1 cannot: it reads them and throws them away."""
    if hasattr(av.stream, "Discard"):
        for other in container.streams:
            if other is not stream:
                other.discard = av.stream.Discard.all


def num_missing_packets(source: VideoSource, stream: av.VideoStream, num_packets: int) -> int:
    """How many more packets the file's header lists for `stream` than the `num_packets` in it: the tail cut off.

    PyAV below 17.0 does not show FFmpeg's list. For MP4 and MOV the header's number of frames does as well, less those
    that an edit list drops; of a cut fragmented MP4 nothing is known there, so the packets it lost are not counted.
    """
    if hasattr(stream, "index_entries"):
        return max(0, len(stream.index_entries) - num_packets)
    if "mp4" not in stream.container.format.name.split(",") or stream.frames <= num_packets:
        return 0
    num_packets = 0
    with source.undisturbed(), source.open({"ignore_editlist": "1"}) as whole:
        try:
            for packet in whole.demux(whole.streams[stream.index]):
                num_packets += packet.size > 0
        except av.FFmpegError:
            pass
    return max(0, stream.frames - num_packets)
