"""Damaged and foreign files: what decodes, with a count, or one clear error."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from tests.video.clips import decode_all, number_in, numbers_in, shift, write_clip, write_sound

from video2lora.video import UnreadableVideoError, VideoError, VideoReader, load_video, probe_video
from video2lora.video.decoder import VideoDecoder


@pytest.fixture(scope="module")
def noisy(folder: Path) -> Path:
    """60 frames in 5 groups of pictures, the table of packets first, with enough bytes in every packet to damage."""
    return write_clip(
        folder / "noisy.mp4",
        60,
        gop_size=12,
        seed=0,
        container_options={"movflags": "faststart"},
        options={"crf": "30"},
    )


def packet_spans(path: Path) -> list[tuple[int, int, int]]:
    """(number of the frame, position in the file, size) of every packet, in the order of the file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        step = float(stream.time_base) * 25
        return [(round(p.pts * step), p.pos, p.size) for p in container.demux(stream) if p.size]


def damage(path: Path, numbers: set[int], to: Path) -> Path:
    """A copy in which the packets of these frames are zeros."""
    data = bytearray(path.read_bytes())
    for number, position, size in packet_spans(path):
        if number in numbers:
            data[position : position + size] = bytes(size)
    to.write_bytes(data)
    return to


def test_a_lost_frame_is_replaced_by_the_one_before_and_counted(noisy: Path, tmp_path: Path):
    lost = next(number for number, _, _ in packet_spans(noisy) if number > 30 and number % 12)
    path = damage(noisy, {lost}, tmp_path / "lost.mp4")
    got = load_video(path)
    times = np.array(got.timestamps) * 25
    assert round(times[0]) == 0 and round(times[-1]) == 59
    assert lost not in np.rint(times) and got.num_decode_errors >= 1
    alone = load_video(path, start=lost / 25, end=(lost + 1) / 25)
    assert round(alone.timestamps[0] * 25) == max(t for t in np.rint(times) if t < lost)
    # Two targets, one stand-in.
    both = load_video(path, start=(lost - 1) / 25, end=(lost + 1) / 25)
    assert len(both.frames) == 1


def test_a_lost_group_of_pictures(noisy: Path, tmp_path: Path):
    """Nothing of frames 24..35 decodes: 23 stands in, found by looking further back, and all else is as before."""
    path = damage(noisy, set(range(24, 36)), tmp_path / "group.mp4")
    sound = load_video(noisy)
    got = load_video(path)
    kept = np.rint(np.array(got.timestamps) * 25).astype(int)
    assert not set(kept) & set(range(24, 36)) and set(range(24)) | set(range(36, 60)) == set(kept)
    assert np.array_equal(got.frames, sound.frames[kept]) and got.num_decode_errors >= 1
    for number in (24, 30, 35):
        alone = load_video(path, start=number / 25, num_frames=1, end=(number + 1) / 25)
        assert np.rint(alone.timestamps[0] * 25) == 23
        assert np.array_equal(alone.frames[0], sound.frames[23])
    with VideoReader(path) as reader:
        parts = [reader.sample(start=t, end=t + 0.16, fps=25) for t in np.arange(0, 2.4, 0.16)]
    seen = sorted({int(round(t * 25)) for part in parts for t in part.timestamps})
    assert seen == kept.tolist()


