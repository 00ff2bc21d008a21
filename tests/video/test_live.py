"""LiveVideo: what is still coming in, cut into the chunks of the finished file, with nothing decoded twice."""

from __future__ import annotations

import io
import math
import os
import socket
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.video.clips import VFR_MS, numbers_in, picture, write_clip, write_sound

from video2lora.video import LiveVideo, UnreadableVideoError, VideoError, VideoReader, VideoSpanError, arriving

FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
KINDS = {
    "mpegts": ("clip.ts", {"container_format": "mpegts"}),
    "matroska": ("clip.mkv", {}),
    "fragmented mp4": ("clip.mp4", {"container_options": FRAGMENTED}),
    "flv": ("clip.flv", {}),
    "raw h264": ("clip.h264", {"container_format": "h264"}),
    "avi": ("clip.avi", {}),
    "vp9": ("clip.webm", {"codec": "libvpx-vp9"}),
    "vp8": ("clip8.webm", {"codec": "libvpx"}),
    "open groups": ("open.ts", {"container_format": "mpegts", "options": {"x264-params": "open-gop=1"}}),
}
SAMPLINGS = [{"num_frames": 4}, {"num_frames": 1}, {"fps": 2.0}, {}]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """An MPEG-TS of 110 frames, 4.4 s, with B-frames."""
    path = tmp_path_factory.mktemp("live") / "clip.ts"
    return write_clip(path, 110, b_frames=3, container_format="mpegts")


def chunks_of(path: Path, seconds: float, **sampling) -> list:
    """The chunks of the finished file."""
    longest_edge = sampling.pop("longest_edge", None)
    with VideoReader(path, longest_edge=longest_edge) as reader:
        edges = [n * seconds for n in range(math.ceil(round(reader.duration / seconds, 6)) + 1)]
        return [reader.sample(start=a, end=b, **sampling) for a, b in zip(edges, edges[1:], strict=False)]


def check_same(live: list, finished: list) -> None:
    assert len(live) == len(finished) > 1
    for a, b in zip(live, finished, strict=True):
        assert np.array_equal(a.frames, b.frames)
        assert (a.timestamps, a.start, a.num_decode_errors) == (b.timestamps, b.start, 0)
        assert a.end == pytest.approx(b.end, abs=1e-9)
        assert (a.size, a.source) == (b.size, b.source)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_chunks_of_the_finished_file(tmp_path, kind):
    name, options = KINDS[kind]
    path = write_clip(tmp_path / name, 110, b_frames=3, **options)
    for sampling in SAMPLINGS:
        check_same(list(LiveVideo(path, chunk_seconds=1.0, timeout=0, **sampling)), chunks_of(path, 1.0, **sampling))


@pytest.mark.parametrize("seconds", [0.3, 0.52, 2.0])
def test_edges_between_frames_and_frames_shrunk(clip, seconds):
    sampling = {"num_frames": 3, "longest_edge": 64}
    live = list(LiveVideo(clip, chunk_seconds=seconds, timeout=0, **sampling))
    check_same(live, chunks_of(clip, seconds, **sampling))
    assert live[0].frames.shape[1:] == (32, 64, 3)


def test_variable_rates_and_pictures_that_stand_still(tmp_path):
    times = VFR_MS + [9000, 9040]
    path = write_clip(tmp_path / "vfr.mkv", len(times), pts=times, time_base=Fraction(1, 1000))
    live = list(LiveVideo(path, chunk_seconds=1.0, timeout=0))
    assert [chunk.start for chunk in live] == [0.0, 1.0, 3.0, 9.0]  # from 4 to 9 s nothing comes up
    finished = {chunk.start: chunk for chunk in chunks_of(path, 1.0)}
    for chunk in live:
        assert np.array_equal(chunk.frames, finished[chunk.start].frames)
        assert chunk.timestamps == finished[chunk.start].timestamps


