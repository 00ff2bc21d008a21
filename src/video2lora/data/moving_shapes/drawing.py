"""Moving shapes: scenes become pixels, many at once, on any device, with the same pixels on each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .scenes import BACKGROUNDS, COLOURS, NUM_SLOTS, SHAPES, Scene, frame_times, slots_at

MIN_SIZE = 32  # pixels; below, the half pixel of a soft edge could reach into the next quadrant
_CHUNK = {"cpu": 2**20, "cuda": 2**25}  # pixels x frames x scenes worked on at a time, in float32 and three channels


@dataclass(frozen=True)
class SceneBatch:
    """Scenes packed into arrays, one row an object; picklable.

    Attributes:
        num_scenes: n.
        scene, quadrant, shape: int64 [m], the object's scene, quadrant and index into `SHAPES`.
        colour: float32 [m, 3], levels 0..255.
        visible: bool [m, 12], whether it is seen in each slot.
        motion: float64 [m, 11]: appears, disappears (slots), x, y, dx, dy, radius_start, radius_end, orbit, phase,
            spin.
        background: float32 [n, 5]: red, green, blue, gain to the right, gain downwards.
    """

    num_scenes: int
    scene: np.ndarray
    quadrant: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    visible: np.ndarray
    motion: np.ndarray
    background: np.ndarray

    @classmethod
    def from_scenes(cls, scenes: Sequence[Scene]) -> SceneBatch:
        """Pack scenes."""
        objects = [(i, item) for i, scene in enumerate(scenes) for item in scene.objects]
        slots = range(NUM_SLOTS)
        motion = [
            (o.appears, o.disappears, o.x, o.y, o.dx, o.dy, o.radius_start, o.radius_end, o.orbit, o.phase, o.spin)
            for _, o in objects
        ]
        return cls(
            num_scenes=len(scenes),
            scene=np.array([i for i, _ in objects], dtype=np.int64),
            quadrant=np.array([o.quadrant for _, o in objects], dtype=np.int64),
            shape=np.array([_SHAPE_INDEX[o.shape] for _, o in objects], dtype=np.int64),
            colour=np.array([COLOURS[o.colour] for _, o in objects], dtype=np.float32).reshape(-1, 3),
            visible=np.array([[o.visible_in(s) for s in slots] for _, o in objects], dtype=bool).reshape(
                -1, NUM_SLOTS
            ),
            motion=np.array(motion, dtype=np.float64).reshape(-1, 11),
            background=np.array([(*BACKGROUNDS[s.background], *s.gradient) for s in scenes], dtype=np.float32),
        )

    def __getitem__(self, part: slice) -> SceneBatch:
        """The scenes of a slice (step 1)."""
        start, stop, _ = part.indices(self.num_scenes)
        kept = (self.scene >= start) & (self.scene < stop)
        return SceneBatch(
            max(stop - start, 0),
            self.scene[kept] - start,
            self.quadrant[kept],
            self.shape[kept],
            self.colour[kept],
            self.visible[kept],
            self.motion[kept],
            self.background[start:stop],
        )

    def paths(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centres x and y and radii at times in [0, 1): float64 [m, T] each, shares of the frame's side."""
        appears, disappears, x, y, dx, dy, start, end, orbit, phase, spin = self.motion.T[:, :, None]
        life = (NUM_SLOTS * times - appears) / (disappears - appears)
        angle = 2 * np.pi * (phase + spin * life)
        way = life - 0.5
        return x + dx * way + orbit * np.cos(angle), y + dy * way + orbit * np.sin(angle), start + (end - start) * life


