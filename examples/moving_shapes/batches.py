"""Moving shapes, the small VLM's batches: one clip before many questions, drawn by seed and step alone."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from small_vlm import PIXELS, build_processor
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from video2lora.data.moving_shapes import (
    TASKS,
    Query,
    Scene,
    SceneBatch,
    caption,
    caption_prompt,
    make_queries,
    make_scene,
)
from video2lora.modeling.processor import Video2LoraProcessor
from video2lora.video import VideoFrames
from video2lora.video.sampling import select_frames

IGNORE = -100
FRAMES = 12
LONG = ("caption", "summary")
SHORT = tuple(task for task in TASKS if task not in LONG)
ASKED = (*SHORT, "how_often", "how_often", "order")  # what is learnt last is asked more often
TURNS_WIDTH = 240
VALIDATION_CLIPS = 64  # of a batch
TURN = "<end_of_utterance>\nAssistant:"


@dataclass(frozen=True)
class Form:
    """How the clips of one batch are shown, all alike: then nothing is padded.

    Attributes:
        num_frames: frames, of each segment where there are several.
        seconds: length of the clip; a multiple of 12, so that 12 frames see all its 12 slots.
        longest_edge: pixels; None for the video path, else every frame is a picture of this size, cut into tiles.
        segments: into which a clip is cut (stage 2); 1 where it stays whole.
    """

    num_frames: int = FRAMES
    seconds: int = FRAMES
    longest_edge: int | None = None
    segments: int = 1

    @property
    def seconds_shown(self) -> list[int]:
        """Seconds of the frames, where the library's own sampling takes them."""
        indices, _, _ = select_frames(np.arange(self.seconds, dtype=np.float64), num_frames=self.num_frames)
        return indices.tolist()

    @property
    def tiles(self) -> int:
        """Pictures the vision tower sees of a frame."""
        if self.longest_edge is None or self.longest_edge <= PIXELS:
            return 1
        return (self.longest_edge // PIXELS) ** 2 + 1

    @property
    def pictures(self) -> int:
        """Pictures the vision tower sees of a clip; a segment has no more frames than seconds."""
        return min(self.num_frames, -(-self.seconds // self.segments)) * self.segments * self.tiles

    def clips(self, most: int) -> int:
        """Of a batch: `most` of the usual form, of others as many as take three times the work of these."""
        return max(1, min(most, most * 3 * FRAMES // self.pictures))


class Prefixes:
    """Tokens of everything before the question, as the ordinary processor renders them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - lives as long as the process
    def __call__(self, form: Form) -> list[int]:
        """Token ids up to the question: the turn of a clip shown in this form."""
        ids = self.render(form, "?")
        end = self.tokenizer.convert_tokens_to_ids("?")
        return ids[: len(ids) - ids[::-1].index(end) - 1]

    def render(self, form: Form, prompt: str) -> list[int]:
        """Token ids of the whole turn with this question, the generation prompt behind it."""
        processor = Video2LoraProcessor(build_processor(self.tokenizer, form.longest_edge or PIXELS))
        side = 8 if form.longest_edge is None else form.longest_edge
        pixels = np.full((form.num_frames, side, side, 3), 9, dtype=np.uint8)
        times, length = tuple(map(float, form.seconds_shown)), float(form.seconds)
        frames = VideoFrames(pixels, times, 0.0, length, length, "", None, (side, side), 0)
        splitting = form.longest_edge is not None
        inputs = processor.encode_video(frames, prompt, add_generation_prompt=True, image_splitting=splitting)
        return inputs["input_ids"][0].tolist()


class ShapesBatches(Dataset):
    """Batches by number: `[i]` is the same whatever was drawn before, so a run resumes exactly.

    Args:
        tokenizer: the model's.
        split: of moving shapes.
        tokens: a batch holds as many clips as make about this many tokens.
        turns: questions about each clip.
        seed: of everything drawn.
        varied: also show clips in other forms than 12 frames of video.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        split: str = "train",
        tokens: int = 144_000,
        turns: int = 7,
        seed: int = 0,
        varied: bool = True,
        length: int = 1_000_000,
    ) -> None:
        self.tokenizer, self.prefixes = tokenizer, Prefixes(tokenizer)
        self.split, self.tokens, self.turns, self.seed = split, tokens, turns, seed
        self.varied, self.length = varied, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        draw = random.Random(f"{self.seed}/{self.split}/{number}")
        # of one form by twos, so that of two processes none waits for the longer prefix of the other
        form = draw_form(random.Random(f"{self.seed}/{self.split}/form/{number // 2}")) if self.varied else Form()
        prefix = self.prefixes(form)
        length = padded_length(len(prefix))
        clips = max(1, self.tokens // length)
        # a clip is never seen twice: the numbers of two batches do not meet
        scenes = [make_scene(number * 4096 + i, self.split, seed=self.seed) for i in range(clips)]
        rows = [self._turns(scene, draw) for scene in scenes]
        batch = join_turns(rows, len(prefix), length - len(prefix))
        return batch | {"prefix": torch.tensor(prefix), "scenes": SceneBatch.from_scenes(scenes), "form": form}

    def validation_batch(self, number: int) -> tuple[dict[str, Any], list[str]]:
        """Clips with one question of each task, and the task of each answer in the order of the labels."""
        form, clips = Form(), VALIDATION_CLIPS
        prefix = self.prefixes(form)
        scenes = [make_scene(number * clips + i, self.split, seed=self.seed) for i in range(clips)]
        queries = [make_queries(scene, phrasings=("train", "held_out")) for scene in scenes]
        rows = [[self._turn(query) for query in asked] for asked in queries]
        told = [self._told(scene, asked[-1]) for scene, asked in zip(scenes, queries, strict=True)]
        batch = join_turns([[*row, turn] for row, turn in zip(rows, told, strict=True)], len(prefix))
        tasks = [task for asked in queries for task in [*(query.task for query in asked), "caption as text"]]
        return batch | {"prefix": torch.tensor(prefix), "scenes": SceneBatch.from_scenes(scenes), "form": form}, tasks

    def _turns(self, scene: Scene, draw: random.Random) -> list[tuple[list[int], list[int], bool]]:
        """Questions and answers about one scene: prompt ids, answer ids, whether the clip is in their context."""
        number = draw.getrandbits(32)
        queries = make_queries(scene, self.turns, tasks=ASKED, phrasings=("train", "held_out"), draw=number)
        if draw.random() < 0.5:
            queries[-1:] = make_queries(scene, 1, tasks=LONG, phrasings=("train", "held_out"), draw=number)
        turns = [self._turn(query) for query in queries]
        if draw.random() < 0.25:
            turns.append(self._told(scene, queries[0]))
        return turns

    def _turn(self, query: Query) -> tuple[list[int], list[int], bool]:
        return self._ids(query.prompt + TURN), self._answer(query.response), True

    def _told(self, scene: Scene, query: Query) -> tuple[list[int], list[int], bool]:
        """A question over the caption given as text, without the clip."""
        prompt = caption_prompt(caption(scene), query.prompt)
        return self._ids(f"<|im_start|>User: {prompt}{TURN}"), self._answer(query.response), False

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _answer(self, answer: str) -> list[int]:
        return self._ids(f" {answer}<end_of_utterance>")


def draw_form(draw: random.Random) -> Form:
    """Mostly 12 frames of video; now and then fewer or more, or pictures in tiles."""
    chance = draw.random()
    seconds = 12 * round(2 ** draw.uniform(0, 5.5))
    if chance < 0.8:
        return Form(FRAMES, seconds)
    if chance < 0.9:
        frames = draw.choice([4, 6, 8, 16, 24, 32, 48, 64, 96])
        return Form(frames, max(seconds, 12 * -(-frames // 12)))
    edge = draw.choice([PIXELS // 2, PIXELS, 2 * PIXELS, 4 * PIXELS])
    return Form(FRAMES if edge <= 2 * PIXELS else 6, seconds, edge)


def padded_length(prefix: int) -> int:
    """Tokens of a clip with its turns: few different numbers, since attention is planned anew for each."""
    return -(-(prefix + TURNS_WIDTH) // 32) * 32


def join_turns(
    rows: Sequence[Sequence[tuple[list[int], list[int], bool]]], prefix: int, width: int | None = None
) -> dict[str, Tensor]:
    """The turns of each clip one after the other, padded: tokens, segments, positions and labels `[clips, tokens]`.

    Every turn is a continuation of its own of the clip's prefix: it sees the prefix (if the clip is in its context)
    and itself, at the positions it would have alone. Turns that do not fit into `width` are left out.
    """
    if width is None:
        width = max(sum(len(q) + len(a) for q, a, _ in row) for row in rows)
    shape = (len(rows), width)
    tokens = torch.zeros(shape, dtype=torch.long)
    segments, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    for r, row in enumerate(rows):
        at = 0
        for number, (prompt, answer, seen) in enumerate(row, start=1):
            ids = prompt + answer
            if at + len(ids) > width:
                continue
            span = slice(at, at + len(ids))
            tokens[r, span] = torch.tensor(ids)
            segments[r, span] = number if seen else -number
            positions[r, span] = torch.arange(len(ids)) + (prefix if seen else 0)
            labels[r, at + len(prompt) : at + len(ids)] = torch.tensor(answer)
            at += len(ids)
    return {"tokens": tokens, "segments": segments, "positions": positions, "labels": labels}
