"""Moving shapes: what is said of a scene. Captions, questions with their answers, and all words there are.

Everything said follows from 12 frames, one in each slot. Objects are called by colour and shape ("red circle"),
which no other object of the scene has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple, TypeVar

from .phrasings import ARTICLES, PHRASINGS, TEMPLATES
from .scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    MOTIONS,
    NUM_SLOTS,
    POSITIONS,
    SHAPES,
    SIZES,
    Event,
    MovingObject,
    Scene,
    random_for,
)

NUMBERS = ("zero", "one", "two", "three", "four")
TIMES = ("never", "once", "twice", "three times")
DOES = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "still": "stays still",
    "growing": "grows",
    "shrinking": "shrinks",
    "circling": "circles around",
}
TASKS = (
    "caption",
    "summary",
    "colour",
    "shape",
    "size",
    "count",
    "motion",
    "position",
    "order",
    "existence",
    "how_often",
)

# Odds of what is asked where a scene allows several, so that answers come out balanced (docs/moving_shapes.md).
_NEVER = 0.06  # "how often": of asking about what never flashes, where something does
_TOTAL = 0.7  # "count": of counting all objects
_MIXED = 0.5  # "order": of asking about an appearance and a disappearance
_APPEARS_EARLIER = 0.112  # of these, of asking where the appearance comes earlier


class Query(NamedTuple):
    """A question and its answer.

    Attributes:
        task: of `TASKS`.
        prompt, response: the question, and the one answer.
        phrasing: "train" or "held_out".
        objects: indices of the scene's objects that are asked about; empty for all.
        events: order questions: the two events, the earlier first.
    """

    task: str
    prompt: str
    response: str
    phrasing: str = "train"
    objects: tuple[int, ...] = ()
    events: tuple[Event, ...] = ()


def caption(scene: Scene) -> str:
    """Describe a scene: every object in canonical order, then appearing and disappearing in the order they happen.

    At most 60 words, for instance "two objects. a small red circle at top left moves right, flashes twice. a blue
    star at bottom right grows. first blue star appears, then red circle disappears."
    """
    sentences = [_count_of_objects(scene)]
    for item in scene.objects:
        size = "" if item.size is None else item.size + " "
        flashes = f", flashes {TIMES[len(item.flashes)]}" if item.flashes else ""
        start = size or item.colour
        sentences.append(
            f"{ARTICLES[start.strip()]} {size}{item.name} at {item.position} {DOES[item.motion]}{flashes}"
        )
    if scene.events:
        sentences.append("first " + ", then ".join(f"{scene.objects[e.object].name} {e.kind}" for e in scene.events))
    return ". ".join(sentences) + "."


def summary(scene: Scene) -> str:
    """Say in a sentence how many objects there are, and what appears or disappears first and last."""
    happenings = [f"the {scene.objects[e.object].name} {e.kind}" for e in scene.events]
    if not happenings:
        told = "nothing comes or goes"
    elif len(happenings) == 1:
        told = f"only {happenings[0]}"
    else:
        told = f"first {happenings[0]}, last {happenings[-1]}"
    return f"{_count_of_objects(scene)}: {told}."


def caption_prompt(caption: str, question: str) -> str:
    """A question about a video of which only a caption is given, as evaluation's caption condition puts it."""
    return f"A description of a video: {caption}\n\n{question}"


def ask(scene: Scene, task: str, rng: Random, phrasings: Sequence[str] = ("train",)) -> Query | None:
    """Draw a question of a task about a scene; None where the scene has none (order needs two events, say).

    Raises:
        ValueError: an unknown task or set of phrasings.
    """
    if task not in _ASKERS or not phrasings or not set(phrasings) <= set(PHRASINGS):
        raise ValueError(
            f"task {task!r}, phrasings {tuple(phrasings)}: expected one of {', '.join(TASKS)}, and of "
            f"{' or '.join(PHRASINGS)}."
        )
    asked = _ASKERS[task](scene, rng.random)
    if asked is None:
        return None
    kind, words, response, objects, events = asked
    phrasing = _choose(phrasings, rng.random)
    template = _choose(TEMPLATES[kind][phrasing], rng.random)
    return Query(task, template.format(**words), response, phrasing, objects, events)


def make_queries(
    scene: Scene,
    number: int | None = None,
    *,
    tasks: Sequence[str] | None = None,
    phrasings: Sequence[str] = ("train",),
    draw: int = 0,
) -> list[Query]:
    """Questions about a scene, which depend on the arguments alone.

    Args:
        number: how many, no two alike; of tasks in random order, each again only after all others. Fewer where the
            scene has not so many. Default: one of each task that the scene has.
        tasks: of `TASKS`; default: all.
        phrasings: "train", "held_out" or both.
        draw: another number draws others.

    Raises:
        ValueError: an unknown task or set of phrasings, or a number below 1.
    """
    if number is not None and number < 1:
        raise ValueError(f"number={number}: ask at least one question.")
    rng = random_for("queries", scene.id, len(scene.objects), draw)
    remaining = list(TASKS if tasks is None else tasks)
    found: dict[str, Query] = {}
    for _ in range(1 if number is None else 4):  # a task may have only one question: do not insist
        order = remaining[:]
        while order and (number is None or len(found) < number):
            query = ask(scene, order.pop(int(rng.random() * len(order)) if number is not None else 0), rng, phrasings)
            if query is not None:
                found.setdefault(query.prompt, query)
    return list(found.values())