def test_decoding_times_that_run_ahead_hide_no_chunk(tmp_path, monkeypatch):
    """Chunks shorter than what B-frames put out of order, and a clock that counts in odd steps."""
    path = write_clip(tmp_path / "clip.ts", 60, b_frames=3, container_format="mpegts")
    note = arriving.ArrivingPackets._note

    def coarse(self, packet):
        if packet.dts is not None and packet.pts is not None:
            packet.dts = min(packet.pts, packet.dts + 1800)  # half a frame: no frame is shown then
        note(self, packet)

    monkeypatch.setattr(arriving.ArrivingPackets, "_note", coarse)
    chunks = list(LiveVideo(path, chunk_seconds=0.02, timeout=0))
    assert [time for chunk in chunks for time in chunk.timestamps if time >= chunk.start - 1e-6] == pytest.approx(
        [number / 25 for number in range(60)]
    )


@pytest.mark.parametrize("kind", ["mpegts", "matroska", "fragmented mp4"])
def test_a_growing_file_is_read_as_it_grows(tmp_path, kind):
    name, options = KINDS[kind]
    whole = write_clip(tmp_path / name, 110, b_frames=3, seed=1, **options)
    data = whole.read_bytes()
    growing = tmp_path / f"growing-{name}"
    growing.write_bytes(b"")
    live = LiveVideo(growing, chunk_seconds=1.0, num_frames=4, timeout=None)
    written, seen = [0], []

    def write() -> None:
        with open(growing, "ab") as file:
            for start in range(0, len(data), 4000):
                file.write(data[start : start + 4000])
                file.flush()
                written[0] = start
                time.sleep(0.002)
        while live._source._file._file.tell() < len(data):
            time.sleep(0.01)
        live.stop()

    writer = threading.Thread(target=write)
    writer.start()
    chunks = []
    for chunk in live:
        chunks.append(chunk)
        seen.append(written[0])
    writer.join()
    finished = chunks_of(whole, 1.0, num_frames=4)
    assert [c.timestamps for c in chunks] == [c.timestamps for c in finished]
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(chunks, finished, strict=True))
    assert seen[0] < len(data) - 50000  # the first chunk came before the last byte was there


def test_pipes_sockets_and_files_in_memory(clip, tmp_path):
    finished = chunks_of(clip, 1.0, num_frames=4)

    def check(source, timeout: float = 10.0) -> None:
        live = list(LiveVideo(source, chunk_seconds=1.0, num_frames=4, timeout=timeout))
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(live, finished, strict=True))

    program = f"import sys, shutil; shutil.copyfileobj(open({str(clip)!r}, 'rb'), sys.stdout.buffer)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        check(process.stdout)
    check(io.BytesIO(clip.read_bytes()))
    check(clip.as_uri(), timeout=0.2)  # a file, which may grow
    with open(clip, "rb") as file:
        check(file)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        writer = threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(clip.read_bytes()))
        writer.start()
        check(tmp_path / "fifo")
        writer.join()


def test_a_url(clip):
    finished = chunks_of(clip, 1.0, num_frames=4)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(clip.read_bytes())

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        live = list(LiveVideo(url, chunk_seconds=1.0, num_frames=4, timeout=5))
        thread.join()
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(live, finished, strict=True))


def test_no_frame_is_decoded_twice_and_few_that_nobody_asks_for(clip, monkeypatch):
    sent, came = [], []
    decoded = arriving.ArrivingPackets._decoded

    def counting(self):
        for frame in decoded(self):
            came.append(frame.pts)
            yield frame

    monkeypatch.setattr(arriving.ArrivingPackets, "_decoded", counting)
    note = arriving.ArrivingPackets._note
    monkeypatch.setattr(arriving.ArrivingPackets, "_note", lambda self, p: (sent.append(p.pts), note(self, p)))
    chunks = list(LiveVideo(clip, chunk_seconds=1.0, num_frames=4, timeout=0))
    assert len(came) == len(set(came)) and len(sent) == 110
    assert sum(len(chunk.frames) for chunk in chunks) <= len(came) < 90