def draw(
    scenes: SceneBatch | Sequence[Scene],
    times: Sequence[float] | np.ndarray | None = None,
    *,
    size: int = 64,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Draw scenes at the same times; edges are soft over one pixel at any size.

    Positions are computed in float64 on the CPU and pixels in float32 by elementwise operations alone: CPU and GPU
    agree within one level, and a scene's pixels do not depend on what it is drawn with. Memory beyond the result is
    bounded.

    Args:
        scenes: n scenes.
        times: [T] in [0, 1), as `frame_times` or `sample_times` give them; default: 12 frames.
        size: pixels a side, 32 or more.

    Returns:
        uint8 [n, T, size, size, 3] on `device`.

    Raises:
        ValueError: the size is too small, or a time is outside [0, 1).
    """
    batch = scenes if isinstance(scenes, SceneBatch) else SceneBatch.from_scenes(scenes)
    moments = frame_times(NUM_SLOTS) if times is None else np.asarray(times, dtype=np.float64)
    if size < MIN_SIZE:
        raise ValueError(f"size={size}: shapes can be told apart from {MIN_SIZE} pixels a side on; ask for more.")
    if not (moments.ndim == 1 and len(moments) and (moments >= 0).all() and (moments < 1).all()):
        raise ValueError(f"times of shape {moments.shape}: expected one or more numbers in [0, 1); see frame_times.")
    device = torch.device(device)
    frames = torch.empty((batch.num_scenes, len(moments), size, size, 3), dtype=torch.uint8, device=device)
    room = max(1, _CHUNK.get(device.type, _CHUNK["cpu"]) // size**2)  # scenes x frames a chunk
    frames_each = min(len(moments), room)
    scenes_each = max(1, room // frames_each)
    for first in range(0, batch.num_scenes, scenes_each):
        part = batch if scenes_each >= batch.num_scenes else batch[first : first + scenes_each]
        for start in range(0, len(moments), frames_each):
            span = slice(start, start + frames_each)
            _draw_chunk(frames[first : first + scenes_each, span], part, moments[span], size)
    return frames


def contact_sheet(
    scenes: Sequence[Scene], times: Sequence[float] | np.ndarray | None = None, *, size: int = 64
) -> np.ndarray:
    """Lay frames out to be looked at: a row a scene, a column a time, two white pixels between them.

    Returns:
        uint8 [n * (size + 2) + 2, T * (size + 2) + 2, 3].
    """
    frames = draw(scenes, times, size=size).numpy()
    framed = np.pad(frames, ((0, 0), (0, 0), (2, 0), (2, 0), (0, 0)), constant_values=255)
    rows = framed.transpose(0, 2, 1, 3, 4).reshape(len(frames) * (size + 2), -1, 3)
    return np.pad(rows, ((0, 2), (0, 2), (0, 0)), constant_values=255)


def _draw_chunk(out: Tensor, batch: SceneBatch, times: np.ndarray, size: int) -> None:
    """Fill `out` [n, t, size, size, 3]. An object needs its quadrant's pixels only."""
    device = out.device
    pixels = torch.arange(size, dtype=torch.float32, device=device) + 0.5
    ramp = pixels / size - 0.5
    ground = torch.from_numpy(batch.background).to(device)
    backdrop = ground[:, 3, None, None] * ramp + ground[:, 4, None, None] * ramp[:, None]  # [n, size, size]
    backdrop = ground[:, None, None, :3] + backdrop[..., None]
    out.copy_(backdrop.round().clamp(0, 255).to(torch.uint8)[:, None].expand(out.shape))

    half = (size + 1) // 2  # of an odd size, quadrants share a line that no object reaches
    # objects of a shape side by side, and all of them worked on at once: a GPU waits for launches, not for numbers
    order = np.argsort(batch.shape, kind="stable")
    ends = np.searchsorted(batch.shape[order], np.arange(len(SHAPES) + 1))
    paths = [(size * path[order]).astype(np.float32) for path in batch.paths(times)]
    numbers = torch.from_numpy(np.stack([*paths, batch.visible[order][:, slots_at(times)]])).to(device)
    x, y, radius, visible = numbers[..., None, None].unbind()  # [m, t, 1, 1]
    colour = torch.from_numpy(batch.colour[order]).to(device)[:, None, None, None]
    where = np.stack([batch.scene[order], *np.divmod(batch.quadrant[order], 2)])
    scene, lower, right = torch.from_numpy(where).to(device).unbind()
    halves = pixels.unfold(0, half, size - half)  # [2, half]
    across = halves[right][:, None, None] - x  # [m, t, 1, half]
    down = halves[lower][:, None, :, None] - y  # [m, t, half, 1]
    edges = [
        _DISTANCES[name](across[start:end], down[start:end], radius[start:end])
        for name, start, end in zip(SHAPES, ends, ends[1:], strict=False)
        if end > start
    ]
    if edges:
        cover = ((0.5 - torch.cat(edges)).clamp_(0, 1) * visible)[..., None]
        behind = _quadrants(backdrop[:, None], half)[scene, lower, right]
        mixed = behind + cover * (colour - behind)
        _quadrants(out, half)[scene, lower, right] = mixed.round_().clamp_(0, 255).to(torch.uint8)


def _quadrants(pixels: Tensor, half: int) -> Tensor:
    """A view of `pixels` [n, t, size, size, 3] as [n, 2, 2, t, half, half, 3]: lower or not, right or not."""
    step = pixels.shape[2] - half
    return pixels.unfold(2, half, step).unfold(3, half, step).permute(0, 2, 3, 1, 5, 6, 4)


# Signed distances in pixels (inside negative) from the line of the nearest edge; `radius` is that of the circle of
# the same area. y points down.


def _circle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - radius


def _square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - radius * (math.sqrt(math.pi) / 2)


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Equilateral, a point upwards, around its centroid."""
    inner = math.sqrt(math.pi / (3 * math.sqrt(3)))
    return torch.maximum(y, (math.sqrt(3) / 2) * x.abs() - 0.5 * y) - radius * inner


def _cross(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Upright; its arms are three tenths as wide as the whole."""
    long = radius * math.sqrt(math.pi / (4 * (2 * CROSS_ARM - CROSS_ARM**2)))
    wide = long * CROSS_ARM
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - long, y - wide), torch.maximum(x - wide, y - long))


def _star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Five points, one upwards; two reflections fold all ten edges onto one."""
    turn = math.pi / 5
    point = math.sqrt(math.pi / (5 * STAR_INNER * math.sin(turn)))  # of the tips, in radii
    x, y = x.abs(), -y
    for kx, ky in ((math.cos(turn), -math.sin(turn)), (-math.cos(turn), -math.sin(turn))):
        beyond = 2 * (kx * x + ky * y).clamp(min=0)
        x, y = x - kx * beyond, y - ky * beyond
    x = x.abs()
    # From the tip (0, point) to the inner corner, now to the right of it.
    along_x, along_y = STAR_INNER * math.sin(turn), STAR_INNER * math.cos(turn) - 1
    length = math.hypot(along_x, along_y)
    return (x * -along_y + (y - radius * point) * along_x) / length


CROSS_ARM, STAR_INNER = 0.3, 0.42
_SHAPE_INDEX = {name: i for i, name in enumerate(SHAPES)}
_DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}
