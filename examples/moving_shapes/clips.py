"""Moving shapes, stage 2's data: the library's batches, whose frames are drawn where the model is.

Drawing and preparing 12 to 96 frames of each of 512 clips keeps several cores busy for longer than a GPU takes for a
step. Here a data loader's worker only says what each frame shows, and the trainer draws. All clips of a batch have one
form, so nothing is padded: models this small are bound by the number of kernels, not by their work. (A test holds the
batches against those of the library's own collator.)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from batches import FRAMES, Form
from small_vlm import PIXELS, build_processor, tiles
from torch import Tensor
from torch.utils.data import Dataset

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.data.moving_shapes import (
    NUM_SLOTS,
    MovingShapes,
    Scene,
    SceneBatch,
    caption,
    draw,
    frame_times,
)
from video2lora.data.moving_shapes.dataset import SceneClip
from video2lora.data.moving_shapes.scenes import slots_at
from video2lora.modeling.processor import IGNORE_INDEX
from video2lora.modeling.turns import Labelled
from video2lora.trainer import Video2LoraTrainer, Video2LoraTrainingArguments
from video2lora.trainer.collator import Video2LoraCollator
from video2lora.video import VideoFrames
from video2lora.video.sampling import select_frames

ENDLESS = 10**8  # clips: more than any run draws
LONG_ANSWER = 8  # tokens; a longer answer counts by its length: all of them have to be right
FRAME_NUMBERS = (4, 6, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 768)  # of clips that are not shown in 12


class SceneClips(MovingShapes):
    """Rows whose frames are not drawn yet: `video` is a [`SceneClip`], which any reader of arrays draws."""

    def video(self, scene: Scene) -> Any:
        return SceneClip(scene, self.num_frames, self.pixels)


class FullerSceneClips(SceneClips):
    """Rows of which each is the fuller of two, whose caption is longer: what is learnt last is wrong in these."""

    def scene(self, index: int) -> Scene:
        return max((super(FullerSceneClips, self).scene(2 * index + i) for i in (0, 1)), key=lambda s: len(caption(s)))


# --- forms -----------------------------------------------------------------------------------------------------------


def draw_form(draw: random.Random, composition: float) -> Form:
    """12 frames of the whole clip, or other numbers of frames, or pictures in tiles, or segments.

    Args:
        draw: what decides.
        composition: share of batches whose clips are cut into 2 to 8 segments.
    """
    seconds = FRAMES * 2 ** draw.randint(0, 3)
    if draw.random() < composition:
        return Form(draw.choice([6, 12, 12, 12]), max(seconds, 4 * FRAMES), segments=draw.randint(2, 8))
    chance = draw.random()
    if chance < 0.45:
        return Form(FRAMES, seconds)
    if chance < 0.8:
        frames = draw.choice(FRAME_NUMBERS)
        return Form(frames, max(seconds, FRAMES * -(-frames // FRAMES)))
    return Form(FRAMES, seconds, draw.choice([PIXELS // 2, PIXELS, 2 * PIXELS, 4 * PIXELS]))


class FormedClips(Dataset):
    """Training rows of [`SceneClips`] in blocks of one form; a row, and its form, follow from its number.

    Args:
        block: rows of one form: a batch of all processes together.
        plain: blocks at the start that have the usual form, with which most is learnt soonest; in all later ones a
            row's scene is the fuller of two.
        composition: see [`draw_form`].
        in_turn: tasks of which each block asks one, besides `tasks`.
        tasks, options: of [`MovingShapes`].
    """

    def __init__(
        self,
        block: int,
        plain: int = 0,
        composition: float = 0.4,
        seed: int = 0,
        *,
        tasks: Sequence[str] | None = None,
        in_turn: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if in_turn and tasks is None:
            raise ValueError(f"in_turn={in_turn!r} without tasks, which are all then: name those of every block.")
        self.block, self.plain, self.composition, self.seed = block, plain, composition, seed
        self.tasks, self.in_turn, self.options = tasks, tuple(in_turn), options

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, Any]:
        block = index // self.block
        form, turn = self.form(block), block % max(1, len(self.in_turn))
        return self._clips(form.seconds, turn, block >= self.plain)[index] | {"form": form}

    @lru_cache(maxsize=64)  # noqa: B019 - lives as long as the process
    def form(self, block: int) -> Form:
        """The form of all rows of a block."""
        if block < self.plain:
            return Form()
        return draw_form(random.Random(f"{self.seed}/form/{block}"), self.composition)

    @lru_cache(maxsize=256)  # noqa: B019
    def _clips(self, seconds: int, turn: int, fuller: bool) -> SceneClips:
        tasks = self.tasks if self.tasks is None else [*self.tasks, *self.in_turn[turn : turn + 1]]
        made, size = (FullerSceneClips, 2 * ENDLESS) if fuller else (SceneClips, ENDLESS)
        return made("train", size, num_frames=seconds, seed=self.seed, tasks=tasks, **self.options)


# --- what frames show ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stills:
    """What each of n frames shows, one row an object that is seen in it; picklable, 33 bytes an object.

    Attributes:
        frame: int32 [m], which frame it is in.
        quadrant, shape: uint8 [m], as in `SceneBatch`.
        colour: uint8 [m, 3].
        place: float64 [m, 3], centre x and y, and radius, shares of the frame's side.
        background: float32 [n, 5], as in `SceneBatch`.
    """

    frame: np.ndarray
    quadrant: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    place: np.ndarray
    background: np.ndarray

    @classmethod
    def from_scenes(cls, scenes: Sequence[Scene], scene: np.ndarray, times: np.ndarray) -> Stills:
        """Frames at times [n] in [0, 1) of the scenes numbered int64 [n]."""
        batch = SceneBatch.from_scenes(scenes)
        counts = np.bincount(batch.scene, minlength=batch.num_scenes)
        # a scene's objects lie one behind the other
        frame = np.repeat(np.arange(len(scene)), counts[scene])
        firsts = np.cumsum(counts[scene]) - counts[scene]
        item = np.arange(len(frame)) - firsts[frame] + (np.cumsum(counts) - counts)[scene[frame]]
        seen = batch.visible[item, slots_at(times)[frame]]
        frame, item = frame[seen], item[seen]
        objects = SceneBatch(
            len(scene),
            frame,
            batch.quadrant[item],
            batch.shape[item],
            batch.colour[item],
            batch.visible[item],
            batch.motion[item],
            batch.background[scene],
        )
        return cls(
            frame.astype(np.int32),
            objects.quadrant.astype(np.uint8),
            objects.shape.astype(np.uint8),
            objects.colour.astype(np.uint8),
            np.concatenate(objects.paths(times[frame][:, None]), 1),
            objects.background,
        )

    def as_scenes(self) -> SceneBatch:
        """Each frame as a scene in which nothing moves."""
        number = len(self.frame)
        motion = np.zeros((number, 11))
        motion[:, 1] = NUM_SLOTS  # disappears
        motion[:, [2, 3, 6]] = self.place
        motion[:, 7] = motion[:, 6]
        return SceneBatch(
            len(self.background),
            self.frame.astype(np.int64),
            self.quadrant.astype(np.int64),
            self.shape.astype(np.int64),
            self.colour.astype(np.float32),
            np.ones((number, NUM_SLOTS), dtype=bool),
            motion,
            self.background,
        )

    def pixel_values(self, device: torch.device, dtype: torch.dtype, longest_edge: int | None = None) -> Tensor:
        """The frames as the ordinary processor makes them: `[1, pictures, 3, pixels, pixels]` in -1..1."""
        size = longest_edge or PIXELS
        frames = draw(self.as_scenes(), [0.0], size=size, device=device)[:, 0].permute(0, 3, 1, 2)
        # subtracted first, as the processor does it: the last bit depends on that
        frames = frames.to(torch.float32, memory_format=torch.contiguous_format).sub_(127.5).div_(127.5)
        return tiles(frames).to(dtype)[None]


# --- batches ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2**15)
def sample(form: Form, start: float, end: float) -> tuple[int, ...]:
    """Places of the frames sampled from a span of a clip in memory, which is read at one frame a second."""
    times, length = np.arange(form.seconds, dtype=np.float64), float(form.seconds)
    indices, _, _ = select_frames(times, num_frames=form.num_frames, start=start, end=end, duration=length)
    return tuple(indices.tolist())


class Prompts:
    """Token ids of a clip's prompt, as the ordinary processor renders them, put together of parts of them.

    Args:
        processor: with `prompt_timestamps="file"`.

    Raises:
        ValueError: the processor's times count from each segment's start; or, when called, its tokenizer joins a
            frame's time with what stands before it.
    """

    def __init__(self, processor: Video2LoraProcessor) -> None:
        if processor.prompt_timestamps != "file":
            raise ValueError(f'prompt_timestamps={processor.prompt_timestamps!r}: expected "file".')
        self.processor = processor

    @lru_cache(maxsize=2**14)  # noqa: B019 - lives as long as the process
    def __call__(self, seconds: tuple[int, ...], length: int, longest_edge: int | None = None) -> Tensor:
        """Token ids `[1, tokens]` of frames at these seconds of a clip that lasts `length` seconds."""
        before, block, after = self._parts(len(seconds), length, longest_edge)
        frames = chain(*(self._stamp(second) + block for second in seconds))
        return torch.tensor([[*before, *frames, *after]])

    @lru_cache(maxsize=2**12)  # noqa: B019
    def _parts(self, num_frames: int, length: int, edge: int | None) -> tuple[list[int], list[int], list[int]]:
        """What stands before the first frame's time, a frame, and what stands behind the last one."""
        side, end = edge or 8, float(length)
        pixels = np.zeros((num_frames, side, side, 3), dtype=np.uint8)
        frames = VideoFrames(pixels, (0.0,) * num_frames, 0.0, end, end, "", None, (side, side), 0)
        inputs = self._processor(edge).encode_video(frames, image_splitting=edge is not None)
        ids, stamp = inputs["input_ids"][0].tolist(), self._stamp(0)
        around = self.processor.tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
        edges = [place for place, token in enumerate(ids) if token == around]
        before, end_of_last = ids[: edges[0] - len(stamp)], edges[-1] + 1
        size = (end_of_last - len(before)) // num_frames - len(stamp)
        block, after = ids[edges[0] : edges[0] + size], ids[end_of_last:]
        if before + (stamp + block) * num_frames + after != ids:
            raise ValueError(f"the prompt of {num_frames} frames is not its frames' one behind the other.")
        return before, block, after

    @lru_cache(maxsize=16)  # noqa: B019
    def _processor(self, edge: int | None) -> Video2LoraProcessor:
        if edge is None:
            return self.processor
        settings = {name: getattr(self.processor, name) for name in ("internalization_prompt", "prompt_timestamps")}
        return Video2LoraProcessor(build_processor(self.processor.tokenizer, edge), longest_edge=edge, **settings)

    @lru_cache(maxsize=2**12)  # noqa: B019
    def _stamp(self, second: int) -> list[int]:
        return self.processor.tokenizer(
            f"\nFrame from {second // 60:02d}:{second % 60:02d}:", add_special_tokens=False
        )["input_ids"]


