"""Moving shapes: what a scene is, and scenes drawn from a seed. Plain Python, no pixels and no words.

A clip is 12 equal slots. Within one slot an object is visible or not; motion goes on smoothly. So 12 frames sampled
uniformly see every event, and a scene can be drawn with any number of frames: it is a function of t in [0, 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal, NamedTuple

import numpy as np

from ...video.sampling import select_frames

NUM_SLOTS = 12
MIN_LIFE = 4  # slots from appearing to disappearing
MAX_EVENTS, MAX_FLASHING, MAX_FLASHES = 4, 2, 3  # events (appear, disappear) and flashing objects a scene

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 35, 35),
    "orange": (255, 130, 0),
    "yellow": (250, 230, 20),
    "green": (30, 180, 50),
    "cyan": (50, 225, 235),
    "blue": (45, 85, 255),
    "purple": (170, 60, 220),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
MOTIONS = ("left", "right", "up", "down", "still", "growing", "shrinking", "circling")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = ((10, 10, 12), (34, 34, 36), (8, 14, 40), (8, 34, 18), (38, 10, 14), (30, 12, 40))
SPLITS = ("train", "validation", "test", "combinations")
# One pair of each of six colours; each shape is still seen in at least six colours in training.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("purple", "square"),
        ("cyan", "star"),
    }
)

# All lengths are shares of the frame's side. Shapes of one radius have the area of the circle of that radius.
RADII = {"small": 0.056, "large": 0.094}
GROWN, SHRUNK = 0.122, 0.050
MAX_EXTENT = 1.6  # of a shape, in radii: the star's points
REACH = 0.232  # from its quadrant's centre, which nothing of an object exceeds: 0.018 are left free all around
_TRAVEL, _ORBIT = (0.125, 0.15), (0.06, 0.075)

_COLOUR_NAMES = tuple(COLOURS)
_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_TRAINING_PAIRS = tuple(pair for pair in _PAIRS if pair not in HELD_OUT_PAIRS)
_HELD_OUT = tuple(pair for pair in _PAIRS if pair in HELD_OUT_PAIRS)

EventKind = Literal["appears", "disappears"]


@dataclass(frozen=True, slots=True)
class MovingObject:
    """One object of a scene.

    Attributes:
        colour, shape, motion: of `COLOURS`, `SHAPES`, `MOTIONS`.
        size: of `SIZES`; None for what grows or shrinks, which has no size of its own.
        quadrant: index into `POSITIONS`; nothing of the object ever leaves it.
        appears: slot in which it is first seen; 0 is the start and no event.
        disappears: slot in which it is no longer seen; 12 is the end and no event.
        flashes: slots in which it is hidden, between slots in which it is seen.
        x, y: centre of its path, shares of the frame's side.
        dx, dy: way made from `appears` to `disappears`.
        radius_start, radius_end: of the circle of the same area.
        orbit, phase, spin: circling only: radius of the way, turns at the start, turns made (1 or -1).
    """

    colour: str
    shape: str
    size: str | None
    motion: str
    quadrant: int
    appears: int
    disappears: int
    flashes: tuple[int, ...]
    x: float = 0.0
    y: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    radius_start: float = 0.0
    radius_end: float = 0.0
    orbit: float = 0.0
    phase: float = 0.0
    spin: float = 0.0

    @property
    def name(self) -> str:
        """Colour and shape: no other object of the scene has both."""
        return f"{self.colour} {self.shape}"

    @property
    def position(self) -> str:
        """The corner it is in."""
        return POSITIONS[self.quadrant]

    def visible_in(self, slot: int) -> bool:
        """Whether it is seen in a slot."""
        return self.appears <= slot < self.disappears and slot not in self.flashes


class Event(NamedTuple):
    """An object appears or disappears at slot `slot` (1..11), which is at t = slot / 12.

    Attributes:
        object: index into the scene's objects.
    """

    slot: int
    object: int
    kind: EventKind

    @property
    def time(self) -> float:
        """When, as a share of the clip's length."""
        return self.slot / NUM_SLOTS


@dataclass(frozen=True)
class Scene:
    """What is seen in one clip.

    Attributes:
        id: "moving-shapes-<split>-<seed>-<index>".
        objects: 1 to 4 in canonical order: by the slot in which they appear, then top left to bottom right.
        background: index into `BACKGROUNDS`.
        gradient: levels the background gains from left to right and from top to bottom.
    """

    id: str
    split: str
    seed: int
    index: int
    objects: tuple[MovingObject, ...]
    background: int
    gradient: tuple[float, float]

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """Appearing and disappearing in the order they happen; no two share a slot."""
        return _events(self.objects)

    @property
    def signature(self) -> bytes:
        """All that a caption says, as bytes: two scenes have the same caption exactly if they have the same."""
        return _signature(self.objects)