def test_an_iterator_is_read_no_further_than_its_chunk_and_its_memory_may_be_used_again():
    read = []

    def frames():
        buffer = np.zeros_like(picture(0))
        for number in range(35):
            read.append(number)
            buffer[:] = picture(number)
            yield buffer

    live = iter(LiveVideo(frames(), chunk_seconds=1.0, frame_rate=10.0, num_frames=3))
    first = next(live)
    assert read[-1] == 10
    assert numbers_in(first.frames) == [0, 4, 9] and first.timestamps == (0.0, 0.4, 0.9)
    rest = list(live)
    assert [(c.start, c.end) for c in rest] == [(1.0, 2.0), (2.0, 3.0), (3.0, pytest.approx(3.5))]
    assert numbers_in(rest[-1].frames) == [30, 32, 34]


def test_frames_with_times_are_those_of_frames_in_memory():
    times = [12.0, 12.5, 13.1, 13.2, 14.0, 14.9, 15.5]
    pictures = [picture(number) for number in range(len(times))]
    live = list(LiveVideo(zip(times, map(Image.fromarray, pictures), strict=True), chunk_seconds=1.0, fps=4.0))
    assert [(c.start, c.source, c.sha256) for c in live] == [(t, "<frames>", None) for t in (12.0, 13.0, 14.0, 15.0)]
    with VideoReader(pictures, timestamps=times) as reader:
        for chunk in live:
            same = reader.sample(start=chunk.start, end=chunk.start + 1.0, fps=4.0)
            assert np.array_equal(chunk.frames, same.frames) and chunk.timestamps == same.timestamps


@pytest.mark.parametrize(
    "frames, options, message",
    [
        ([picture(0)], {}, "has no time"),
        ([(1.0, picture(0)), (1.0, picture(1))], {}, "later than"),
        ([(float("nan"), picture(0))], {}, "expected seconds"),
        ([picture(0), picture(1)[:32]], {"frame_rate": 1.0}, "expected one size"),
        ([picture(0).astype(np.int64)], {"frame_rate": 1.0}, "uint8"),
        ([], {}, "no frame came"),
    ],
)
def test_frames_that_make_no_sense(frames, options, message):
    with pytest.raises(VideoError, match=message):
        list(LiveVideo(iter(frames), chunk_seconds=1.0, **options))


@pytest.mark.parametrize(
    "video, options, error",
    [
        (b"bytes", {}, VideoError),
        (5, {}, VideoError),
        ({"path": "a"}, {}, VideoError),
        ([], {"chunk_seconds": 0.0}, VideoSpanError),
        ([], {"timeout": -1.0}, VideoSpanError),
        ([], {"frame_rate": 0.0}, VideoSpanError),
        ([], {"num_frames": 2, "fps": 1.0}, VideoSpanError),
        ("missing.ts", {}, UnreadableVideoError),
        (io.BytesIO(b""), {"frame_rate": 1.0}, VideoError),
    ],
)
def test_what_cannot_be_is_refused_at_once(video, options, error):
    with pytest.raises(error):
        LiveVideo(video, **{"chunk_seconds": 1.0, **options})


def test_a_source_that_fails_gives_what_came_first(clip):
    class Failing(io.BytesIO):
        def read1(self, size=-1):
            if self.tell() > len(clip.read_bytes()) * 0.7:
                raise OSError("the cable was pulled")
            return super().read1(min(size, 1000))

    def frames():
        for number in range(15):
            yield number / 10, picture(number)
        raise RuntimeError("the camera is gone")

    for source, error in ((Failing(clip.read_bytes()), OSError), (frames(), RuntimeError)):
        chunks = []
        with pytest.raises(error, match="cable|camera"):
            for chunk in LiveVideo(source, chunk_seconds=1.0):
                chunks.append(chunk)
        assert len(chunks) > 1 and chunks[-1].end < chunks[-1].start + 1.0
        assert sum(len(chunk.frames) for chunk in chunks) >= 15


