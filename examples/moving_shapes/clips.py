"""Moving shapes, stage 2's data: the library's batches, whose frames are drawn where the model is.

Drawing and preparing 12 to 96 frames of each of 256 clips keeps several cores busy for as long as a GPU takes for a
step. Here a data loader's worker only says what each frame shows, and the trainer draws. (A test holds the batches
against those of the library's own collator.)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from small_vlm import PIXELS
from torch import Tensor

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.data.moving_shapes import NUM_SLOTS, MovingShapes, Scene, SceneBatch, draw, frame_times
from video2lora.data.moving_shapes.dataset import SceneClip
from video2lora.data.moving_shapes.scenes import slots_at
from video2lora.trainer import Video2LoraTrainer, Video2LoraTrainingArguments
from video2lora.trainer.collator import Video2LoraCollator
from video2lora.video import VideoFrames
from video2lora.video.sampling import select_frames


class SceneClips(MovingShapes):
    """Rows whose frames are not drawn yet: `video` is a [`SceneClip`], which any reader of arrays draws."""

    def video(self, scene: Scene) -> Any:
        return SceneClip(scene, self.num_frames, self.pixels)


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

    def pixel_values(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The frames as the ordinary processor makes them: `[1, frames, 3, pixels, pixels]` in -1..1."""
        frames = draw(self.as_scenes(), [0.0], size=PIXELS, device=device)[:, 0].permute(0, 3, 1, 2)
        # subtracted first, as the processor does it: the last bit depends on that
        return frames.to(torch.float32, memory_format=torch.contiguous_format).sub_(127.5).div_(127.5).to(dtype)[None]


# --- batches ---------------------------------------------------------------------------------------------------------


class Sampled(NamedTuple):
    """Frames sampled from a clip: places in it, and the span in seconds."""

    indices: tuple[int, ...]
    start: float
    end: float


@lru_cache(maxsize=2**15)
def sample(length: int, num_frames: int, start: float | None, end: float | None) -> Sampled:
    """Sample a span of a clip of `length` frames in memory, which are read at one a second."""
    indices, start, end = select_frames(
        np.arange(length, dtype=np.float64), num_frames=num_frames, start=start, end=end, duration=float(length)
    )
    return Sampled(tuple(indices.tolist()), start, end)


class ClipReader:
    """A `VideoReader` of a clip that is not drawn: it tells which frames it would read."""

    def __init__(self, length: int) -> None:
        self.length, self.times = length, np.arange(length, dtype=np.float64)

    def sample(self, *, num_frames: int, start: float | None = None, end: float | None = None) -> Sampled:
        """As `VideoReader.sample`."""
        return sample(self.length, num_frames, start, end)


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
    def __call__(self, seconds: tuple[int, ...], length: int) -> Tensor:
        """Token ids `[1, tokens]` of frames at these seconds of a clip that lasts `length` seconds."""
        before, block, after = self._parts(len(seconds), length)
        frames = chain(*(self._stamp(second) + block for second in seconds))
        return torch.tensor([[*before, *frames, *after]])

    @lru_cache(maxsize=2**12)  # noqa: B019
    def _parts(self, num_frames: int, length: int) -> tuple[list[int], list[int], list[int]]:
        """What stands before the first frame's time, a frame, and what stands behind the last one."""
        pixels, end = np.zeros((num_frames, 8, 8, 3), dtype=np.uint8), float(length)
        frames = VideoFrames(pixels, (0.0,) * num_frames, 0.0, end, end, "", None, (8, 8), 0)
        ids = self.processor.encode_video(frames)["input_ids"][0].tolist()
        around = self.processor.tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
        edges = [place for place, token in enumerate(ids) if token == around]
        stamp = self._stamp(0)
        before, block = ids[: edges[0] - len(stamp)], ids[edges[0] : edges[1] + 1]
        after = ids[edges[-1] + 1 :]
        if before + (stamp + block) * num_frames + after != ids:
            raise ValueError(f"the prompt of {num_frames} frames is not its frames' one behind the other.")
        return before, block, after

    @lru_cache(maxsize=2**12)  # noqa: B019
    def _stamp(self, second: int) -> list[int]:
        return self.processor.tokenizer(
            f"\nFrame from {second // 60:02d}:{second % 60:02d}:", add_special_tokens=False
        )["input_ids"]


class SceneCollator(Video2LoraCollator):
    """Batches as the library's collator makes them of [`SceneClips`], with `frames` in place of the pixels.

    What is drawn by chance is the same. `frames` are [`Stills`], whose `pixel_values` are those of `video_inputs`;
    `pixel_attention_mask`, of ones alone, is left out: the base takes nothing for ones.

    Args:
        processor, options: of [`Video2LoraCollator`].
    """

    def __init__(self, processor: Video2LoraProcessor, **options: Any) -> None:
        super().__init__(processor, **options)
        self.prompts = Prompts(processor)

    def _sample(
        self, row: Mapping[str, Any], queries: Sequence[tuple[int, Mapping[str, str]]], draw: random.Random
    ) -> dict[str, Any]:
        clip: SceneClip = row["video"]
        reader: Any = ClipReader(len(clip))
        _, segments = self._read(reader, row, draw)
        sampled: Sequence[Any] = segments
        indices = [segment.indices for segment in sampled]
        ids = [self.prompts(seconds, len(clip)) for seconds in indices]
        return {
            "segments": [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids],
            "turns": [self._turn(query["prompt"], query["response"]) for _, query in queries],
            "query_ids": [(row["id"], number) for number, _ in queries],
            "scene": clip.scene,
            "times": frame_times(len(clip))[np.concatenate(indices)],
        }

    @lru_cache(maxsize=2**14)  # noqa: B019
    def _turn(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        return self.processor.encode_turn(prompt, response)

    def _join(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        times = [sample["times"] for sample in samples]
        scene = np.repeat(np.arange(len(samples)), [len(part) for part in times])
        stills = Stills.from_scenes([sample["scene"] for sample in samples], scene, np.concatenate(times))
        return super()._join(samples) | {"frames": stills}


class SceneTrainer(Video2LoraTrainer):
    """The library's trainer over [`SceneClips`], whose frames it draws where the model is.

    Evaluation, and training with the online teacher, which has to see the clips too, have the library's own batches.
    """

    def __init__(self, model: Video2LoraModel, args: Video2LoraTrainingArguments, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        if args.teacher != "online":
            self.train_collator = self.data_collator = SceneCollator(
                self.processor,
                seed=args.seed,
                composition_probability=args.composition_probability,
                max_segments=args.max_segments,
                max_queries_per_video=args.max_queries_per_video,
                num_frames_range=args.num_frames_range,
                pack_queries=args.pack_queries,
            )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if "frames" in inputs:
            vlm: Any = self.accelerator.unwrap_model(self.model).vlm
            pixels = inputs.pop("frames").pixel_values(self.args.device, vlm.dtype)
            inputs["video_inputs"] = inputs["video_inputs"] | {"pixel_values": pixels}
        return inputs
