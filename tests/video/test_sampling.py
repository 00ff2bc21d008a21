"""Which frames are taken, as pure functions of their times."""

from __future__ import annotations

import math

import numpy as np
import pytest

from video2lora.video import VideoSpanError
from video2lora.video.sampling import select_frames


def on_display(times: np.ndarray, targets: np.ndarray) -> list[int]:
    """The rule, one target at a time."""
    return sorted({max(i for i, t in enumerate(times) if t <= max(target, times[0]) + 1e-6) for target in targets})


@pytest.mark.parametrize("rate", [1, 23.976, 24, 25, 29.97, 30, 50, 59.94, 240])
@pytest.mark.parametrize("tick", [0.0, 1e-3, 1 / 12800, 1 / 90000])
def test_constant_rate_equals_linspace(rate: float, tick: float):
    for n in (1, 2, 3, 7, 12, 25, 31, 97, 241):
        times = np.arange(n) / rate
        times = np.round(times / tick) * tick if tick else times
        for num_frames in (2, 3, 8, 12, 16, 27, 45, 64, 128):
            indices, _, _ = select_frames(times, num_frames=num_frames, duration=n / rate, tick=tick)
            expected = np.unique(np.linspace(0, n - 1, num_frames).astype(int)) if num_frames < n else np.arange(n)
            assert indices.tolist() == expected.tolist(), (n, num_frames)


def test_more_targets_than_frames_gives_each_frame_once():
    for n in (1, 2, 5, 24):
        indices, _, _ = select_frames(np.arange(n) / 24, num_frames=10**12, duration=n / 24)
        assert indices.tolist() == list(range(n))


def test_one_frame_is_the_middle():
    for n in range(1, 9):
        assert select_frames(np.arange(n) / 25, num_frames=1, duration=n / 25)[0].tolist() == [(n - 1) // 2]
    assert select_frames(np.array([0.0, 1.0, 9.0, 9.5, 10.0]), num_frames=1, duration=10.5)[0].tolist() == [1]


def test_a_span_equals_linspace_over_its_frames():
    times = np.arange(100) / 25
    for first, stop in [(0, 100), (10, 20), (33, 34), (50, 100), (97, 100)]:
        for num_frames in (1, 2, 3, 5, 8):
            indices, start, end = select_frames(
                times, num_frames=num_frames, start=times[first], end=stop / 25, duration=4.0
            )
            n = stop - first
            middle = np.array([(n - 1) // 2])
            expected = first + (
                middle if num_frames == 1 else np.unique(np.linspace(0, n - 1, num_frames).astype(int))
            )
            assert (indices.tolist(), start, end) == (expected.tolist(), first / 25, stop / 25)


def test_random_variable_rates_follow_the_rule():
    draw = np.random.default_rng(0)
    for _ in range(300):
        n = int(draw.integers(2, 40))
        times = np.concatenate(
            [[0.0], np.cumsum(draw.choice([0.01, 0.033, 0.4, 2.0], n - 1) + draw.random(n - 1) / 99)]
        )
        duration = float(times[-1] + 0.04)
        start = float(draw.random() * duration * 0.9)
        end = float(start + (duration - start) * draw.random() + 1e-3)
        last = max(i for i, t in enumerate(times) if t < end)
        num_frames, fps = int(draw.integers(2, 20)), float(draw.choice([0.3, 1, 2, 7.5, 30]))

        got, got_start, got_end = select_frames(times, num_frames=num_frames, start=start, end=end, duration=duration)
        # The frame on display at `start` is of the span, also where it came up before.
        targets = np.linspace(start, max(float(times[last]), start), num_frames)
        assert got.tolist() == on_display(times, targets)
        assert (got_start, got_end) == (start, min(end, duration))

        got, _, got_end = select_frames(times, fps=fps, start=start, end=end, duration=duration)
        targets = start + np.arange(math.ceil((got_end - start) * fps - 1e-6)) / fps
        assert got.tolist() == on_display(times, targets)

        got, _, _ = select_frames(times, start=start, end=end, duration=duration)
        assert got.tolist() == list(range(on_display(times, np.array([start]))[0], last + 1))


@pytest.mark.parametrize("tick", [0.0, 1e-3])
def test_fps_of_the_file_takes_every_frame(tick: float):
    for rate in (24, 30, 60, 24000 / 1001):
        times = np.arange(100) / rate
        times = np.round(times / tick) * tick if tick else times
        assert len(select_frames(times, fps=rate, duration=100 / rate, tick=tick)[0]) == 100
        half = select_frames(times, fps=rate / 2, duration=100 / rate, tick=tick)[0]
        assert half.tolist() == list(range(0, 100, 2))
        assert len(select_frames(times, fps=1e9, duration=100 / rate, tick=tick)[0]) == 100


def test_every_reported_time_is_a_start_that_finds_its_frame():
    times = np.round(np.arange(48) / 24 * 1000) / 1000  # as WebM has them
    for i, time in enumerate(times):
        assert select_frames(times, start=float(time), duration=2.0, tick=1e-3)[0][0] == i
        assert select_frames(times, start=float(time), fps=24, duration=2.0, tick=1e-3)[0].tolist() == list(
            range(i, 48)
        )


def test_consecutive_spans_cover_every_frame_once():
    times = np.arange(250) / 25
    parts = [select_frames(times, start=k * 2.0, end=k * 2.0 + 2.0, duration=10.0)[0] for k in range(5)]
    assert np.concatenate(parts).tolist() == list(range(250))


def test_an_end_after_the_video_is_cut():
    assert select_frames(np.arange(10.0), end=99.0, duration=10.0)[2] == 10.0
    assert select_frames(np.array([0.0]), end=99.0)[2] == 0.0


@pytest.mark.parametrize(
    "request_",
    [
        {"num_frames": 0},
        {"num_frames": -3},
        {"num_frames": 2.5},
        {"fps": 0},
        {"fps": -1.0},
        {"fps": math.nan},
        {"fps": "2"},
        {"num_frames": 4, "fps": 1.0},
        {"start": -0.1},
        {"end": -1},
        {"start": math.inf},
        {"start": 3.0, "end": 3.0},
        {"start": 3.0, "end": 2.0},
        {"end": 0.0},
        {"start": 10.0},
        {"start": 1e6, "end": 2e6},
    ],
)
def test_impossible_requests_are_refused_by_name(request_: dict):
    with pytest.raises(VideoSpanError, match="clip.mp4: "):
        select_frames(np.arange(10.0), duration=10.0, source="clip.mp4", **request_)
