"""Moving shapes: captions taken apart into facts, to say how much of one is right."""

from __future__ import annotations

import re
from typing import NamedTuple

from .language import DOES, NUMBERS, TIMES, caption
from .scenes import COLOURS, POSITIONS, SHAPES, SIZES, Scene

_NAME = f"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
_COUNT = re.compile(rf"({'|'.join(NUMBERS)}) objects?")
_OBJECT = re.compile(
    rf"an? (?:({'|'.join(SIZES)}) )?({_NAME})(?: at ({'|'.join(POSITIONS)}))?(?: ({'|'.join(DOES.values())}))?"
    rf"(?:, flashes ({'|'.join(TIMES)}))?"
)
_EVENT = re.compile(rf"({_NAME}) (appears|disappears)")

Fact = tuple[str, ...]


class CaptionScore(NamedTuple):
    """How much of a caption is right.

    Attributes:
        recall: share of the scene's facts that the caption states.
        precision: share of the caption's facts that are true of the scene; 0 without any.
        exact: whether it is the scene's caption, letter for letter.
    """

    recall: float
    precision: float
    exact: bool


def caption_facts(text: str) -> frozenset[Fact]:
    """The facts that a caption states, whatever their order and however broken the rest of it is.

    `("count", number)`; of each object, named by colour and shape, `("object", name)`, `("size", name, size)`,
    `("position", name, position)`, `("motion", name, what it does)`, `("flashes", name, how often)`,
    `("appears", name)` and `("disappears", name)`; and `("then", name, event, name, event)` of neighbouring events.
    """
    facts: set[Fact] = set()
    for sentence in text.strip().lower().split("."):
        sentence = sentence.strip()
        if found := _COUNT.fullmatch(sentence):
            facts.add(("count", found[1]))
        elif found := _OBJECT.match(sentence):
            size, name, position, motion, flashes = found.groups()
            facts.add(("object", name))
            said = {"size": size, "position": position, "motion": motion, "flashes": flashes}
            facts |= {(kind, name, value) for kind, value in said.items() if value}
        elif sentence.startswith("first "):
            events = [(found[1], found[2]) for found in _EVENT.finditer(sentence)]
            facts |= {(kind, name) for name, kind in events}
            facts |= {("then", *a, *b) for a, b in zip(events, events[1:], strict=False)}
    return frozenset(facts)


def facts_right(prediction: str, scene: Scene) -> CaptionScore:
    """Compare a caption with what is true of a scene."""
    return caption_right(prediction, caption(scene))


def caption_right(prediction: str, truth: str) -> CaptionScore:
    """Compare a caption with the scene's own."""
    if prediction.strip() == truth:
        return CaptionScore(1.0, 1.0, True)
    true, said = caption_facts(truth), caption_facts(prediction)
    right = len(true & said)
    return CaptionScore(right / len(true), right / len(said) if said else 0.0, False)