def make_scene(index: int, split: str = "train", *, seed: int = 0, max_objects: int = 4) -> Scene:
    """Draw a scene; it depends on the arguments alone.

    A hash of the signature says which of train, validation and test a description belongs to, so that no caption of
    one split can occur in another, whatever the seeds. Training, validation and test scenes hold no pair of
    `HELD_OUT_PAIRS`; every scene of "combinations" holds at least one.

    Args:
        index: 0 or more.
        split: of `SPLITS`.
        max_objects: 1 to 4; each number of objects up to it is as likely.

    Raises:
        ValueError: an argument is none of these.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}.")
    if index < 0 or not 1 <= max_objects <= 4:
        raise ValueError(
            f"index={index}, max_objects={max_objects}: expected an index of 0 or more and 1 to 4 objects."
        )
    rng = random_for("scene", split, seed, index, max_objects)
    while True:
        objects = _draw_objects(rng, split, max_objects)
        if split == "combinations" or split_of(_signature(objects)) == split:
            break
    random = rng.random
    placed = tuple(_place(item, random) for item in objects)
    background = int(random() * len(BACKGROUNDS))
    gradient = (16 * random() - 8, 16 * random() - 8)
    return Scene(f"moving-shapes-{split}-{seed}-{index:07d}", split, seed, index, placed, background, gradient)


def split_of(signature: bytes) -> str:
    """Which of train (6 of 8), validation and test (1 each) a description belongs to."""
    number = hashlib.blake2b(signature, digest_size=4).digest()[0] % 8
    return ("test", "validation")[number] if number < 2 else "train"


def random_for(*key: object) -> Random:
    """A generator that follows from the key alone. Use only its `random()`: the rest differs between Pythons."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return Random(int.from_bytes(digest, "big"))


def frame_times(num_frames: int) -> np.ndarray:
    """Times in [0, 1) at which the frames of a clip are drawn: the middle of each frame's display, float64 [T]."""
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: a clip has at least one frame.")
    return (np.arange(num_frames) + 0.5) / num_frames


def sample_times(num_frames: int, clip_frames: int = NUM_SLOTS) -> np.ndarray:
    """Times in [0, 1) that are seen when `num_frames` are sampled from a clip of `clip_frames`, float64 [T].

    The rule is that of `video2lora.load_video`. With `clip_frames` a multiple of 12, 12 sampled frames lie one in each
    slot; with fewer frames than asked, all of the clip's are taken.
    """
    indices, _, _ = select_frames(np.arange(clip_frames, dtype=np.float64), num_frames=num_frames)
    return frame_times(clip_frames)[indices]


def slots_at(times: Sequence[float] | np.ndarray) -> np.ndarray:
    """The slot that each time lies in, int64 [T]."""
    return np.floor(np.asarray(times, dtype=np.float64) * NUM_SLOTS).astype(np.int64)


def _events(objects: Sequence[MovingObject]) -> tuple[Event, ...]:
    events = [Event(o.appears, i, "appears") for i, o in enumerate(objects) if o.appears > 0]
    events += [Event(o.disappears, i, "disappears") for i, o in enumerate(objects) if o.disappears < NUM_SLOTS]
    return tuple(sorted(events))


def _signature(objects: Sequence[MovingObject]) -> bytes:
    said = []
    for item in objects:
        size = 2 if item.size is None else SIZES.index(item.size)
        said += [_COLOUR_NAMES.index(item.colour), SHAPES.index(item.shape), size, MOTIONS.index(item.motion)]
        said += [item.quadrant, len(item.flashes)]
    for event in _events(objects):
        said += [64 + event.object, 128 if event.kind == "appears" else 129]
    return bytes(said)


