"""Moving shapes as a benchmark: made when it is loaded, nothing to download; questions the frames do not decide go."""

from __future__ import annotations

from collections.abc import Sequence

from ..samples import Question, Sample
from .benchmark import Benchmark, NumSamples
from .spec import BenchmarkError, BenchmarkSpec

# Split of the scenes and phrasings of the questions.
_SPLITS = {
    "test": ("test", "train"),
    "validation": ("validation", "train"),
    "combinations": ("combinations", "train"),
    "phrasings": ("test", "held_out"),
}


def load_shapes(
    spec: BenchmarkSpec,
    *,
    split: str | None = None,
    num_samples: NumSamples = None,
    seed: int | None = None,
    tasks: Sequence[str] = (),
    num_frames: int | None = None,
) -> Benchmark:
    """Make the first `num_samples` clips of a split with one question of each task; see `MovingShapes`.

    Frames are in memory, uint8 [frames, 64, 64, 3], drawn when they are read. Another seed makes other clips.

    Args:
        num_frames: frames that will be sampled of each clip; clips get the next multiple of 12, and questions that so
            many frames do not decide are left out. The spec's number by default.

    Raises:
        BenchmarkError: an unknown split, or a number of clips that is none.
    """
    from ...data.moving_shapes import NUM_SLOTS, MovingShapes

    split = spec.split if split is None else split
    number = spec.num_samples if num_samples is None else num_samples
    if split not in _SPLITS:
        raise BenchmarkError(f"{spec.title} has the splits {sorted(_SPLITS)}, not {split!r}.")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise BenchmarkError(f"num_samples={number!r}: there is no end of clips; give a number of at least 1.")
    scenes, phrasing = _SPLITS[split]
    seed = spec.seed if seed is None else seed
    sampled = spec.num_frames if num_frames is None else num_frames
    clip = -(-sampled // NUM_SLOTS) * NUM_SLOTS
    shapes = MovingShapes(scenes, number, num_frames=clip, seed=seed, tasks=tuple(tasks), phrasings=(phrasing,))
    samples = tuple(
        Sample(record["id"], record["video"], tuple(Question(**question) for question in record["questions"]))
        for record in shapes.records(num_frames=sampled)
    )
    return Benchmark(spec, samples, split, seed, sum(len(sample.questions) for sample in samples))
