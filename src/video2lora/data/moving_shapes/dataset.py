"""Moving shapes: the benchmark as a dataset of training rows with frames in memory, and as evaluation records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .answerable import answerable
from .drawing import draw
from .language import TASKS, Query, make_queries
from .phrasings import PHRASINGS
from .scenes import NUM_SLOTS, SPLITS, Scene, frame_times, make_scene


class MovingShapes(Dataset):
    """Clips of moving shapes with questions, made when they are asked for; picklable, for a data loader's workers.

    A row is what [`load_rows`] gives, with frames in place of a file: `{"id", "video", "start", "end", "queries"}`,
    `video` uint8 `[num_frames, pixels, pixels, 3]`, which `video2lora` reads at one frame a second. Queries have
    `prompt`, `response` and `task`. Row i depends on the arguments alone.

    Args:
        split: "train", "validation", "test" or "combinations" (`make_scene`).
        size: how many clips.
        num_frames: of a clip, 12 or more; the processor samples from them. Where it is to take 12, a multiple of 12
            puts them one in each of the clip's 12 slots.
        seed: another one makes other clips of the same split.
        queries_per_video: at most so many; None: one of each task that the scene has.
        tasks: of `TASKS`; default: all.
        phrasings: "train", "held_out" or both.
        pixels: of a frame's side.
        max_objects: 1 to 4.

    Raises:
        ValueError: an argument is none of these.
        IndexError: a row that is not there.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 10_000,
        *,
        num_frames: int = NUM_SLOTS,
        seed: int = 0,
        queries_per_video: int | None = None,
        tasks: Sequence[str] | None = None,
        phrasings: Sequence[str] = ("train",),
        pixels: int = 64,
        max_objects: int = 4,
    ) -> None:
        check_choice(split, tasks, phrasings)
        if num_frames < NUM_SLOTS:
            raise ValueError(
                f"num_frames={num_frames}: a clip has at least {NUM_SLOTS} frames. To show a model fewer, let its "
                "processor sample fewer."
            )
        self.split, self.size, self.num_frames, self.seed = split, size, num_frames, seed
        self.queries_per_video, self.tasks, self.phrasings = queries_per_video, tasks, tuple(phrasings)
        self.pixels, self.max_objects = pixels, max_objects

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        queries = [{"prompt": q.prompt, "response": q.response, "task": q.task} for q in self.queries(scene)]
        return {"id": scene.id, "video": self.video(scene), "start": None, "end": None, "queries": queries}

    def scene(self, index: int) -> Scene:
        """The scene of a row."""
        index += self.size if index < 0 else 0
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of {self.size}")
        return make_scene(index, self.split, seed=self.seed, max_objects=self.max_objects)

    def queries(self, scene: Scene) -> list[Query]:
        """The questions about a scene."""
        return make_queries(scene, self.queries_per_video, tasks=self.tasks, phrasings=self.phrasings)

    def video(self, scene: Scene) -> np.ndarray:
        """The clip of a scene, uint8 [num_frames, pixels, pixels, 3]."""
        return draw([scene], frame_times(self.num_frames), size=self.pixels)[0].numpy()

    def records(self, num_frames: int | None = None) -> Iterator[dict[str, Any]]:
        """Go through the clips in the fields of `evaluation.samples`: `Sample(**record)` with `Question(**question)`.

        Args:
            num_frames: leave out questions that so many sampled frames do not decide (`answerable`), and clips without
                any other.

        Yields:
            `{"id", "video", "questions"}`; the video a [`SceneClip`], read by `video2lora` as an array; a question is
            `{"id", "prompt", "references", "task"}`.
        """
        for index in range(self.size):
            scene = self.scene(index)
            queries = self.queries(scene)
            if num_frames is not None:
                queries = [query for query in queries if answerable(scene, query, num_frames, self.num_frames)]
            if queries:
                questions = [question_fields(scene, number, query) for number, query in enumerate(queries)]
                clip = SceneClip(scene, self.num_frames, self.pixels)
                yield {"id": scene.id, "video": clip, "questions": questions}


class SceneClip:
    """A clip as frames in memory that are drawn when they are read: thousands of them wait in little memory.

    Args:
        scene: what is seen.
        num_frames, pixels: of the clip.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, scene: Scene, num_frames: int, pixels: int) -> None:
        self.scene, self.shape = scene, (num_frames, pixels, pixels, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        frames = draw([self.scene], frame_times(self.shape[0]), size=self.shape[1])[0].numpy()
        return frames if dtype is None else frames.astype(dtype, copy=False)


def question_fields(scene: Scene, number: int, query: Query) -> dict[str, Any]:
    """A question in the fields of `evaluation.samples.Question`."""
    references: tuple[str, ...] = (query.response,)
    if query.response.startswith("the "):
        references += (query.response.removeprefix("the "),)
    return {"id": f"{scene.id}/{number}", "prompt": query.prompt, "references": references, "task": query.task}


def check_choice(split: str, tasks: Sequence[str] | None, phrasings: Sequence[str]) -> None:
    """Refuse a split, task or set of phrasings that does not exist.

    Raises:
        ValueError: it does not.
    """
    for given, known in (((split,), SPLITS), (tasks or TASKS, TASKS), (phrasings, PHRASINGS)):
        if isinstance(given, str) or not given or not set(given) <= set(known):
            raise ValueError(f"{given!r}: expected a sequence of {', '.join(known)}.")