def questions_across(scene: Scene, num_segments: int, phrasing: str = "train") -> list[Query]:
    """All pairs of like events that fall into different ones of equal segments, an order question about each.

    Two appearances or two disappearances, so that words do not give the order away. An event on the border of two
    segments is left out: neither of them shows it.
    """
    rng = random_for("across", scene.id, num_segments, phrasing)
    queries = []
    inside = [e for e in scene.events if e.slot * num_segments % NUM_SLOTS]
    for i, first in enumerate(inside):
        for second in inside[i + 1 :]:
            segments = int(first.time * num_segments), int(second.time * num_segments)
            if first.kind == second.kind and segments[0] != segments[1]:
                kind, words, response, objects, events = _about_order(scene, first, second, rng.random)
                template = _choose(TEMPLATES[kind][phrasing], rng.random)
                queries.append(Query("order", template.format(**words), response, phrasing, objects, events))
    return queries


def vocabulary_texts() -> Iterator[str]:
    """Texts that together hold every word and sign that prompts, captions and answers can hold, several times.

    For training a tokenizer. The prompts of a chat template and of a processor (times of frames) are not among them.
    """
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    for name in names:
        colour, shape = name.split()
        for i, does in enumerate(DOES.values()):
            position, other = POSITIONS[i % 4], names[(names.index(name) + 7 * i + 1) % len(names)]
            size, number, times = SIZES[i % 2], NUMBERS[i % 5], TIMES[i % 4]
            yield f"{number} object. {ARTICLES[size]} {size} {name} at {position} {does}, flashes {times}."
            yield f"{number} objects. {ARTICLES[colour]} {name} at {position} {does}."
            yield f"first {name} appears, then {other} disappears, then {name} disappears."
            yield f"{number} objects: first the {name} appears, last the {other} disappears."
        yield f"one object: only the {name} disappears."
    yield "one object: nothing comes or goes."
    yield from (*SIZES, *POSITIONS, *DOES.values(), *NUMBERS, *TIMES, *COLOURS, *SHAPES, "yes", "no")
    for colour in COLOURS:
        for shape in SHAPES:
            name = f"{colour} {shape}"
            words = {"o": name, "a_o": f"{ARTICLES[colour]} {name}", "colour": colour, "shape": shape}
            words |= {"ref": name, "things": f"{colour} {PLURALS[shape]}", "p": name, "q": name}
            for kind in TEMPLATES.values():
                for phrasing in PHRASINGS:
                    for template in kind[phrasing]:
                        for does in ("appear", "disappear"):
                            filled = words | {"v": does, "v_p": does, "vs_p": does + "s", "vs_q": does + "s"}
                            yield template.format(**filled)
    yield caption_prompt("two objects. the object at top left.", "how many objects are there?")


# --- one function a task: (kind of template, its words, answer, objects, events) -------------------------------------

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
_Asked = tuple[str, dict[str, str], str, tuple[int, ...], tuple[Event, ...]]
_Random = Callable[[], float]
_T = TypeVar("_T")


def _count_of_objects(scene: Scene) -> str:
    count = len(scene.objects)
    return f"{NUMBERS[count]} object" + ("s" if count > 1 else "")


def _choose(items: Sequence[_T], random: _Random) -> _T:
    return items[int(random() * len(items))]


def _any_object(scene: Scene, random: _Random) -> tuple[int, MovingObject]:
    i = int(random() * len(scene.objects))
    return i, scene.objects[i]


def _ask_caption(scene: Scene, random: _Random) -> _Asked:
    return "caption", {}, caption(scene), (), ()


def _ask_summary(scene: Scene, random: _Random) -> _Asked:
    return "summary", {}, summary(scene), (), ()


def _ask_colour(scene: Scene, random: _Random) -> _Asked:
    i, item = _any_object(scene, random)
    alone = sum(other.shape == item.shape for other in scene.objects) == 1
    ref = item.shape if alone and random() < 0.6 else f"object at {item.position}"
    return "colour", {"ref": ref}, item.colour, (i,), ()


def _ask_shape(scene: Scene, random: _Random) -> _Asked:
    i, item = _any_object(scene, random)
    alone = sum(other.colour == item.colour for other in scene.objects) == 1
    ref = f"{item.colour} object" if alone and random() < 0.6 else f"object at {item.position}"
    return "shape", {"ref": ref}, item.shape, (i,), ()