class SceneCollator(Video2LoraCollator):
    """Batches as the library's collator makes them of [`FormedClips`], with `frames` in place of the pixels.

    Of the rows of a batch it takes as many as their form allows, and gives answers of more than `LONG_ANSWER` tokens
    the more weight: a query's loss is the mean of its tokens, which makes little of a caption's. `frames` are
    [`Stills`], whose `pixel_values` are those of `video_inputs`; `pixel_attention_mask`, of ones alone, is left out:
    the base takes nothing for ones. All turns about a clip lie in one row, and rows are padded to a multiple of
    `ALIGNED` tokens: few different shapes, since attention is planned anew for each.

    Args:
        processor: the model's.
    """

    ALIGNED = 32

    def __init__(self, processor: Video2LoraProcessor) -> None:
        super().__init__(processor, pack_queries=True)
        self.prompts = Prompts(processor)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.batch_of(rows[: rows[0]["form"].clips(len(rows))])
        answers = Labelled.of(batch["labels"], batch["turns"])
        lengths = torch.bincount(answers.queries, minlength=answers.num_queries)
        return batch | {"query_weights": batch["query_weights"] * (lengths / LONG_ANSWER).clamp_min(1.0)}

    def batch_of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of all these rows.

        Raises:
            ValueError: they have different forms.
        """
        forms = {row["form"] for row in rows}
        if len(forms) > 1:
            raise ValueError(f"a batch of {len(forms)} forms: batches must be blocks of `FormedClips`.")
        return super().__call__(rows) | {"longest_edge": rows[0]["form"].longest_edge}

    def _sample(
        self, row: Mapping[str, Any], queries: Sequence[tuple[int, Mapping[str, str]]], draw: random.Random
    ) -> dict[str, Any]:
        clip, form = row["video"], row["form"]
        edges = np.linspace(0.0, form.seconds, form.segments + 1).tolist()
        indices = [sample(form, *span) for span in zip(edges, edges[1:], strict=False)]
        ids = [self.prompts(seconds, form.seconds, form.longest_edge) for seconds in indices]
        return {
            "segments": [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids],
            "turns": [self._turn(query["prompt"], query["response"]) for _, query in queries],
            "query_ids": [(row["id"], number) for number, _ in queries],
            "scene": clip.scene,
            "times": frame_times(form.seconds)[np.concatenate(indices)],
        }

    def _turn(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """What the processor's `encode_turn` returns; this model's tokenizer joins no question with its answer."""
        asked, answered = self._asked(prompt), self._answered(response)
        return asked + answered, [IGNORE_INDEX] * len(asked) + answered

    @lru_cache(maxsize=2**14)  # noqa: B019
    def _asked(self, prompt: str) -> list[int]:
        return self.processor.tokenizer(self.processor.render(prompt), add_special_tokens=False)["input_ids"]

    @lru_cache(maxsize=2**14)  # noqa: B019
    def _answered(self, response: str) -> list[int]:
        end = self.processor.tokenizer.eos_token
        return self.processor.tokenizer(f" {response}{end}", add_special_tokens=False)["input_ids"]

    def _join(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        times = [sample["times"] for sample in samples]
        scene = np.repeat(np.arange(len(samples)), [len(part) for part in times])
        stills = Stills.from_scenes([sample["scene"] for sample in samples], scene, np.concatenate(times))
        return super()._join(samples) | {"frames": stills}

    def _pack_turns(self, videos: Sequence[Sequence[tuple[list[int], list[int]]]]) -> dict[str, Tensor]:
        lengths = [[len(ids) for ids, _ in turns] for turns in videos]
        width = -(-max(map(sum, lengths)) // self.ALIGNED) * self.ALIGNED
        real = torch.arange(width) < torch.tensor([sum(row) for row in lengths])[:, None]
        values = {
            "input_ids": (self.processor.pad_token_id, [t for turns in videos for ids, _ in turns for t in ids]),
            "attention_mask": (0, [1] * sum(map(sum, lengths))),
            "labels": (IGNORE_INDEX, [t for turns in videos for _, labels in turns for t in labels]),
            "turns": (0, [number for row in lengths for number, n in enumerate(row, 1) for _ in range(n)]),
        }
        fill = {name: torch.full(real.shape, empty) for name, (empty, _) in values.items()}
        return {name: fill[name].masked_scatter_(real, torch.tensor(numbers)) for name, (_, numbers) in values.items()}


class SceneTrainer(Video2LoraTrainer):
    """The library's trainer over [`FormedClips`], whose frames it draws where the model is.

    Evaluation, and training with the online teacher, which has to see the clips too, have the library's own batches.
    """

    def __init__(self, model: Video2LoraModel, args: Video2LoraTrainingArguments, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        if args.teacher != "online":
            self.train_collator = self.data_collator = SceneCollator(self.processor)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if "frames" in inputs:
            vlm: Any = self.accelerator.unwrap_model(self.model).vlm
            frames, edge = inputs.pop("frames"), inputs.pop("longest_edge")
            pixels = frames.pixel_values(self.args.device, vlm.dtype, edge)
            inputs["video_inputs"] = inputs["video_inputs"] | {"pixel_values": pixels}
        return inputs
