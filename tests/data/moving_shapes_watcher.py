"""Watches rendered clips and answers questions about them: it knows words and palette, and nothing of scenes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

PALETTE = {
    "red": (230, 35, 35), "orange": (255, 130, 0), "yellow": (250, 230, 20), "green": (30, 180, 50),
    "cyan": (50, 225, 235), "blue": (45, 85, 255), "purple": (170, 60, 220), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
TIMES = ("never", "once", "twice", "three times")
NAME = f"(?:{'|'.join(PALETTE)}) (?:{'|'.join(SHAPES)})"


@dataclass
class Seen:
    """What was seen of one object."""

    colour: str
    shape: str
    size: str | None
    motion: str
    corner: int
    present: list[bool]  # a frame each

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def appears(self) -> int:
        return self.present.index(True)

    @property
    def disappears(self) -> int:
        return len(self.present) - self.present[::-1].index(True)

    @property
    def flashes(self) -> int:
        life = self.present[self.appears : self.disappears]
        return sum(a and not b for a, b in zip(life, life[1:], strict=False))


def watch(frames: np.ndarray, fine: np.ndarray | None = None) -> list[Seen]:
    """Find the objects of a clip, uint8 [12, H, W, 3]; shapes in `fine`, the same clip in more pixels."""
    seen = []
    for corner in range(4):
        present, where, areas, colours = [], [], [], []
        for frame in frames:
            part = _quarter(frame, corner)
            cover, colour = _cover(part)
            present.append(cover is not None)
            if cover is not None:
                ys, xs = np.mgrid[: part.shape[0], : part.shape[1]]
                areas.append(cover.sum() * (64 / len(frame)) ** 2)  # as at 64 pixels a side
                where.append(np.array([(cover * xs).sum(), (cover * ys).sum()]) / cover.sum() * 64 / len(frame))
                colours.append(colour)
        if not any(present):
            continue
        assert len(set(colours)) == 1, f"colours {colours} in one corner"
        motion = _motion(np.array(where), areas)
        size = None if motion in ("grows", "shrinks") else "small" if np.mean(areas) < 70 else "large"
        shape = ""
        if fine is not None:
            largest = np.flatnonzero(present)[int(np.argmax(areas))]
            shape = _shape(_cover(_quarter(fine[largest], corner))[0])
        seen.append(Seen(colours[0], shape, size, motion, corner, present))
    return sorted(seen, key=lambda item: (item.appears, item.corner))


def caption_of(seen: list[Seen]) -> str:
    """The caption, written anew from what was seen."""
    text = [NUMBERS[len(seen)] + (" objects" if len(seen) > 1 else " object")]
    for item in seen:
        words = [item.size, item.name] if item.size else [item.name]
        article = "an" if words[0].startswith("orange") else "a"
        words = [article, *words, "at", CORNERS[item.corner], item.motion]
        text.append(" ".join(words) + (f", flashes {TIMES[item.flashes]}" if item.flashes else ""))
    happenings = events_of(seen)
    if happenings:
        text.append("first " + ", then ".join(f"{name} {kind}" for _, name, kind in happenings))
    return ". ".join(text) + "."


def events_of(seen: list[Seen]) -> list[tuple[int, str, str]]:
    """(frame, name, "appears" or "disappears"), as they happen."""
    events = [(item.appears, item.name, "appears") for item in seen if item.appears > 0]
    return sorted(events + [(item.disappears, item.name, "disappears") for item in seen if item.disappears < 12])


def answer(seen: list[Seen], task: str, prompt: str) -> str:
    """Answer a question from its words."""
    named = {item.name: item for item in seen}
    names = re.findall(NAME, prompt)
    if task == "caption":
        return caption_of(seen)
    if task == "summary":
        told = [f"the {name} {kind}" for _, name, kind in events_of(seen)]
        both = f"first {told[0]}, last {told[-1]}" if len(told) > 1 else ""
        plural = "s" if len(seen) > 1 else ""
        return (
            f"{NUMBERS[len(seen)]} object{plural}: "
            + (both or (f"only {told[0]}." if told else "nothing comes or goes.")).rstrip(".")
            + "."
        )
    if task in ("colour", "shape"):
        return getattr(_only(_referred(seen, prompt)), task)
    if task == "size":
        assert named[names[0]].size is not None
        return named[names[0]].size or ""
    if task == "motion":
        return named[names[0]].motion
    if task == "position":
        return CORNERS[named[names[0]].corner]
    if task == "how_often":
        return TIMES[named[names[0]].flashes]
    if task == "existence":
        return "yes" if names[0] in named else "no"
    if task == "count":
        kinds = [s for s in SHAPES if re.search(rf"\b{s}e?s\b", prompt)]
        colours = [c for c in PALETTE if re.search(rf"\b{c}\b", prompt)]
        return NUMBERS[sum((not kinds or o.shape in kinds) and (not colours or o.colour in colours) for o in seen)]
    assert task == "order"
    return _order(named, names, prompt)


def _order(named: dict[str, Seen], names: list[str], prompt: str) -> str:
    def when(name: str, verb: str) -> int:
        frame = named[name].appears if verb.startswith("appear") else named[name].disappears
        assert 0 < frame < 12, f"{prompt}: {name} does not {verb}"
        return frame

    assert len(names) == 2
    verbs = re.findall(r"\b(?:dis)?appears?\b", prompt)
    if re.search(r"\b(?:first|last)\b", prompt):
        earlier, later = sorted(names, key=lambda name: when(name, verbs[0]))
        return f"the {earlier if 'first' in prompt else later}"
    relation = "before" if "before" in prompt else "after"
    # the words behind "before" or "after" are what the rest is compared with
    head, tail = prompt.split(relation)
    if not re.search(NAME, head):  # "before the .. appears, does the .. appear?"; "is it before .. that ..?"
        names, verbs = names[::-1], verbs[::-1]
    first, second = when(names[0], verbs[0]), when(names[1], verbs[1])
    assert first != second
    return "yes" if (first < second) == (relation == "before") else "no"


def _referred(seen: list[Seen], prompt: str) -> list[Seen]:
    if found := re.search("|".join(f"at {corner}" for corner in CORNERS), prompt):
        return [item for item in seen if f"at {CORNERS[item.corner]}" == found[0]]
    if found := re.search(rf"({'|'.join(PALETTE)}) object", prompt):
        return [item for item in seen if item.colour == found[1]]
    found = re.search(rf"the ({'|'.join(SHAPES)})\b", prompt)
    assert found, prompt
    return [item for item in seen if item.shape == found[1]]


def _only(items: list[Seen]) -> Seen:
    assert len(items) == 1, items
    return items[0]


def _quarter(frame: np.ndarray, corner: int) -> np.ndarray:
    half = len(frame) // 2
    top, left = half * (corner // 2), half * (corner % 2)
    return frame[top : top + half, left : left + half].astype(float)


def _cover(part: np.ndarray) -> tuple[np.ndarray | None, str]:
    """How much of each pixel an object covers, and its colour; None without one."""
    bright = part.max(axis=2)
    if bright.max() < 120:
        return None, ""
    ground = np.median(part[bright < 62], axis=0)
    changed = np.abs(part - ground).sum(axis=2) * (bright > 70)
    ys, xs = np.mgrid[: part.shape[0], : part.shape[1]]
    # the colour of its centre: H.264 keeps colours at half the resolution, so edges are mixed
    core = part[round((changed * ys).sum() / changed.sum()), round((changed * xs).sum() / changed.sum())]
    name = min(PALETTE, key=lambda colour: float(np.abs(core - PALETTE[colour]).sum()))
    step = np.array(PALETTE[name]) - ground
    cover = ((part - ground) @ step / (step @ step)).clip(0, 1)
    return np.where(cover > 0.08, cover, 0), name  # the background's gradient is no cover


def _motion(where: np.ndarray, areas: list[float]) -> str:
    if areas[-1] > 1.4 * areas[0]:
        return "grows"
    if areas[0] > 1.4 * areas[-1]:
        return "shrinks"
    across, down = np.ptp(where, axis=0)
    if max(across, down) < 0.7:
        return "stays still"
    if min(across, down) > 0.7:
        return "circles around"
    right, below = where[-1] - where[0]
    return (
        ("moves right" if right > 0 else "moves left")
        if across > down
        else ("moves down" if below > 0 else "moves up")
    )


def _shape(cover: np.ndarray | None) -> str:
    """By how much of its box it fills, and where its centre of mass is in it."""
    assert cover is not None
    ys, xs = np.nonzero(cover > 0.5)
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    fill = cover.sum() / (height * width)
    low = (ys.mean() - ys.min() + 0.5) / height
    if fill > 0.9:
        return "square"
    if fill > 0.68:
        return "circle"
    if low > 0.6:
        return "triangle"
    return "cross" if fill > 0.43 else "star"
