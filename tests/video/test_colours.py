"""Colours: by the matrix, range and chroma position that the file declares, whatever PyAV does by itself."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from video2lora.video import load_video

# Colours of the cells of a clip, and what H.273 calls the matrices: the share of red and blue in luma.
COLOURS = np.array(
    [
        [230, 30, 30],
        [30, 200, 40],
        [40, 40, 220],
        [220, 210, 50],
        [60, 200, 210],
        [200, 60, 190],
        [128, 128, 128],
        [25, 90, 60],
    ]
)
MATRICES = {
    1: (0.2126, 0.0722),
    2: (0.299, 0.114),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
CELL = 32
NEAR = 4  # grey levels: a step of 8-bit chroma is worth 2, swscale rounds down; a wrong matrix is off by 10 and more


def to_yuv(rgb: np.ndarray, matrix: int, full_range: bool, bits: int = 8) -> np.ndarray:
    """RGB 0..255 as the numbers of Y, Cb and Cr, by the definition (H.273)."""
    red, blue = MATRICES[matrix]
    r, g, b = np.moveaxis(rgb / 255, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    unit, top = 1 << (bits - 8), (1 << bits) - 1
    scaled = [y * top if full_range else (16 + 219 * y) * unit]
    scaled += [c * (top if full_range else 224 * unit) + 128 * unit for c in chroma]
    return np.rint(np.stack(scaled, axis=-1))


def write_yuv(path: Path, yuv: np.ndarray, codec: str, pix_fmt: str, matrix: int, full_range: bool) -> Path:
    """Three frames of these numbers [height, width, 3], kept without loss, with matrix and range declared."""
    height, width, _ = yuv.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1 + full_range
        stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        stream.options = {"libx264": {"qp": "0"}, "libvpx-vp9": {"lossless": "1"}}.get(codec, {})
        for _ in range(3):
            frame = av.VideoFrame(width, height, pix_fmt)
            frame.colorspace, frame.color_range = matrix, 1 + full_range
            for i, plane in enumerate(frame.planes):
                step = width // plane.width
                values = yuv[::step, ::step, i].astype("<u2" if "16" in pix_fmt else np.uint8)
                rows = np.zeros((plane.height, plane.line_size), np.uint8)
                rows[:, : values.itemsize * plane.width] = values.view(np.uint8).reshape(plane.height, -1)
                plane.update(rows.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cells(picture: np.ndarray) -> np.ndarray:
    """[8, 3]: the colour in the middle of every cell."""
    step = picture.shape[0] // 2
    middle = picture[step // 2 :: step, step // 2 :: step].astype(float)
    return middle.reshape(-1, 3)


@pytest.mark.parametrize("longest_edge", [None, 64])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(
    ("codec", "pix_fmt"), [("libx264", "yuv420p"), ("libx264", "yuv444p"), ("ffv1", "yuv444p16le")]
)
def test_colours_come_back(
    tmp_path: Path, codec: str, pix_fmt: str, matrix: int, full_range: bool, longest_edge: int | None
):
    rgb = COLOURS.reshape(2, 4, 3).repeat(CELL, 0).repeat(CELL, 1)
    yuv = to_yuv(rgb, matrix, full_range, 16 if "16" in pix_fmt else 8)
    path = write_yuv(tmp_path / "colours.mkv", yuv, codec, pix_fmt, matrix, full_range)
    got = load_video(path, longest_edge=longest_edge)
    for picture in got.frames:
        assert np.abs(cells(picture) - COLOURS).max() <= NEAR


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_chroma_lies_where_the_codec_has_it(tmp_path: Path, codec: str):
    """At half size, across an edge of colour alone: H.264's chroma lies left, so the left pixel is mixed more."""
    yuv = np.full((32, 128, 3), 128)
    yuv[:, 64:, 2] = 200
    path = write_yuv(tmp_path / "edge.mkv", yuv, codec, "yuv420p", 6, False)
    row = load_video(path, longest_edge=64).frames[0, 8, :, 0].astype(float)
    share = (row - row[8]) / (row[-8] - row[8])
    left, right = share[31], 1 - share[32]
    if codec == "libx264":
        assert left > right + 0.1
    else:
        assert left == pytest.approx(right, abs=0.03)


def test_reserved_values_are_no_error(tmp_path: Path):
    """VP9 files from some encoders declare transfer curve and primaries 0; PyAV 17 by itself refuses them."""
    path = tmp_path / "reserved.mp4"
    rgb = COLOURS.reshape(2, 4, 3).repeat(CELL, 0).repeat(CELL, 1)
    write_yuv(path, to_yuv(rgb, 1, False), "libvpx-vp9", "yuv420p", 1, False)
    data = bytearray(path.read_bytes())
    at = data.index(b"nclx") + 4
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    for longest_edge in (None, 64):
        assert np.abs(cells(load_video(path, longest_edge=longest_edge).frames[0]) - COLOURS).max() <= NEAR
