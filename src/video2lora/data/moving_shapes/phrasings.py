"""Moving shapes: the ways each kind of question is put.

Those of "held_out" are never part of a hypernetwork's training. They use the words of the others wherever they can:
what is new is the sentence.
"""

from __future__ import annotations

PHRASINGS = ("train", "held_out")

ARTICLES = {word: "an" if word[0] in "aeiou" else "a" for word in (
    "small", "large", "red", "orange", "yellow", "green", "cyan", "blue", "purple", "white",
)}  # fmt: skip

# Words filled in: o, p, q objects ("red circle"); a_o with its article; ref ("circle", "object at top left"); things
# ("objects", "circles", "red objects"); v, v_p "appear" or "disappear"; vs_p, vs_q "appears" or "disappears".
TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "caption": {
        "train": ("describe the video.", "write a caption.", "what happens in the video?", "describe what you see."),
        "held_out": ("write what you see in the video.", "caption the video."),
    },
    "summary": {
        "train": ("summarize the video.", "give a short summary.", "what happens, in short?"),
        "held_out": ("give a summary of the video.", "in short, summarize what you see."),
    },
    "colour": {
        "train": ("what colour is the {ref}?", "which colour does the {ref} have?", "name the colour of the {ref}."),
        "held_out": ("what is the colour of the {ref}?", "the {ref} is of which colour?"),
    },
    "shape": {
        "train": ("what shape is the {ref}?", "which shape does the {ref} have?", "name the shape of the {ref}."),
        "held_out": ("what is the shape of the {ref}?", "the {ref} is of which shape?"),
    },
    "size": {
        "train": ("what size is the {o}?", "is the {o} small or large?", "name the size of the {o}."),
        "held_out": ("what is the size of the {o}?", "the {o} is of which size?"),
    },
    "count": {
        "train": ("how many {things} are there?", "count the {things}.", "what is the number of {things}?"),
        "held_out": ("how many {things} do you see?", "name the number of {things} in the video."),
    },
    "motion": {
        "train": ("what does the {o} do?", "how does the {o} move?", "describe the motion of the {o}."),
        "held_out": ("what is the motion of the {o}?", "describe how the {o} moves."),
    },
    "position": {
        "train": ("where is the {o}?", "in which corner is the {o}?", "name the position of the {o}."),
        "held_out": ("what is the position of the {o}?", "the {o} is in which corner?"),
    },
    "how_often": {
        "train": (
            "how often does the {o} flash?",
            "how many times does the {o} flash?",
            "count how often the {o} flashes.",
        ),
        "held_out": ("the {o} flashes how many times?", "name how often the {o} flashes."),
    },
    "existence": {
        "train": ("is there {a_o}?", "do you see {a_o}?", "does the video have {a_o}?"),
        "held_out": ("is {a_o} in the video?", "is there {a_o} in what you see?"),
    },
    "first": {
        "train": (
            "which {v}s first, the {p} or the {q}?",
            "of the {p} and the {q}, which {v}s first?",
            "is it the {p} or the {q} that {v}s first?",
        ),
        "held_out": ("the {p} or the {q}: which {v}s first?", "name which {v}s first, the {p} or the {q}."),
    },
    "last": {
        "train": (
            "which {v}s last, the {p} or the {q}?",
            "of the {p} and the {q}, which {v}s last?",
            "is it the {p} or the {q} that {v}s last?",
        ),
        "held_out": ("the {p} or the {q}: which {v}s last?", "name which {v}s last, the {p} or the {q}."),
    },
    "before": {
        "train": (
            "does the {p} {v_p} before the {q} {vs_q}?",
            "is it before the {q} {vs_q} that the {p} {vs_p}?",
            "the {p} {vs_p} before the {q} {vs_q}: yes or no?",
        ),
        "held_out": (
            "yes or no: does the {p} {v_p} before the {q} {vs_q}?",
            "before the {q} {vs_q}, does the {p} {v_p}?",
        ),
    },
    "after": {
        "train": (
            "does the {p} {v_p} after the {q} {vs_q}?",
            "is it after the {q} {vs_q} that the {p} {vs_p}?",
            "the {p} {vs_p} after the {q} {vs_q}: yes or no?",
        ),
        "held_out": (
            "yes or no: does the {p} {v_p} after the {q} {vs_q}?",
            "after the {q} {vs_q}, does the {p} {v_p}?",
        ),
    },
}