def _ask_size(scene: Scene, random: _Random) -> _Asked | None:
    sized = [i for i, item in enumerate(scene.objects) if item.size is not None]
    if not sized:
        return None
    i = _choose(sized, random)
    size = scene.objects[i].size
    assert size is not None
    return "size", {"o": scene.objects[i].name}, size, (i,), ()


def _ask_count(scene: Scene, random: _Random) -> _Asked:
    """All objects, or those of a colour or shape: each number that some colour (shape) has is as likely."""
    if random() < _TOTAL:
        return "count", {"things": "objects"}, NUMBERS[len(scene.objects)], (), ()
    by_colour = random() < 0.5
    values = list(COLOURS) if by_colour else list(SHAPES)
    present = [item.colour if by_colour else item.shape for item in scene.objects]
    numbers = {value: present.count(value) for value in values}
    number = _choose(sorted(set(numbers.values())), random)
    value = _choose([v for v in values if numbers[v] == number], random)
    things = f"{value} objects" if by_colour else PLURALS[value]
    return "count", {"things": things}, NUMBERS[number], (), ()


def _ask_motion(scene: Scene, random: _Random) -> _Asked:
    i, item = _any_object(scene, random)
    return "motion", {"o": item.name}, DOES[item.motion], (i,), ()


def _ask_position(scene: Scene, random: _Random) -> _Asked:
    i, item = _any_object(scene, random)
    return "position", {"o": item.name}, item.position, (i,), ()


def _ask_how_often(scene: Scene, random: _Random) -> _Asked:
    flashing = [i for i, item in enumerate(scene.objects) if item.flashes]
    constant = [i for i, item in enumerate(scene.objects) if not item.flashes]
    never = not flashing or (bool(constant) and random() < _NEVER)
    i = _choose(constant if never else flashing, random)
    return "how_often", {"o": scene.objects[i].name}, TIMES[len(scene.objects[i].flashes)], (i,), ()


def _ask_existence(scene: Scene, random: _Random) -> _Asked:
    """Half the answers are no; then colour and shape are both there, on different objects, where that is possible.

    Where it is not, one of the two is. A pair that training never shows is never asked for where it is not there:
    else "no" would be learnt for it.
    """
    present = {(item.colour, item.shape) for item in scene.objects}
    objects: tuple[int, ...] = ()
    if random() < 0.5:
        i, item = _any_object(scene, random)
        colour, shape, objects, response = item.colour, item.shape, (i,), "yes"
    else:
        absent = present | HELD_OUT_PAIRS
        colours, shapes = {c for c, _ in present}, {s for _, s in present}
        pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in absent]
        hard = [(c, s) for c, s in pairs if c in colours and s in shapes]
        colour, shape = _choose(hard or [(c, s) for c, s in pairs if c in colours or s in shapes], random)
        response = "no"
    return "existence", {"a_o": f"{ARTICLES[colour]} {colour} {shape}"}, response, objects, ()


def _ask_order(scene: Scene, random: _Random) -> _Asked | None:
    """Two events of different objects.

    Appearances tend to come before disappearances; questions about one of each are drawn so that either comes
    earlier as often, and the question's words do not give the answer away.
    """
    events = scene.events
    pairs = [(a, b) for i, a in enumerate(events) for b in events[i + 1 :] if a.object != b.object]
    same = [(a, b) for a, b in pairs if a.kind == b.kind]
    fitting = same
    if random() < _MIXED:
        wanted = "appears" if random() < _APPEARS_EARLIER else "disappears"
        fitting = [(a, b) for a, b in pairs if a.kind == wanted != b.kind] or same
    if not fitting:
        return None
    first, second = _choose(fitting, random)
    return _about_order(scene, first, second, random)


def _about_order(scene: Scene, first: Event, second: Event, random: _Random) -> _Asked:
    """Which of two comes first (same kind of event only), or whether one comes before (after) the other."""
    names = scene.objects[first.object].name, scene.objects[second.object].name
    objects, events = (first.object, second.object), (first, second)
    if first.kind == second.kind and random() < 0.4:
        p, q = names if random() < 0.5 else names[::-1]
        verb = first.kind[:-1]
        kind, answer = ("first", names[0]) if random() < 0.5 else ("last", names[1])
        return kind, {"p": p, "q": q, "v": verb}, f"the {answer}", objects, events
    kind, right = ("before", random() < 0.5) if random() < 0.5 else ("after", random() < 0.5)
    one, other = (0, 1) if right == (kind == "before") else (1, 0)
    words = {"p": names[one], "q": names[other], "v_p": events[one].kind[:-1]}
    words |= {"vs_p": events[one].kind, "vs_q": events[other].kind}
    return kind, words, "yes" if right else "no", objects, events


_ASKERS: dict[str, Callable[[Scene, _Random], _Asked | None]] = {
    "caption": _ask_caption,
    "summary": _ask_summary,
    "colour": _ask_colour,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "motion": _ask_motion,
    "position": _ask_position,
    "order": _ask_order,
    "existence": _ask_existence,
    "how_often": _ask_how_often,
}
assert set(DOES) == set(MOTIONS)
