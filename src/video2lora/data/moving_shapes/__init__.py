"""Moving shapes: a synthetic benchmark of short clips, made from a seed, with captions and questions that are right.

Scenes are plain Python (`make_scene`), drawn many at once on any device (`SceneBatch`, `draw`), and talked about in
a closed language (`caption`, `summary`, `make_queries`). `MovingShapes` is the dataset, `write_moving_shapes` writes
real H.264 files. docs/moving_shapes.md is the data card.

    scenes = [make_scene(i, "train") for i in range(320)]
    frames = draw(SceneBatch.from_scenes(scenes), sample_times(12, clip_frames=96), size=64, device="cuda")
    queries = [make_queries(scene, 4) for scene in scenes]  # task, prompt, response, ...
"""

from .answerable import answerable
from .dataset import MovingShapes
from .drawing import SceneBatch, contact_sheet, draw
from .facts import CaptionScore, caption_facts, facts_right
from .files import write_moving_shapes
from .language import (
    TASKS,
    Query,
    ask,
    caption,
    caption_prompt,
    make_queries,
    questions_across,
    summary,
    vocabulary_texts,
)
from .phrasings import PHRASINGS
from .scenes import (
    COLOURS,
    HELD_OUT_PAIRS,
    MOTIONS,
    NUM_SLOTS,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Event,
    MovingObject,
    Scene,
    frame_times,
    make_scene,
    sample_times,
)

__all__ = [
    "COLOURS",
    "HELD_OUT_PAIRS",
    "MOTIONS",
    "NUM_SLOTS",
    "PHRASINGS",
    "POSITIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "TASKS",
    "CaptionScore",
    "Event",
    "MovingObject",
    "MovingShapes",
    "Query",
    "Scene",
    "SceneBatch",
    "answerable",
    "ask",
    "caption",
    "caption_facts",
    "caption_prompt",
    "contact_sheet",
    "draw",
    "facts_right",
    "frame_times",
    "make_queries",
    "make_scene",
    "questions_across",
    "sample_times",
    "summary",
    "vocabulary_texts",
    "write_moving_shapes",
]
