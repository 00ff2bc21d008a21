"""The clips that several tests of the video room read; they never write to them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from tests.video.clips import VFR_MS, write_clip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the clips of this session lie."""
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="session")
def cfr(folder: Path) -> Path:
    """50 frames at 25 a second, H.264 with B-frames, a keyframe every 10 frames."""
    return write_clip(folder / "cfr.mp4")


@pytest.fixture(scope="session")
def long_clip(folder: Path) -> Path:
    """240 frames at 24 a second in 12 groups of pictures."""
    return write_clip(folder / "long.mp4", 240, time_base=Fraction(1, 24), gop_size=20)


@pytest.fixture(scope="session")
def vfr(folder: Path) -> Path:
    """12 frames at the milliseconds of VFR_MS."""
    return write_clip(folder / "vfr.mp4", len(VFR_MS), pts=VFR_MS, time_base=Fraction(1, 1000), gop_size=4)


@pytest.fixture(scope="session")
def webm(folder: Path) -> Path:
    """48 frames at 24 a second in WebM, which rounds times to milliseconds and counts nothing."""
    return write_clip(folder / "clip.webm", 48, codec="libvpx", time_base=Fraction(1, 24), gop_size=12, b_frames=0)