def _draw_objects(rng: Random, split: str, max_objects: int) -> tuple[MovingObject, ...]:
    """All that can be said of the objects, in canonical order; where exactly they are comes later."""
    random = rng.random
    count = 1 + int(random() * max_objects)
    if split == "combinations":
        pairs = [_HELD_OUT[int(random() * len(_HELD_OUT))]]
        choices = _PAIRS
    else:
        pairs, choices = [], _TRAINING_PAIRS
    while len(pairs) < count:
        pair = choices[int(random() * len(choices))]
        if pair not in pairs:
            pairs.append(pair)
    quadrants = [0, 1, 2, 3]
    objects = []
    for (colour, shape), (appears, disappears, flashes) in zip(pairs, _draw_lives(rng, count), strict=True):
        motion = MOTIONS[int(random() * 8)]
        size = None if motion in ("growing", "shrinking") else SIZES[int(random() * 2)]
        quadrant = quadrants.pop(int(random() * len(quadrants)))
        objects.append(MovingObject(colour, shape, size, motion, quadrant, appears, disappears, flashes))
    objects.sort(key=lambda item: (item.appears, item.quadrant))
    return tuple(objects)


def _draw_lives(rng: Random, count: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """(appears, disappears, flashes) of each object.

    What flashes is there at the first frame or at the last one. So nothing can stay unseen by flashing just when four
    frames are taken: every object is seen in at least one of any four uniform frames.
    """
    random = rng.random
    flashes = [1 + int(random() * MAX_FLASHES) if random() < 0.5 else 0 for _ in range(count)]
    while sum(1 for k in flashes if k) > MAX_FLASHING:
        flashes[int(random() * count)] = 0
    late = [random() < 0.55 for _ in range(count)]
    early = [random() < 0.5 for _ in range(count)]
    for i in range(count):
        if flashes[i] and late[i] and early[i]:
            (late if random() < 0.5 else early)[i] = False
    while sum(late) + sum(early) > MAX_EVENTS:
        (late if random() < 0.5 else early)[int(random() * count)] = False
    while True:
        lives: list[tuple[int, int, tuple[int, ...]]] = []
        taken: set[int] = set()
        for i in range(count):
            appears = 1 + int(random() * (NUM_SLOTS - MIN_LIFE)) if late[i] else 0
            disappears = MIN_LIFE + int(random() * (NUM_SLOTS - MIN_LIFE)) if early[i] else NUM_SLOTS
            if disappears - appears < max(MIN_LIFE, 2 * flashes[i] + 1):
                break
            slots = {appears, disappears} - {0, NUM_SLOTS}
            if slots & taken:
                break
            taken |= slots
            lives.append((appears, disappears, _draw_flashes(random, appears, disappears, flashes[i])))
        else:
            return lives


def _draw_flashes(random: Callable[[], float], appears: int, disappears: int, count: int) -> tuple[int, ...]:
    """`count` slots, not the first or last of a life and no two side by side, each such choice as likely."""
    if count == 0:
        return ()
    places = disappears - appears - 2 - (count - 1)
    chosen: set[int] = set()
    while len(chosen) < count:
        chosen.add(int(random() * places))
    return tuple(appears + 1 + place + k for k, place in enumerate(sorted(chosen)))


def _place(item: MovingObject, random: Callable[[], float]) -> MovingObject:
    """Draw where the object is and how it moves, so that all of it stays within its quadrant's free part."""
    dx = dy = orbit = phase = spin = 0.0
    start = end = RADII[item.size] * (0.96 + 0.08 * random()) if item.size else 0.0
    motion = item.motion
    if motion in ("left", "right"):
        way = _TRAVEL[0] + (_TRAVEL[1] - _TRAVEL[0]) * random()
        dx = way if motion == "right" else -way
    elif motion in ("up", "down"):
        way = _TRAVEL[0] + (_TRAVEL[1] - _TRAVEL[0]) * random()
        dy = way if motion == "down" else -way
    elif motion == "circling":
        orbit = _ORBIT[0] + (_ORBIT[1] - _ORBIT[0]) * random()
        phase, spin = random(), 1.0 if random() < 0.5 else -1.0
    elif motion != "still":
        shrunk, grown = SHRUNK * (0.96 + 0.08 * random()), GROWN * (0.96 + 0.08 * random())
        start, end = (shrunk, grown) if motion == "growing" else (grown, shrunk)
    room = REACH - MAX_EXTENT * max(start, end) - orbit
    room_x, room_y = room - abs(dx) / 2, room - abs(dy) / 2
    x = 0.25 + 0.5 * (item.quadrant % 2) + room_x * (2 * random() - 1)
    y = 0.25 + 0.5 * (item.quadrant // 2) + room_y * (2 * random() - 1)
    facts = (item.colour, item.shape, item.size, motion, item.quadrant, item.appears, item.disappears, item.flashes)
    return MovingObject(*facts, x, y, dx, dy, start, end, orbit, phase, spin)
