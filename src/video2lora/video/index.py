"""The packets of a video stream by presentation time: what can be shown, when, and where decoding can begin."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer

from .compat import num_missing_packets
from .errors import UnreadableVideoError
from .sources import VideoSource

FALLBACK_RATE = 25  # frames per second, FFmpeg's own guess for a stream that says nothing about time


@dataclass(frozen=True)
class PacketIndex:
    """Where the frames of a video stream lie, by its packets: counts in headers are wrong with edit lists or in WebM.

    Attributes:
        pts: [n] int64, ascending; presentation times of the frames shown, in units of `time_base`.
        end: end of the last frame's display in the same units, or None where nothing tells it.
        time_base: seconds a unit.
        key_pts, key_dts, key_packet: [k] int64, by ascending `key_pts`; the keyframes' presentation and decoding times
            and their positions among the packets.
        counted: packets do not say when their frames are shown (raw H.264, or H.264 with B-frames in AVI); the i-th
            frame out of the decoder then has `pts[i]`, so decoding always begins with the first packet.
        num_errors: packets that could not be read, those that the header lists after the end of a cut file included
            (`num_missing_packets`).
    """

    pts: np.ndarray
    end: int | None
    time_base: Fraction
    key_pts: np.ndarray
    key_dts: np.ndarray
    key_packet: np.ndarray
    counted: bool
    num_errors: int

    @property
    def times(self) -> np.ndarray:
        """[n] float64 seconds from the first presentation."""
        return (self.pts - self.pts[0]) * float(self.time_base)

    @property
    def duration(self) -> float | None:
        """Seconds from the first presentation to the end of the last."""
        return None if self.end is None else float((self.end - int(self.pts[0])) * self.time_base)

    def key_for(self, pts: int) -> int:
        """Number of the last keyframe from which the frame at `pts` can be decoded (0 where there is none before)."""
        # Not "the last keyframe packet before it": with open groups of pictures a frame shown before a keyframe may
        # follow it in the file and yet need the group before.
        return max(int(np.searchsorted(self.key_pts, pts, side="right")) - 1, 0)


def index_packets(source: VideoSource, container: InputContainer, stream: av.VideoStream) -> PacketIndex:
    """Read every packet of `stream`, a stream of `container`, which is `source` opened; decode none.

    Raises:
        UnreadableVideoError: there is no packet.
    """
    shown = array("q")  # presentation time, duration, decoding time of each; as bytes, for an hour has 100,000 of them
    keys: list[tuple[int, int, int]] = []  # presentation time, decoding time, position
    num_packets = num_errors = duration = 0
    for packet in packets(container, stream):
        if packet is None:
            num_errors += 1
            continue
        position, num_packets = num_packets, num_packets + 1
        if packet.size == 0:
            continue  # AVI writes these for frames it dropped
        duration = duration or packet.duration or 0
        if packet.pts is None:
            continue
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts, position))
        if not is_shown(packet, stream):
            continue
        shown.extend((packet.pts, packet.duration or 0, packet.pts if packet.dts is None else packet.dts))
    if num_packets == 0:
        raise UnreadableVideoError(f"{source.name}: its video stream holds no frames; the file is cut short or empty.")
    num_errors += num_missing_packets(source, stream, num_packets)
    if not shown:
        return _timeless_index(stream, num_packets, duration, num_errors)
    table = np.array(shown, dtype=np.int64).reshape(-1, 3)
    pts, first_of = np.unique(table[:, 0], return_index=True)
    # AVI knows no presentation times; for H.264 FFmpeg then hands out the decoding times.
    in_order = bool((np.diff(table[:, 0]) > 0).all())
    counted = container.format.name == "avi" and stream.codec_context.has_b_frames and in_order
    keys = sorted(keys) if keys and not counted else [(int(pts[0]), int(pts[0]), 0)]
    end = _end(pts, _duration(table, int(first_of[-1]), container), stream, container)
    key_pts, key_dts, key_packet = np.array(keys, dtype=np.int64).T
    assert stream.time_base is not None
    return PacketIndex(pts, end, stream.time_base, key_pts, key_dts, key_packet, counted, num_errors)


def is_shown(packet: av.Packet, stream: av.VideoStream) -> bool:
    """Whether the frame of a packet is ever on display: an edit list may drop it, and VP8 has hidden ones."""
    hidden = stream.codec_context.name in ("vp8", "libvpx") and not memoryview(packet)[0] & 0x10  # RFC 6386 9.1
    return not packet.is_discard and not hidden


def packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet | None]:
    """The packets of `stream` from here to the end of the file; None for one that could not be read.

    Goes on after an error as long as packets still come.
    """
    came = True
    while came:
        came = False
        try:
            for packet in container.demux(stream):
                if packet.pts is None and packet.dts is None and packet.size == 0:
                    continue  # PyAV's request to flush the decoder
                came = True
                yield packet
            return
        except av.FFmpegError:
            yield None


def _duration(table: np.ndarray, row: int, container: InputContainer) -> int:
    """How long the frame of a packet is on display, 0 where nothing tells it.

    In MP4 a frame lasts as long as its packet: until the next is decoded. FFmpeg 7 says so only at a constant rate.
    """
    if table[row, 1] == 0 and "mp4" in container.format.name.split(",") and row + 1 < len(table):
        return int(table[row + 1, 2] - table[row, 2])
    return int(table[row, 1])


def _end(pts: np.ndarray, last_duration: int, stream: av.VideoStream, container: InputContainer) -> int | None:
    """End of the last display: by its packet, else by the stream's or file's duration, else one median gap later."""
    first, last = int(pts[0]), int(pts[-1])
    assert stream.time_base is not None
    candidates = [last + last_duration, first + (stream.duration or 0)]
    if container.duration is not None:
        candidates.append(first + int(Fraction(container.duration, av.time_base) / stream.time_base))
    if len(pts) > 1:
        candidates.append(last + int(np.median(np.diff(pts))))
    return next((end for end in candidates if end > last), None)


def _timeless_index(stream: av.VideoStream, num_packets: int, duration: int, num_errors: int) -> PacketIndex:
    """For a stream without times: frames one `duration` apart, to be decoded from the beginning."""
    time_base = stream.time_base
    assert time_base is not None
    if duration <= 0:
        time_base, duration = 1 / Fraction(stream.average_rate or FALLBACK_RATE), 1
    pts = np.arange(num_packets, dtype=np.int64) * duration
    first = np.zeros(1, dtype=np.int64)
    end = num_packets * duration
    return PacketIndex(pts, end, time_base, first, first, first, True, num_errors)