def test_damage_gives_what_a_naive_decode_gives(noisy: Path, tmp_path: Path):
    path = tmp_path / "scratched.mp4"
    draw = np.random.default_rng(3)
    spans = [span for span in packet_spans(noisy) if span[0] % 12]
    for _ in range(5):
        data = bytearray(noisy.read_bytes())
        for i in draw.choice(len(spans), 8, replace=False):
            _, position, size = spans[i]
            at = position + int(draw.integers(size // 4, size // 2))
            data[at : at + 20] = draw.integers(0, 256, 20, dtype=np.uint8).tobytes()
        path.write_bytes(data)
        naive = decode_all(path)
        got = load_video(path)
        assert got.timestamps == pytest.approx([time for time, _ in naive])
        assert np.array_equal(got.frames, np.stack([pixels for _, pixels in naive]))
        assert got.num_decode_errors >= 1
        assert np.array_equal(load_video(path).frames, got.frames)  # the same again, whatever the threads did


@pytest.mark.parametrize("lost", [57, 58, 59])
def test_damage_at_the_end_is_the_same_on_any_number_of_threads(
    noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
):
    """Then it comes up only while the decoder is emptied, when PyAV 18 says nothing of it."""
    path = damage(noisy, {lost}, tmp_path / "end.mp4")
    expected = [time for time, _ in decode_all(path)]
    for threads in (0, 1, 2, 3, 8):
        monkeypatch.setattr(VideoDecoder, "_threads", threads)
        got = load_video(path)
        assert got.timestamps == pytest.approx(expected) and got.num_decode_errors == 1


def test_a_file_cut_short(noisy: Path, tmp_path: Path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(noisy.read_bytes()[: noisy.stat().st_size * 6 // 10])
    got = load_video(path)
    numbers = numbers_in(got.frames)
    assert 20 < len(numbers) < 45 and numbers[:20] == list(range(20))
    assert got.num_decode_errors >= 15  # the packets that are not there
    assert got.end == got.duration < 2.0
    assert numbers_in(load_video(path, num_frames=2).frames)[0] == 0


def cut_and_count(path: Path, share: float, to: Path) -> int:
    """Keep that share of the packets' bytes, the last packet torn; how many packets are then not whole."""
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
        first = min(ends)
    length = first + int((max(ends) - first) * share)
    to.write_bytes(path.read_bytes()[:length])
    return sum(end > length for end in ends)


def test_packets_cut_off_are_counted_exactly(noisy: Path, folder: Path, tmp_path: Path):
    """Those that an edit list drops are not among them, and counting disturbs nobody who shares the file object."""
    edited = folder / "edited-noisy.mp4"
    shift(noisy, 14, edited)
    for whole in (noisy, edited):
        path = tmp_path / "cut.mp4"
        lost = cut_and_count(whole, 0.6, path)
        for video in (path, path.read_bytes()):
            got = load_video(video)
            assert got.num_decode_errors == lost > 10
            assert np.array_equal(got.frames[:20], load_video(whole).frames[:20])


@pytest.mark.skipif(
    not hasattr(av.VideoStream, "index_entries"),
    reason="PyAV below 17.0 shows no list of packets, and a fragmented MP4 has no count of them in its header",
)
def test_packets_cut_off_a_fragmented_file_are_counted(folder: Path, tmp_path: Path):
    whole = write_clip(
        folder / "fragmented-noisy.mp4",
        60,
        gop_size=30,
        seed=0,
        container_options={"movflags": "frag_keyframe+empty_moov"},
    )
    lost = cut_and_count(whole, 0.6, tmp_path / "cut.mp4")
    assert load_video(tmp_path / "cut.mp4").num_decode_errors == lost > 10


def test_a_matroska_file_cut_short(folder: Path, tmp_path: Path):
    whole = write_clip(folder / "noisy.mkv", 60, gop_size=12, seed=0)
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    numbers = numbers_in(load_video(path).frames)
    assert 15 < len(numbers) < 45 and numbers == sorted(numbers)
    assert numbers[:-3] == list(range(len(numbers) - 3))  # the last may have come before those shown before it


def test_a_stream_that_begins_in_the_middle_of_a_group(folder: Path, tmp_path: Path):
    """As a recording does: frames before the first keyframe may or may not decode, those after it do."""
    whole = write_clip(folder / "noisy.ts", 60, gop_size=20, seed=0)
    path = tmp_path / "middle.ts"
    data = whole.read_bytes()
    at = len(data) // 6 // 188 * 188
    path.write_bytes(data[: 188 * 3] + data[at:])
    numbers = numbers_in(load_video(path).frames)
    assert set(range(20, 60)) <= set(numbers) and numbers == sorted(numbers)
    assert number_in(load_video(path, num_frames=2).frames[-1]) == 59


NOT_VIDEOS = {
    "empty.mp4": (b"", "empty"),
    "text.mp4": (b"this is a text, not a video\n" * 50, "FFmpeg cannot read it"),
    "text.txt": (b"this is a text, not a video\n" * 50, "text"),
    "page.html": (b"<html><body>404: not found</body></html>\n" * 20, "FFmpeg cannot read it"),
    "zeros.mp4": (bytes(5000), "FFmpeg cannot read it"),
    "subtitles.srt": (b"1\n00:00:00,000 --> 00:00:01,000\nhello\n\n", "no video stream in it .only subtitle"),
}


@pytest.mark.parametrize("name", NOT_VIDEOS)
@pytest.mark.parametrize("read", [load_video, probe_video])
def test_not_a_video(tmp_path: Path, name: str, read):
    data, message = NOT_VIDEOS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadableVideoError, match=f"^{name}: .*{message}"):
        read(tmp_path / name)
    if name != "text.txt":  # without its name even FFmpeg does not take it for a film of a terminal
        with pytest.raises(UnreadableVideoError, match=f"^<bytes>: .*{message}"):
            read(data)
        with pytest.raises(UnreadableVideoError, match=f"^<file>: .*{message}"):
            read(io.BytesIO(data))


def test_sound_only(tmp_path: Path):
    with pytest.raises(UnreadableVideoError, match="song.m4a: no video stream in it .only audio"):
        load_video(write_sound(tmp_path / "song.m4a"))
    with pytest.raises(UnreadableVideoError, match="song.mp4: no video stream in it .only audio"):
        load_video(write_sound(tmp_path / "song.mp4", cover=True))


def test_paths_that_lead_nowhere(tmp_path: Path):
    with pytest.raises(UnreadableVideoError, match="nothing.mp4: no such file"):
        load_video(tmp_path / "nothing.mp4")
    with pytest.raises(UnreadableVideoError, match="is a directory"):
        load_video(tmp_path)
    with pytest.raises(UnreadableVideoError, match="no such file"):
        load_video(f"file://{tmp_path}/nothing.mp4")


def test_a_file_without_its_table_of_packets(cfr: Path, tmp_path: Path):
    path = tmp_path / "unfinished.mp4"
    path.write_bytes(cfr.read_bytes()[:3000])
    with pytest.raises(UnreadableVideoError, match="unfinished.mp4: FFmpeg cannot read it.*complete"):
        load_video(path)


def test_no_frame_left(noisy: Path, tmp_path: Path):
    data = noisy.read_bytes()
    first = min(position for _, position, _ in packet_spans(noisy))
    (tmp_path / "headers.mp4").write_bytes(data[:first])
    (tmp_path / "scratched.mp4").write_bytes(data[:first] + bytes(len(data) - first))
    for name in ("headers.mp4", "scratched.mp4"):
        with pytest.raises(UnreadableVideoError, match=f"^{name}: ") as caught:
            load_video(tmp_path / name)
        assert isinstance(caught.value, VideoError) and isinstance(caught.value, ValueError)


def test_no_error_leaves_a_file_open(cfr: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    """The temporary copy and the container are closed after an error too."""
    import gc
    import os

    gc.collect()  # what earlier tests left open must not close in between
    recwarn.clear()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for video in (cfr.read_bytes()[:3000], io.BytesIO(b"no"), str(cfr), tmp_path):
        try:
            load_video(video, num_frames=2)
        except VideoError:
            pass
    gc.collect()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before and not recwarn.list
