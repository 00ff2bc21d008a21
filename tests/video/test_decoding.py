"""The right frames of sound files of every kind, proven by the number each frame carries."""

from __future__ import annotations

import gc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from tests.video.clips import HEIGHT, VFR_MS, WIDTH, decode_all, number_in, numbers_in, picture, shift, write_clip

from video2lora.video import VideoReader, decoder, load_video, probe_video


def test_all_frames_of_a_constant_rate_clip(cfr: Path):
    got = load_video(cfr)
    assert numbers_in(got.frames) == list(range(50))
    assert got.timestamps == pytest.approx(np.arange(50) / 25)
    assert (got.start, got.end, got.duration) == (0.0, 2.0, 2.0)
    assert (got.source, got.size, got.num_decode_errors) == ("cfr.mp4", (WIDTH, HEIGHT), 0)
    assert got.frames.dtype == np.uint8 and got.frames.shape == (50, HEIGHT, WIDTH, 3)


def test_pixels_are_those_of_a_naive_decode(cfr: Path):
    naive = decode_all(cfr)
    got = load_video(cfr)
    assert got.timestamps == tuple(time for time, _ in naive)
    assert np.array_equal(got.frames, np.stack([pixels for _, pixels in naive]))


def test_uniform_sampling_equals_the_loader_of_transformers(cfr: Path):
    from transformers.video_utils import read_video_pyav

    for num_frames in (2, 3, 8, 12, 49, 50):
        expected, _ = read_video_pyav(
            str(cfr), lambda metadata, n=num_frames: np.linspace(0, metadata.total_num_frames - 1, n, dtype=int)
        )
        assert np.array_equal(load_video(cfr, num_frames=num_frames).frames, expected)


def test_spans_and_rates(cfr: Path):
    assert numbers_in(load_video(cfr, start=0.4, end=0.8).frames) == list(range(10, 20))
    assert numbers_in(load_video(cfr, start=0.41, end=0.81).frames) == list(range(10, 21))
    assert numbers_in(load_video(cfr, fps=5).frames) == list(range(0, 50, 5))
    assert numbers_in(load_video(cfr, fps=5, start=1.0).frames) == list(range(25, 50, 5))
    assert numbers_in(load_video(cfr, num_frames=1).frames) == [24]
    got = load_video(cfr, num_frames=3, start=0.4, end=99)
    assert numbers_in(got.frames) == [10, 29, 49] and got.end == 2.0


def test_variable_rate_goes_by_what_is_on_display(vfr: Path):
    got = load_video(vfr)
    assert got.timestamps == pytest.approx(np.array(VFR_MS) / 1000)
    assert got.duration == pytest.approx(3.073)  # as its packet has it; FFmpeg 7 gives that packet no duration
    got = load_video(vfr, num_frames=5)  # targets 0, 0.76, 1.52, 2.28, 3.04
    assert numbers_in(got.frames) == [0, 5, 9, 11]
    assert got.timestamps == pytest.approx((0, 0.52, 1.8, 3.04))
    assert numbers_in(load_video(vfr, fps=2).frames) == [0, 3, 5, 9, 10]
    assert numbers_in(load_video(vfr, start=1.0, end=1.75).frames) == [5, 6, 7]


def test_webm_counts_nothing_and_rounds_times(webm: Path):
    info = probe_video(webm)
    assert info.num_frames == 48 and info.duration == pytest.approx(2.0, abs=0.05)
    assert numbers_in(load_video(webm, num_frames=48).frames) == list(range(48))
    assert numbers_in(load_video(webm, fps=24).frames) == list(range(48))
    assert numbers_in(load_video(webm, num_frames=12).frames) == np.linspace(0, 47, 12).astype(int).tolist()


