"""Moving shapes: whether the frames really sampled decide an answer.

Every life that an object may have (when it appears and disappears, where it flashes) is held against what the frames
show of it. An answer is decided if all lives that fit agree. Lives are taken one object at a time, so now and then a
question counts as undecided that the rules of whole scenes would decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .language import Query
from .scenes import MAX_FLASHES, MIN_LIFE, NUM_SLOTS, Event, MovingObject, Scene, sample_times, slots_at

Life = tuple[int, int, frozenset[int], frozenset[int]]  # appears, disappears, flashes seen, slots that may hide more


def answerable(
    scene: Scene,
    query: Query,
    num_frames: int = NUM_SLOTS,
    clip_frames: int = NUM_SLOTS,
    *,
    times: Sequence[float] | np.ndarray | None = None,
) -> bool:
    """Whether `num_frames` sampled from a clip of `clip_frames` decide the answer.

    With all 12 slots seen everything is decided. With four or more frames so are colour, shape, size, position, count
    and existence.

    Args:
        times: [T] in [0, 1), the times really sampled, in place of the two numbers.
    """
    moments = sample_times(num_frames, clip_frames) if times is None else times
    seen = frozenset(slots_at(moments).tolist())
    if len(seen) == NUM_SLOTS:
        return True
    objects = [scene.objects[i] for i in query.objects] or list(scene.objects)
    if query.task in ("colour", "shape", "size", "position", "existence") and query.response != "no":
        # Whether another object fits a colour or shape alone does not matter: the question says that there is one.
        return all(_looks(item, seen) for item in objects)
    if query.task in ("count", "existence"):
        return all(_looks(item, seen) for item in objects) and (len(scene.objects) == 4 or not _may_hide(seen))
    if query.task == "motion":
        return all(_motion_shows(item, seen) for item in objects)
    if query.task == "how_often":
        return all(_flashes_show(item, seen) for item in objects)
    if query.task == "order":
        return _in_order(scene, query.events, seen)
    complete = all(_looks(item, seen) for item in scene.objects)
    complete = complete and (len(scene.objects) == 4 or not _may_hide(seen))
    complete = (
        complete and all(_ends_show(item, seen) for item in scene.objects) and _in_order(scene, scene.events, seen)
    )
    if query.task == "summary":
        return complete
    return complete and all(_motion_shows(item, seen) and _flashes_show(item, seen) for item in scene.objects)


def _looks(item: MovingObject, seen: frozenset[int]) -> int:
    """In how many of the slots seen the object is visible."""
    return sum(item.visible_in(slot) for slot in seen)


@lru_cache(maxsize=65536)
def _lives(seen: frozenset[int], visible: frozenset[int]) -> tuple[Life, ...]:
    """All lives of an object that is visible in just these of the slots seen."""
    lives = []
    for appears in range(NUM_SLOTS - MIN_LIFE + 1):
        for disappears in range(appears + MIN_LIFE, NUM_SLOTS + 1):
            life = range(appears, disappears)
            if not all(slot in life for slot in visible):
                continue
            hidden = frozenset(slot for slot in seen if slot in life and slot not in visible)
            inner = set(life[1:-1]) if appears == 0 or disappears == NUM_SLOTS else set()
            if not hidden <= inner or len(hidden) > MAX_FLASHES or any(slot + 1 in hidden for slot in hidden):
                continue
            near = {slot + step for slot in hidden for step in (-1, 0, 1)}
            more = inner - seen - near if len(hidden) < MAX_FLASHES else set()
            lives.append((appears, disappears, hidden, frozenset(more)))
    return tuple(lives)


def _lives_of(item: MovingObject, seen: frozenset[int]) -> tuple[Life, ...]:
    return _lives(seen, frozenset(slot for slot in seen if item.visible_in(slot)))


@lru_cache(maxsize=4096)
def _may_hide(seen: frozenset[int]) -> bool:
    """Whether an object may be in the clip that none of the slots seen shows."""
    return bool(_lives(seen, frozenset()))


def _motion_shows(item: MovingObject, seen: frozenset[int]) -> bool:
    """Two looks tell still, growing and shrinking; a straight way and a circle take a third."""
    return _looks(item, seen) >= (2 if item.motion in ("still", "growing", "shrinking") else 3)


def _flashes_show(item: MovingObject, seen: frozenset[int]) -> bool:
    """Whether all lives that fit flash equally often."""
    lives = _lives_of(item, seen)
    return len({len(hidden) for _, _, hidden, _ in lives}) == 1 and not any(more for *_, more in lives)


def _ends_show(item: MovingObject, seen: frozenset[int]) -> bool:
    """Whether it is certain if the object appears and if it disappears."""
    return len({(appears > 0, disappears < NUM_SLOTS) for appears, disappears, *_ in _lives_of(item, seen)}) == 1


def _in_order(scene: Scene, events: Sequence[Event], seen: frozenset[int]) -> bool:
    """Whether the events, which are known to take place, can only happen in this order; none shares a slot."""
    spans = []
    for event in events:
        lives = _lives_of(scene.objects[event.object], seen)
        slots = [life[0] if event.kind == "appears" else life[1] for life in lives]
        slots = [slot for slot in slots if 0 < slot < NUM_SLOTS]
        spans.append((event.object, min(slots), max(slots)))
    # The same object's appearing and disappearing never change places.
    return all(a[2] <= b[1] or a[0] == b[0] for i, a in enumerate(spans) for b in spans[i + 1 :])
