"""Frames that are in memory already."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from tests.video.clips import numbers_in, picture

from video2lora.video import UnreadableVideoError, VideoError, VideoSpanError, load_video, probe_video

FRAMES = np.stack([picture(i) for i in range(10)])


@pytest.mark.parametrize(
    "video",
    [
        FRAMES,
        list(FRAMES),
        tuple(FRAMES),
        [Image.fromarray(frame) for frame in FRAMES],
        [Image.fromarray(frame).convert("RGBA") for frame in FRAMES],
        FRAMES.transpose(0, 3, 1, 2),
        torch.from_numpy(FRAMES),
        torch.from_numpy(FRAMES).permute(0, 3, 1, 2),
        list(torch.from_numpy(FRAMES).permute(0, 3, 1, 2)),
        FRAMES.astype(np.float32) / 255,
        FRAMES.astype(np.float64) / 255,
        torch.from_numpy(FRAMES).float().div(255).permute(0, 3, 1, 2).requires_grad_(),
    ],
    ids=lambda video: f"{type(video).__name__}-{getattr(video, 'dtype', type(video[0]).__name__)}",
)
def test_every_form_gives_the_same_frames(video):
    got = load_video(video)
    assert np.array_equal(got.frames, FRAMES)
    assert got.timestamps == tuple(range(10))
    assert (got.start, got.end, got.duration, got.size) == (0.0, 10.0, 10.0, (128, 64))
    assert (got.source, got.num_decode_errors) == ("<frames>", 0)
    assert got.sha256 == hashlib.sha256(FRAMES.tobytes()).hexdigest()


def test_sampling_goes_by_the_given_timestamps():
    times = [12.0, 12.5, 13.0, 20.0, 20.5, 21.0, 21.5, 22.0, 22.5, 23.0]
    got = load_video(FRAMES, timestamps=times, num_frames=3)
    assert got.timestamps == (12.0, 13.0, 23.0) and numbers_in(got.frames) == [0, 2, 9]
    assert (got.start, got.end) == (12.0, 23.5)
    got = load_video(FRAMES, timestamps=times, start=13.0, end=20.5)
    assert got.timestamps == (13.0, 20.0) and numbers_in(got.frames) == [2, 3]
    with pytest.raises(VideoSpanError, match="outside"):
        load_video(FRAMES, timestamps=times, end=5.0)


def test_one_frame_of_unknown_duration():
    got = load_video(FRAMES[:1], timestamps=[4.0], num_frames=8)
    assert (got.timestamps, got.start, got.end, got.duration) == ((4.0,), 4.0, 4.0, None)


def test_shrinking_keeps_the_ratio_and_never_enlarges():
    assert load_video(FRAMES, longest_edge=64).frames.shape == (10, 32, 64, 3)
    assert load_video(FRAMES, longest_edge=500).frames.shape == (10, 64, 128, 3)
    assert load_video(np.zeros((2, 1, 300, 3), np.uint8), longest_edge=7).frames.shape == (2, 1, 7, 3)
    assert load_video(np.full((1, 1, 1, 3), 9, np.uint8)).frames.tolist() == [[[[9, 9, 9]]]]
    got = load_video(FRAMES, longest_edge=64)
    assert numbers_in(got.frames) == list(range(10)) and got.size == (128, 64)


def test_probe():
    info = probe_video(FRAMES)
    assert (info.num_frames, info.fps, info.size, info.codec) == (10, 1.0, (128, 64), "frames")


def test_the_callers_frames_are_left_alone():
    before = FRAMES.copy()
    got = load_video(FRAMES, num_frames=2)
    got.frames[:] = 0
    assert np.array_equal(FRAMES, before)


@pytest.mark.parametrize(
    "video",
    [
        FRAMES[0],
        FRAMES[..., :2],
        FRAMES.astype(np.int64),
        FRAMES.astype(np.float32),
        FRAMES.astype(np.float32) / 127.5 - 1,
        np.full((2, 4, 4, 3), np.nan, np.float32),
        np.zeros((2, 0, 4, 3), np.uint8),
        [FRAMES[0], FRAMES[1][:32]],
        [FRAMES, FRAMES],
        [b"bytes"],
        [None],
        5,
        None,
        object(),
        {"frames": 3},
    ],
    ids=lambda video: type(video).__name__,
)
def test_what_is_no_video_is_refused(video):
    with pytest.raises(VideoError, match="expected|size|give one of them|one at a time"):
        load_video(video)


def test_a_list_of_files_is_no_video():
    with pytest.raises(VideoError, match="one at a time"):
        load_video(["a.mp4", "b.mp4"])


@pytest.mark.parametrize(
    "video", [[], (), FRAMES[:0], torch.zeros(0, 3, 4, 4)], ids=["list", "tuple", "array", "tensor"]
)
def test_no_frames(video):
    with pytest.raises(UnreadableVideoError, match="no frames"):
        load_video(video)


@pytest.mark.parametrize(
    "times", [[0.0], range(9, -1, -1), [0] * 10, [-1.0, *range(9)], [*range(9), np.nan], ["a"] * 10], ids=str
)
def test_timestamps_that_make_no_sense(times):
    with pytest.raises(VideoError, match="timestamps"):
        load_video(FRAMES, timestamps=list(times))
