"""Efficiency: what the paper (arXiv 2606.04351, figures 3b and 3c) reports, for the comparison."""

from __future__ import annotations

FRAMES = (8, 12, 24, 48, 128, 256, 512, 1024)
LONGEST_EDGES = (224, 336, 512, 1024)

_SPEED_UP = {
    "500M": [
        [6, 8, 6, 7], [4, 6, 5, 7], [4, 5, 4, 9], [5, 5, 5, 14],
        [5, 7, 6, 16], [5, 6, 5, 17], [5, 8, 6, 17], [7, 5, 6, 16],
    ],
    "2.2B": [
        [10, 10, 13, 12], [9, 6, 14, 23], [9, 8, 25, 40], [10, 9, 38, 62],
        [17, 15, 43, 79], [11, 14, 44, 79], [12, 14, 38, 72], [13, 13, 46, 76],
    ],
}  # fmt: skip
_TOKENS = {
    "500M": [
        [33, 33, 33, 138], [48, 48, 48, 204], [86, 86, 86, 369], [141, 141, 141, 610],
        [165, 165, 164, 713], [163, 165, 165, 706], [165, 165, 165, 709], [164, 165, 165, 709],
    ],
    "2.2B": [
        [40, 40, 172, 274], [58, 58, 254, 407], [104, 104, 460, 748], [171, 171, 761, 1272],
        [200, 200, 893, 1507], [200, 200, 893, 1507], [200, 200, 893, 1507], [200, 200, 893, 1507],
    ],
}  # fmt: skip

SAMPLER_FPS = 1
"""SmolVLM2's own sampler takes a frame a second, whatever more is asked for."""


def size_of(model: str) -> str | None:
    """The size in the paper that a model is of, by its name; None if none."""
    return next((size for size in _SPEED_UP if size in model), None)


def speed_up(size: str, frames: int, longest_edge: int) -> int | None:
    """How many times sooner the first token comes with an adapter (figure 3b); None where nothing is reported."""
    return _look_up(_SPEED_UP[size], frames, longest_edge)


def token_reduction(size: str, frames: int, longest_edge: int) -> int | None:
    """How many times fewer tokens a question is with an adapter (figure 3c); None where nothing is reported."""
    return _look_up(_TOKENS[size], frames, longest_edge)


def most_frames(duration: float) -> int:
    """Frames that the base's own sampler takes of a video of `duration` seconds, however many are asked for.

    So the paper's numbers saturate (near 43 frames on average): its rows from 128 frames up are the same measurement.
    """
    return max(1, round(SAMPLER_FPS * duration))


def _look_up(table: list[list[int]], frames: int, longest_edge: int) -> int | None:
    if frames not in FRAMES or longest_edge not in LONGEST_EDGES:
        return None
    return table[FRAMES.index(frames)][LONGEST_EDGES.index(longest_edge)]
