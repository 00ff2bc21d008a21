"""Chunks of a file and of a stream: a picture that stands still is read once, and its time is its segment's."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from video2lora import VideoError
from video2lora.pipelines.chunks import cut
from video2lora.video import LiveVideo, VideoReader
from video2lora.video.sampling import SNAP

from ..video.clips import picture, write_clip


def still_clip(path: Path, times: list[float], end: float) -> Path:
    """Pictures that come up at these seconds, the last one on display until `end`, in a file that can be streamed."""
    pts = [round(1000 * time) for time in times]
    plain = write_clip(path.with_suffix(".plain.mp4"), len(pts), pts=pts, time_base=Fraction(1, 1000), b_frames=0)
    options = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(str(plain)) as source, av.open(str(path), "w", container_options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        for packet, until in zip(packets, [*times[1:], end], strict=True):
            packet.duration = round(until / packet.time_base) - packet.pts
            packet.stream = stream
            target.mux(packet)
    return path


def spans(adapter: Any) -> list[tuple[float, float, tuple[float, ...]]]:
    return [(segment.start, segment.end, segment.timestamps) for segment in adapter.segments]


def test_a_slide_show_has_a_segment_where_a_slide_comes_up(pipe: Any, tmp_path: Path) -> None:
    """Ten seconds of slides, each on display for two and a half."""
    clip = str(still_clip(tmp_path / "slides.mp4", [0, 2.5, 5.0, 7.5], 10.0))
    adapter = pipe(clip, chunk_seconds=1.0)
    assert spans(adapter) == [
        (0.0, 2.0, (0.0,)),
        (2.0, 5.0, (0.0, 2.5)),
        (5.0, 7.0, (5.0,)),
        (7.0, 10.0, (5.0, 7.5)),
    ]
    assert adapter.rank == 5 * 4  # four segments and the static part
    for second in range(10):  # every time of the video is some segment's
        (found,) = adapter.select(second + 0.25, second + 0.75).segments
        assert found.start <= second + 0.25 and second + 0.75 <= found.end
    alone = pipe(clip, start=2.0, end=3.0)  # read as its own chunk: the prompt tells nothing of what was left out
    for module, weight in adapter.select(3.0, 4.0).weights.lora_A.items():
        assert np.allclose(weight, alone.weights.lora_A[module], atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"fps": 1.0}, {"num_frames": 1}, {"max_rank": 13}])
def test_a_stream_and_the_finished_file_leave_out_the_same(pipe: Any, tmp_path: Path, options: Any) -> None:
    clip = still_clip(tmp_path / "slides.mp4", [0, 0.5, 0.75, 3.75, 4.0, 7.25], 9.0)
    (*_, grown) = pipe.stream(clip, chunk_seconds=1.0, timeout=0, **options)
    finished = pipe(str(clip), chunk_seconds=1.0, **options)
    assert 3 < len(finished.segments) < 8
    assert [(s.start, s.timestamps) for s in grown.segments] == [(s.start, s.timestamps) for s in finished.segments]
    assert [s.end for s in grown.segments[:-1]] == [s.end for s in finished.segments[:-1]]
    # of a stream the last one ends with its chunk: nothing came that would tell how long its picture stood still
    assert grown.segments[-1].end == grown.segments[-1].start + 1.0 and finished.segments[-1].end == 9.0
    if "max_rank" not in options:
        assert grown.content_hash == finished.content_hash


@pytest.mark.parametrize("seed", range(30))
def test_what_was_shown_and_not_sampled_is_no_repetition(seed: int) -> None:
    """Left out is a chunk of no new frame whose picture was sampled before, and nothing else; in a stream, too."""
    rng = np.random.default_rng(seed)
    times = np.concatenate([[0.0], np.cumsum(rng.choice([0.04, 0.1, 0.7, 3.0], size=12))])
    pictures = [picture(number) for number in range(len(times))]
    sampling: dict[str, Any] = [{"num_frames": 1}, {"num_frames": 3}, {"fps": 1.5}, {"fps": 0.3}][seed % 4]
    with VideoReader(pictures, timestamps=times.tolist()) as reader:
        count = int(rng.integers(1, 40))
        length = reader.duration / count
        expected, read = [], -1.0
        for number in range(count):
            start, end = number * length, (number + 1) * length
            comes_up = ((times >= start - SNAP) & (times < end - SNAP)).any()
            sample = reader.sample(start=start, end=end, **sampling)
            if comes_up or sample.timestamps[-1] > read:
                expected.append((round(start, 6), sample.timestamps))
                read = sample.timestamps[-1]
        chunks = cut(reader, length, sampling)
        found = [reader.sample(**chunk.sampling) for chunk in chunks]
        assert [(round(frames.start, 6), frames.timestamps) for frames in found] == expected
        untils = [chunk.until for chunk in chunks]
        starts = [chunk.sampling["start"] for chunk in chunks]
        assert untils == [*starts[1:], reader.duration]
    live = list(LiveVideo(zip(times, pictures, strict=True), chunk_seconds=length, **sampling))
    # when the last picture goes, a stream of pictures can only guess
    expected = [chunk for chunk in expected if chunk[0] <= times[-1]]
    assert [(round(c.start, 6), c.timestamps) for c in live if c.start <= times[-1]] == expected


def test_chunks_shorter_than_a_frame_are_told_of_and_no_more_than_frames(
    pipe: Any, clips: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = str(clips / "d.mp4")  # 8 frames a second
    with caplog.at_level(logging.WARNING):
        adapter = pipe(clip, end=1.0, chunk_seconds=0.02)
        (record,) = caplog.records
        assert record.getMessage().startswith("d.mp4: only 8 of the 50 chunks of 0.02 s show a new picture")
        assert len(adapter.segments) == 8 and adapter.segments[-1].end == 1.0
        assert len(pipe(clip, end=1.0, chunk_seconds=1e-30).segments) == 8
        caplog.clear()
        pipe(clip, chunk_seconds=0.25)
        assert not caplog.records


def test_a_rank_is_shared_by_the_chunks_that_are_left(pipe: Any, tmp_path: Path) -> None:
    clip = str(still_clip(tmp_path / "slides.mp4", [0, 5.0], 8.0))
    adapter = pipe(clip, chunk_seconds=1.0, end=8.0, max_rank=6)  # of eight chunks two: one rank each at least
    assert adapter.rank == 6 and [(s.start, s.end) for s in adapter.segments] == [(0.0, 5.0), (5.0, 8.0)]
    with pytest.raises(VideoError, match="2 chunks, but max_rank=5 has room for 1"):
        pipe(clip, chunk_seconds=1.0, end=8.0, max_rank=5)
