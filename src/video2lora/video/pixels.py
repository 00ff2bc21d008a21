"""From one decoded frame to one upright, shrunk RGB picture."""

from __future__ import annotations

from typing import Any

import av
import numpy as np

from .compat import RgbScaler

# swscale widens it when it shrinks, so nothing aliases. Of swscale's filters the closest to Pillow's LANCZOS on
# full-size RGB, which is what SmolVLM2's processor does (about one grey level on average; AREA is 1.5 times as far).
_SHRINK = "LANCZOS"


class FrameConverter:
    """Converts the frames of one video to RGB, shrunk to `longest_edge` pixels and turned upright.

    All frames get the size of the first, also where a stream changes its resolution. Colours go by what each frame
    declares (`RgbScaler`). Without shrinking the pixels are those of `frame.to_ndarray(format="rgb24")` in PyAV 17 and
    later.

    Args:
        longest_edge: pixels; None: no shrinking.
        codec: canonical name of the video codec, see `RgbScaler`; "frames" for frames in memory.
    """

    def __init__(self, longest_edge: int | None, codec: str):
        self.longest_edge = longest_edge
        self.size: tuple[int, int] | None = None
        """(width, height) of the first frame as displayed, before shrinking."""
        self._coded = (0, 0)
        self._rotation: int | None = 0 if codec == "frames" else None  # frames in memory are upright
        self._orientation = (False, False, False)
        self._scale = RgbScaler(codec)

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """One frame as uint8 [height, width, 3]."""
        # Once a rotation, since `frame.side_data` makes a cycle that keeps the frame until the garbage collector runs.
        if frame.rotation != self._rotation:
            self._rotation, self._orientation = frame.rotation, orientation(frame)
        transposed, flip_x, flip_y = self._orientation
        if self.size is None:
            self._coded = fit(frame.width, frame.height, self.longest_edge)
            self.size = (frame.height, frame.width) if transposed else (frame.width, frame.height)
        width, height = self._coded
        same_size = (width, height) == (frame.width, frame.height)
        picture = self._scale(frame, width, height, "BILINEAR" if same_size else _SHRINK).to_ndarray()
        if transposed:
            picture = picture.transpose(1, 0, 2)
        return np.ascontiguousarray(picture[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def fit(width: int, height: int, longest_edge: int | None) -> tuple[int, int]:
    """`(width, height)` shrunk to at most `longest_edge` pixels, keeping the ratio; each side at least 1 pixel."""
    longest = max(width, height)
    if longest_edge is None or longest <= longest_edge:
        return width, height
    return max(1, round(width * longest_edge / longest)), max(1, round(height * longest_edge / longest))


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How to show a frame upright: transpose first, then flip left-right, then flip up-down.

    From the display matrix (ISO 14496-12 6.2.2), which sends (x, y) to (a x + c y, b x + d y); of an odd angle the
    nearest quarter turn is taken.
    """
    # Of a tiny copy: the cycle that `side_data` makes would keep the decoder's threads until garbage is collected, and
    # in a forked process, where those threads are not, the collector would wait for them for ever.
    side_data: Any = frame.reformat(width=16, height=16, format="gray").side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(side_data), dtype=np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0
