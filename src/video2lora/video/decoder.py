"""Decodes chosen frames of a video file: forward where it can, seeking where that skips something."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, TypeAlias

import av
import numpy as np

from .compat import read_only
from .errors import UnreadableVideoError
from .index import PacketIndex, index_packets, packets
from .pixels import FrameConverter
from .sources import VideoSource, best_video_stream

# A seek throws away what the decoder's threads hold; to skip fewer packets than this it is cheaper to decode them.
_MIN_SKIP = 8

# Codecs of which frames that no other refers to can be left undecoded without any other frame coming out differently.
_SKIPS_NONREF = ("h264",)

Frames: TypeAlias = tuple[np.ndarray, np.ndarray, int]
"""What a `read` gives: frames uint8 [k, height, width, 3], their k indices, and how much was damaged on the way."""


class _Shown(NamedTuple):
    pts: int
    frame: av.VideoFrame


class _Damage(Exception):
    """Something failed to decode while several threads were at work."""


class VideoDecoder:
    """The frames of one video file by index: its packets are indexed once, then `read` as often as wanted.

    A `read` that begins where the last one ended goes on decoding there, so a long video can be read in pieces at the
    cost of reading it once.
    """

    _threads = 0  # FFmpeg's choice

    def __init__(self, source: VideoSource):
        self.source = source
        self._open()
        try:
            self.index: PacketIndex = index_packets(source, self.container, self.stream)
        except BaseException:
            self.container.close()
            raise
        self._run: _Run | None = None
        self._before: _Shown | None = None  # the last frame seen before the run began
        self._searched: int | None = None  # up to this time nothing better than what was returned can be had
        self.wanted: frozenset[int] = frozenset()
        """Times of the frames that this `read` asks for, if others may be left undecoded up to `wanted_until`."""
        self.wanted_until: int | None = None

    def read(self, indices: Sequence[int] | np.ndarray, convert: FrameConverter) -> Frames:
        """Decode the frames at `indices` (ascending), each converted as it comes.

        For a frame that does not decode the nearest earlier one stands in, as on a player's screen; duplicates are
        dropped.

        Returns:
            `(frames, indices, num_errors)`: the frames really got, uint8 [k, height, width, 3], their indices, and how
            many packets could not be read or decoded or gave a damaged frame, as far as this read came by them.

        Raises:
            UnreadableVideoError: none of them decodes.
        """
        try:
            return self._read(indices, convert)
        except _Damage:
            self._use_one_thread()
            return self._read(indices, convert)

    def first_frame(self) -> av.VideoFrame | None:
        """The first frame that decodes, for what only a frame tells (its rotation); None if there is none."""
        self._forget()
        try:
            shown = next(self._run_from(0).frames, None)
        except _Damage:
            self._use_one_thread()
            shown = next(self._run_from(0).frames, None)
        self._forget()
        return None if shown is None else shown.frame

    def close(self) -> None:
        """Close the file."""
        self._forget()
        self.container.close()

    def _open(self) -> None:
        self.container = self.source.open()
        try:
            self.stream = best_video_stream(self.container, self.source.name)
            read_only(self.container, self.stream)
            self.stream.thread_type = "AUTO"
            self.stream.thread_count = self._threads
        except BaseException:
            self.container.close()
            raise

    def _use_one_thread(self) -> None:
        # How FFmpeg conceals damage depends on the number of threads; on one it is the same on every machine.
        self._threads = 1
        self._forget()
        self.container.close()
        self._open()

    def _forget(self) -> None:
        if self._run is not None:
            self._run.frames.close()
        self._run = self._before = self._searched = self.wanted_until = None

    def _run_from(self, key: int) -> _Run:
        """Begin to decode anew. The run before is closed: its generators refer to themselves, so it would live, and
        with it FFmpeg's threads, until the garbage collector comes by; in a forked process it would wait for threads
        that are not there."""
        if self._run is not None:
            self._run.frames.close()
        self._run = _Run(self, key)
        return self._run

    def _read(self, indices: Sequence[int] | np.ndarray, convert: FrameConverter) -> Frames:
        damaged: set[int] = set()
        out: np.ndarray | None = None
        got: list[int] = []
        targets = self.index.pts[np.asarray(indices, dtype=np.int64)].tolist()
        # on one thread there is damage, and which frames conceal it must not depend on what is asked for
        skips = self._threads != 1 and not self.index.counted
        skips = skips and self.stream.codec_context.codec.canonical_name in _SKIPS_NONREF
        self.wanted, self.wanted_until = frozenset(targets), max(targets, default=None) if skips else None
        for target in targets:
            found = self._shown_at(target, damaged)
            if found is None:
                continue
            index = int(np.searchsorted(self.index.pts, found.pts, side="right")) - 1
            if got and index <= got[-1]:
                continue
            picture = convert(found.frame)
            if out is None:
                out = np.empty((len(indices), *picture.shape), dtype=np.uint8)
            out[len(got)] = picture
            got.append(index)
        if out is None:
            raise UnreadableVideoError(
                f"{self.source.name}: none of the {len(indices)} frames asked for decodes ({len(damaged)} errors): "
                "the file is damaged or cut short. Give another span, or a sound copy."
            )
        out = out if len(got) == len(out) else out[: len(got)].copy()
        return out, np.array(got, dtype=np.int64), len(damaged) + self.index.num_errors

    def _shown_at(self, target: int, damaged: set[int]) -> _Shown | None:
        """The last decodable frame at or before `target`."""
        key = self.index.key_for(target)
        run = self._run
        if run is None or run.is_past(target):
            self._before = self._searched = None
            run = self._run_from(key)
        elif self.index.key_packet[key] - run.packet >= _MIN_SKIP:
            self._before = run.last or self._before
            run = self._run_from(key)
        run.advance(target, damaged)
        if run.left_out and (run.last is None or run.last.pts != target):
            # left undecoded for an earlier read, or lost: decode everything
            self.wanted_until = None
            run = self._run_from(key)
            run.advance(target, damaged)
        # Nothing decodes from that keyframe on: look further and further back, but nowhere twice.
        known = 0 if self._searched is None else self.index.key_for(self._searched)
        step = 1
        while run.last is None and run.key > known:
            run = self._run_from(max(run.key - step, known))
            run.advance(target, damaged)
            step *= 2
        self._searched = target
        return run.last or self._before


class _Run:
    """Decoding from one keyframe on, frame by frame in the order of presentation."""

    def __init__(self, decoder: VideoDecoder, key: int):
        self._decoder = decoder
        self._index = decoder.index
        stream_packets, self.key = self._packets_from(key)
        self.packet = int(self._index.key_packet[self.key]) - 1
        """Position of the packet sent to the decoder last."""
        self.frames = self._decode(stream_packets)
        self.last: _Shown | None = None
        """The frame on display at the last target."""
        self.left_out = False
        """Whether packets were sent whose frames the decoder may leave undecoded."""
        self._ahead: _Shown | None = None
        self._reached: int | None = None
        self._damaged: set[int] = set()

    def is_past(self, target: int) -> bool:
        """Whether the frame on display at `target` lies behind."""
        shown_since = self._reached if self.last is None else self.last.pts
        return shown_since is not None and target < shown_since

    def advance(self, target: int, damaged: set[int]) -> None:
        """Decode until `last` is the frame on display at `target`; note the times where something was damaged."""
        self._damaged = damaged
        while self.last is None or self.last.pts < target:
            self._ahead = self._ahead or next(self.frames, None)
            if self._ahead is None or self._ahead.pts > target:
                break
            self.last, self._ahead = self._ahead, None
        self._reached = target

    def _packets_from(self, key: int) -> tuple[Iterable[av.Packet | None], int]:
        """The packets from keyframe `key` or an earlier one on, and which one it is."""
        decoder, index = self._decoder, self._index
        # Seeking is a request: some formats go by presentation times, some by decoding times, some by other clocks.
        requests = (index.key_pts[key], *index.key_dts[[key, max(key - 1, 0), max(key - 4, 0)]])
        for time in () if index.counted else requests:
            try:
                decoder.container.seek(int(time), stream=decoder.stream)
            except av.FFmpegError:
                break  # a format that cannot seek
            stream_packets = packets(decoder.container, decoder.stream)
            first = next((p for p in stream_packets if p is not None and p.is_keyframe and p.pts is not None), None)
            if first is None:
                continue
            landed = int(np.searchsorted(index.key_pts, first.pts or 0))
            if landed <= key and index.key_pts[landed] == first.pts:
                return chain([first], stream_packets), landed
        decoder.container.close()
        decoder._open()
        return packets(decoder.container, decoder.stream), 0

    def _decode(self, stream_packets: Iterable[av.Packet | None]) -> Generator[_Shown, None, None]:
        pts = self._index.pts
        earliest = int(pts[0])
        if self.key > 0:  # frames shown before the keyframe but stored after it lean on what was skipped
            earliest = max(earliest, int(self._index.key_pts[self.key]))
        previous = earliest - 1
        for number, frame in enumerate(self._decoded(stream_packets, earliest)):
            if self._index.counted:
                time = int(pts[number]) if number < len(pts) else None
            else:
                time = frame.pts
            if time is None or time <= previous:
                continue
            if frame.is_corrupt:
                self._note_damage(time)
            previous = time
            yield _Shown(time, frame)
        if previous < pts[-1] and self._decoder._threads != 1 and not self.left_out:
            raise _Damage  # emptying its buffers, PyAV 18 keeps an error to itself and drops the frames behind it

    def _decoded(self, stream_packets: Iterable[av.Packet | None], earliest: int) -> Iterator[av.VideoFrame]:
        """What the decoder gives for all packets and then, its buffers emptied, at the end."""
        for packet in stream_packets:
            if packet is None:
                continue  # unreadable; the index has counted it
            self.packet += 1
            self._leave_out(packet)
            try:
                yield from self._decoder.stream.decode(packet)
            except av.FFmpegError:
                if packet.pts is None or packet.pts >= earliest:
                    self._note_damage(self.packet if packet.pts is None else packet.pts)
        try:
            yield from self._decoder.stream.decode(None)
        except av.FFmpegError:
            self._note_damage(int(self._index.pts[-1]) + 1)

    def _leave_out(self, packet: av.Packet) -> None:
        """Have the decoder skip this packet's frame if nobody asks for it and no other frame refers to it."""
        # what lies behind the last one wanted may be wanted next: the decoder is sent packets ahead of what it gives
        until, time = self._decoder.wanted_until, packet.pts
        skip = until is not None and time is not None and time < until and time not in self._decoder.wanted
        self.left_out |= skip
        self._decoder.stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"

    def _note_damage(self, time: int) -> None:
        if self._decoder._threads != 1:
            raise _Damage
        self._damaged.add(time)
