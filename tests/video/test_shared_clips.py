"""Awkward clips from other projects (not part of the repository), against what is known of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.video.clips import decode_all

from video2lora.video import load_video, probe_video

NAMES = (
    "nasa_13013.mp4 av1_video.mkv h265_video.mp4 big_buck_bunny_432_433.webm video_90.mov unordered.mov "
    "test_video_66x50.mov animated_hopper.gif corrupted.mp4 h264_10bits.mp4 test_video.mp4 hopper_resized.gif "
    "gen_1frame.mp4 gen_mpeg4_bframes.avi"
).split()


@pytest.fixture(scope="module")
def table(shared_dir: Path) -> dict[str, dict[str, str]]:
    """The rows of SOURCES.md by file."""
    lines = (shared_dir / "videos" / "SOURCES.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_no_clip_is_left_out(table: dict[str, dict[str, str]]):
    assert set(table) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_clip(shared_dir: Path, table: dict[str, dict[str, str]], name: str):
    path, row = shared_dir / "videos" / name, table[name]
    info, got = probe_video(path), load_video(path)
    naive = decode_all(path)
    turned = [np.rot90(pixels, info.rotation // 90) for _, pixels in naive]
    assert np.array_equal(got.frames, np.stack(turned))
    assert got.timestamps == pytest.approx([time for time, _ in naive])
    assert (got.num_decode_errors > 0) == (name == "corrupted.mp4")

    assert info.rotation == int(row["rot"])
    width, height = (int(side) for side in row["coded WxH"].split("x"))
    if name == "nasa_13013.mp4":  # the table describes its first stream; the best one is larger and has its own rate
        assert (info.stream, info.size, info.num_frames) == (3, (480, 270), 390)
        return
    assert info.size == got.size == ((height, width) if info.rotation in (90, -90) else (width, height))
    assert info.num_frames == (50 if name == "corrupted.mp4" else int(row["header / decoded frames"].split()[2]))
    if row["fps (average_rate)"] != "None":
        assert info.fps == pytest.approx(float(row["fps (average_rate)"]), rel=1e-3)
        assert info.duration == pytest.approx(float(row["duration s"]), abs=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_twelve_shrunk_frames(shared_dir: Path, name: str):
    path = shared_dir / "videos" / name
    whole = load_video(path)
    got = load_video(path, num_frames=12, longest_edge=48)
    n = probe_video(path).num_frames
    expected = np.unique(np.linspace(0, n - 1, min(12, n)).astype(int))
    if name != "corrupted.mp4":
        assert got.timestamps == tuple(np.array(whole.timestamps)[expected].tolist())
    assert max(got.frames.shape[1:3]) == min(48, max(whole.size)) and got.size == whole.size