def test_damage_in_the_middle_is_counted_and_gone_past(tmp_path):
    path = write_clip(tmp_path / "noise.ts", 110, b_frames=3, container_format="mpegts", seed=1)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 188 * 188
    for packet in range(middle, middle + 40 * 188, 188):
        data[packet + 100 : packet + 110] = bytes(10)
    path.write_bytes(data)
    live = list(LiveVideo(path, chunk_seconds=1.0, timeout=0))
    assert [chunk.start for chunk in live] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sum(chunk.num_decode_errors for chunk in live) > 0
    sound = write_clip(tmp_path / "sound.ts", 110, b_frames=3, container_format="mpegts", seed=1)
    expected = chunks_of(sound, 1.0)
    for chunk, other in ((live[0], expected[0]), (live[-1], expected[-1])):
        assert np.array_equal(chunk.frames, other.frames) and chunk.timestamps == other.timestamps


def test_joined_in_the_middle_of_a_group(clip):
    data = clip.read_bytes()
    live = list(LiveVideo(io.BytesIO(data[len(data) // 5 // 188 * 188 :]), chunk_seconds=1.0, num_frames=4))
    assert live[0].start == 0.0 and len(live) >= 3
    assert len(numbers_in(live[-1].frames)) > 1


def test_an_end_that_never_comes(clip):
    read, write = os.pipe()
    with os.fdopen(read, "rb") as pipe, os.fdopen(write, "wb") as writer:
        writer.write(clip.read_bytes())
        writer.flush()  # and never closed, while this test runs
        chunks = list(LiveVideo(pipe, chunk_seconds=1.0, num_frames=4, timeout=0.3))
        assert [chunk.start for chunk in chunks] == [0.0, 1.0, 2.0, 3.0, 4.0]
        writer.close()
    with pytest.raises(UnreadableVideoError, match="as it comes"):
        list(LiveVideo(io.BytesIO(b""), chunk_seconds=1.0, timeout=0.1))


def test_times_that_begin_anew(clip):
    chunks = []
    with pytest.raises(UnreadableVideoError, match="begun anew"):
        for chunk in LiveVideo(io.BytesIO(clip.read_bytes() + clip.read_bytes()), chunk_seconds=1.0, num_frames=4):
            chunks.append(chunk)
    assert len(chunks) == 5


def test_an_ordinary_mp4_is_told_from_one_that_can_be_read_as_it_comes(tmp_path):
    path = write_clip(tmp_path / "plain.mp4", 50, seed=1)
    with pytest.raises(UnreadableVideoError, match="index at the end"):
        list(LiveVideo(path, chunk_seconds=1.0, timeout=0))


def test_sound_alone_is_refused(tmp_path):
    path = write_sound(tmp_path / "sound.mkv")
    with pytest.raises(UnreadableVideoError, match="no video stream"):
        list(LiveVideo(path, chunk_seconds=1.0, timeout=0))


def test_a_playlist_is_refused(tmp_path):
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nfile:///etc/passwd\n")
    with pytest.raises(UnreadableVideoError):
        list(LiveVideo(tmp_path / "list.m3u8", chunk_seconds=1.0, timeout=0))


def test_leaving_early_lets_go_of_the_file(clip):
    before = threading.active_count()
    live = iter(LiveVideo(clip, chunk_seconds=1.0, num_frames=2, timeout=None))
    next(live)
    live.close()
    pipe_read, pipe_write = os.pipe()
    with os.fdopen(pipe_read, "rb") as pipe, os.fdopen(pipe_write, "wb") as writer:
        writer.write(clip.read_bytes())
        writer.flush()
        waiting = iter(LiveVideo(pipe, chunk_seconds=1.0, num_frames=2, timeout=None))
        next(waiting)
        waiting.close()
        writer.close()
        deadline = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.02)
    assert threading.active_count() <= before