CLIPS = {
    "one-frame.mp4": dict(num_frames=1),
    "all-key.mp4": dict(num_frames=30, gop_size=1),
    "one-group.mp4": dict(num_frames=60, gop_size=250, b_frames=3),
    "open-groups.mp4": dict(num_frames=60, gop_size=12, b_frames=3, options={"open-gop": "1", "bf": "3"}),
    "intra-refresh.mp4": dict(num_frames=60, gop_size=20, b_frames=0, options={"intra-refresh": "1"}),
    "ten-bit.mp4": dict(num_frames=20, pix_fmt="yuv420p10le"),
    "clip.mkv": dict(num_frames=40),
    "clip.ts": dict(num_frames=40),
    "open-groups.ts": dict(num_frames=60, gop_size=12, b_frames=3, options={"open-gop": "1", "bf": "3"}),
    "clip.flv": dict(num_frames=40),
    "mpeg4.avi": dict(num_frames=40, codec="mpeg4"),
    "h264.avi": dict(num_frames=40),
    "raw.h264": dict(num_frames=40),
    "clip.gif": dict(num_frames=12, codec="gif", pix_fmt="rgb8", time_base=Fraction(1, 10), gop_size=12, b_frames=0),
    "mpeg2.mpg": dict(num_frames=40, codec="mpeg2video"),
    "fragmented.mp4": dict(num_frames=40, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "hevc.mp4": dict(num_frames=40, codec="libx265", options={"x265-params": "log-level=none:keyint=8"}),
    "av1.webm": dict(num_frames=20, codec="libsvtav1", b_frames=0),
}


@pytest.fixture(scope="session", params=CLIPS, ids=lambda name: name)
def any_clip(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, int]:
    """A clip of some format, and how many frames it has."""
    settings = CLIPS[request.param]
    return write_clip(folder / request.param, **settings), settings["num_frames"]


def test_every_format_gives_every_frame_once(any_clip: tuple[Path, int]):
    path, n = any_clip
    got = load_video(path)
    assert numbers_in(got.frames) == list(range(n))
    gap = 0.1 if path.suffix == ".gif" else 0.04
    assert got.timestamps == pytest.approx(np.arange(n) * gap, abs=1e-3)
    assert got.duration == pytest.approx(n * gap, abs=0.021)
    assert got.num_decode_errors == 0
    info = probe_video(path)
    assert (info.num_frames, info.size, info.rotation) == (n, (WIDTH, HEIGHT), 0)


def test_random_reads_equal_a_full_decode(any_clip: tuple[Path, int], monkeypatch: pytest.MonkeyPatch):
    """Whatever was read before, and however eagerly it seeks, a reader gives the frames of a full decode."""
    path, n = any_clip
    full = load_video(path).frames
    draw = np.random.default_rng(0)
    for min_skip in (1, decoder._MIN_SKIP, 10**9):
        monkeypatch.setattr(decoder, "_MIN_SKIP", min_skip)
        with VideoReader(path) as reader:
            for _ in range(12):
                first, stop = sorted(draw.integers(0, n + 1, 2).tolist())
                if first == stop:
                    continue
                start, end = float(reader.times[first]), float(reader.duration if stop == n else reader.times[stop])
                num_frames = int(draw.integers(2, 9))
                got = reader.sample(start=start, end=end, num_frames=num_frames)
                count = stop - first
                expected = first + np.unique(np.linspace(0, count - 1, min(num_frames, count)).astype(int))
                assert numbers_in(got.frames) == expected.tolist()
                assert np.array_equal(got.frames, full[expected])
                assert got.timestamps == tuple(reader.times[expected])
                assert got.num_decode_errors == 0


def test_seeking_and_reading_on_agree(long_clip: Path, monkeypatch: pytest.MonkeyPatch):
    draw = np.random.default_rng(1)
    for _ in range(10):
        chosen = np.sort(draw.choice(240, int(draw.integers(1, 30)), replace=False))
        results = []
        for min_skip in (1, 10**9):
            monkeypatch.setattr(decoder, "_MIN_SKIP", min_skip)
            with VideoReader(long_clip) as reader:
                results.append(reader._frames.read(chosen, reader._convert)[0])
        assert numbers_in(results[0]) == chosen.tolist()
        assert np.array_equal(*results)


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[decoder._Run]:
    """Every run of decoding begun from now on."""
    runs: list[decoder._Run] = []
    begin = decoder._Run.__init__

    def noted(self: decoder._Run, *args: object) -> None:
        begin(self, *args)
        runs.append(self)

    monkeypatch.setattr(decoder._Run, "__init__", noted)
    return runs


def test_consecutive_spans_cost_one_pass(long_clip: Path, monkeypatch: pytest.MonkeyPatch):
    runs = count_runs(monkeypatch)
    with VideoReader(long_clip) as reader:
        parts = [reader.sample(start=k * 0.5, end=k * 0.5 + 0.5) for k in range(20)]
    assert [number for part in parts for number in numbers_in(part.frames)] == list(range(240))
    assert len(runs) == 1


def test_sparse_targets_seek(long_clip: Path, monkeypatch: pytest.MonkeyPatch):
    runs = count_runs(monkeypatch)
    decoded = []
    original = decoder._Run._decoded

    def counted(self, packets, earliest):
        return original(self, (decoded.append(packet) or packet for packet in packets), earliest)

    monkeypatch.setattr(decoder._Run, "_decoded", counted)
    with VideoReader(long_clip) as reader:
        got = reader.sample(start=2.5, end=10, num_frames=2)
    assert numbers_in(got.frames) == [60, 239]
    assert [run.key for run in runs] == [3, 11]
    assert len(decoded) < 80


def test_frames_shrink_as_they_are_decoded(cfr: Path):
    whole, small = load_video(cfr), load_video(cfr, longest_edge=64)
    assert small.frames.shape == (50, 32, 64, 3) and small.size == whole.size == (WIDTH, HEIGHT)
    assert numbers_in(small.frames) == list(range(50))
    boxes = whole.frames.reshape(50, 32, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(small.frames - boxes).mean() < 6
    assert load_video(cfr, longest_edge=1, num_frames=2).frames.shape == (2, 1, 1, 3)
    assert load_video(cfr, longest_edge=4096, num_frames=2).frames.shape == (2, HEIGHT, WIDTH, 3)


def test_decoded_frames_are_let_go_at_once(long_clip: Path):
    """Without waiting for the garbage collector: one of 4K holds 12 MB."""
    gc.collect()
    gc.disable()
    try:
        with VideoReader(long_clip, longest_edge=64) as reader:
            reader.sample()
            alive = sum(type(item) is av.VideoFrame for item in gc.get_objects())
    finally:
        gc.enable()
    assert alive < 12  # those in the decoder's hands and at the reader's position, not the 240 behind it


@pytest.mark.parametrize("longest_edge", [None, 64])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_and_mirroring(folder: Path, rotation: int, mirrored: bool, longest_edge: int | None):
    plain = write_clip(folder / "upright.mp4", 3)
    turned = write_clip(folder / f"turned{rotation}{mirrored}.mp4", 3, rotation=rotation, mirrored=mirrored)
    expected = load_video(plain, longest_edge=longest_edge).frames
    # As FFmpeg writes the matrix: turned counterclockwise, and what is then seen is mirrored.
    expected = np.rot90(expected, rotation // 90, axes=(1, 2))
    expected = expected[:, :, ::-1] if mirrored else expected
    got = load_video(turned, longest_edge=longest_edge)
    assert np.array_equal(got.frames, expected) and got.frames.flags.c_contiguous
    size = (HEIGHT, WIDTH) if rotation in (90, -90) else (WIDTH, HEIGHT)
    info = probe_video(turned)
    assert got.size == info.size == size
    assert mirrored or info.rotation % 360 == rotation % 360


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (33, 17), (101, 64)])
def test_odd_sizes(folder: Path, size: tuple[int, int]):
    path = folder / f"odd{size}.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv444p"
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 60 * i, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    got = load_video(path)
    assert got.size == size and got.frames.shape == (4, size[1], size[0], 3)
    assert np.abs(got.frames.mean(axis=(1, 2, 3)) - 60 * np.arange(4)).max() < 6
    assert max(load_video(path, longest_edge=2).frames.shape[1:3]) == min(2, max(size))


def test_edit_list_hides_frames(folder: Path, cfr: Path):
    """Frames before time 0 are stored but not shown: in no count, in no result."""
    path = folder / "edited.mp4"
    shift(cfr, 14, path)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 50
    got = load_video(path)
    shown = [number_in(pixels) for _, pixels in decode_all(path)]
    assert 14 in shown and 0 not in shown
    assert numbers_in(got.frames) == shown and got.timestamps[0] == 0 and got.num_decode_errors == 0
    assert probe_video(path).num_frames == len(shown)
    assert numbers_in(load_video(path, num_frames=2).frames) == [shown[0], shown[-1]]


def test_hidden_vp8_frames_are_no_targets(folder: Path, webm: Path):
    """A frame marked as not shown (an alternate reference) has a packet and a time, but nobody sees it."""
    path = folder / "hidden.webm"
    with av.open(str(webm)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(packet for packet in source.demux(video=0) if packet.dts is not None):
            data = bytearray(bytes(packet))
            if i in (5, 30):
                data[0] &= ~0x10
            hidden = av.Packet(bytes(data))
            hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
            hidden.is_keyframe, hidden.stream = packet.is_keyframe, stream
            target.mux(hidden)
    got = load_video(path)
    assert numbers_in(got.frames) == [i for i in range(48) if i not in (5, 30)]
    assert got.num_decode_errors == 0


def test_the_best_of_several_streams(folder: Path):
    path = folder / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for size in ((32, 16), (WIDTH, HEIGHT)):
            stream = container.add_stream("libx264", rate=25)
            (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
            streams.append(stream)
        streams[0].disposition, streams[1].disposition = 0, av.stream.Disposition.default.value
        for i in range(10):
            for stream in streams:
                image = picture(i)[: stream.height, : stream.width]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    got, info = load_video(path), probe_video(path)
    assert got.size == info.size == (WIDTH, HEIGHT) and numbers_in(got.frames) == list(range(10))
    assert info.stream == 1 and info.streams == ("video h264", "video h264")


def test_a_stream_that_changes_its_size(folder: Path):
    path = folder / "changing.h264"
    parts = [folder / "small.h264", folder / "large.h264"]
    for part, size in zip(parts, [(WIDTH, HEIGHT), (2 * WIDTH, 2 * HEIGHT)], strict=True):
        with av.open(str(part), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
            for i in range(5):
                image = picture(i).repeat(size[0] // WIDTH, 0).repeat(size[0] // WIDTH, 1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode())
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    got = load_video(path)
    assert got.frames.shape == (10, HEIGHT, WIDTH, 3) and numbers_in(got.frames) == 2 * list(range(5))


def test_probe(cfr: Path, vfr: Path):
    info = probe_video(cfr)
    assert (info.source, info.duration, info.fps, info.codec) == ("cfr.mp4", 2.0, pytest.approx(25), "h264")
    assert (info.num_frames, info.size, info.stream, info.streams) == (50, (WIDTH, HEIGHT), 0, ("video h264",))
    assert probe_video(vfr).fps == pytest.approx((len(VFR_MS) - 1) / 3.04)


def test_nothing_of_a_decoder_waits_for_the_garbage_collector(cfr: Path):
    # In a forked process (a data loader's worker) the decoder's threads are gone, and collecting it would hang there.
    gc.collect()
    gc.disable()
    try:
        before = len(list(Path("/proc/self/task").iterdir()))
        load_video(cfr, num_frames=4)
        assert len(list(Path("/proc/self/task").iterdir())) == before
    finally:
        gc.enable()


# --- frames that nobody asks for and no other refers to -------------------------------------------------------------

LEFT_OUT = {
    "pyramid.mp4": dict(num_frames=120, gop_size=250, b_frames=8, options={"b-pyramid": "normal", "refs": "4"}),
    "no-reference.mp4": dict(num_frames=90, gop_size=30, b_frames=3, options={"b-pyramid": "none"}),
    "open-groups.mp4": dict(num_frames=90, gop_size=12, b_frames=3, options={"open-gop": "1", "bf": "3"}),
    "temporal.mkv": dict(num_frames=90, gop_size=40, b_frames=4, options={"direct": "temporal", "weightb": "1"}),
    "open-groups.ts": dict(num_frames=90, gop_size=12, b_frames=3, options={"open-gop": "1"}),
    "ten-bit.mp4": dict(num_frames=60, gop_size=30, b_frames=3, pix_fmt="yuv420p10le"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_leaving_frames_out_changes_none_of_the_others(name, tmp_path, monkeypatch):
    """Reads of every kind, one after the other, pixel for pixel; and fewer frames are decoded."""
    path = write_clip(tmp_path / name, **LEFT_OUT[name], seed=3)
    full = load_video(path).frames
    runs: list[decoder._Run] = []
    monkeypatch.setattr(decoder.VideoDecoder, "_run_from", _recording(decoder.VideoDecoder._run_from, runs))
    draw = np.random.default_rng(1)
    with VideoReader(path) as reader:
        for _ in range(25):
            count = int(draw.choice([1, 2, 5, 12, 30]))
            indices = np.sort(draw.choice(len(full), count, replace=False))
            frames, got, errors = reader._frames.read(indices, reader._convert)
            assert got.tolist() == indices.tolist() and errors == 0
            assert np.array_equal(frames, full[indices])
    assert any(run.left_out for run in runs)


def test_fewer_frames_are_decoded(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", 200, gop_size=250, b_frames=4, options={"b-pyramid": "none"})
    given: list[int] = []
    decoded = decoder._Run._decoded
    monkeypatch.setattr(decoder._Run, "_decoded", lambda *args: (given.append(1) or frame for frame in decoded(*args)))
    assert numbers_in(load_video(path, num_frames=3).frames) == [0, 99, 199]
    assert len(given) < 120
    given.clear()
    monkeypatch.setattr(decoder, "_SKIPS_NONREF", ())
    load_video(path, num_frames=3)
    assert len(given) == 200


@pytest.mark.parametrize("seed", range(8))
def test_of_a_damaged_file_the_same_frames_come(seed, tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", 60, gop_size=20, b_frames=3, seed=seed)
    data, draw = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for place in draw.integers(len(data) // 8, len(data) // 2, 3):
        data[place : place + 40] = draw.bytes(40)
    path.write_bytes(data)
    got = load_video(path, num_frames=6)
    monkeypatch.setattr(decoder, "_SKIPS_NONREF", ())
    expected = load_video(path, num_frames=6)
    assert got.timestamps == expected.timestamps
    assert np.array_equal(got.frames, expected.frames)


def _recording(method, runs):
    def run_from(self, key):
        runs.append(method(self, key))
        return runs[-1]

    return run_from
