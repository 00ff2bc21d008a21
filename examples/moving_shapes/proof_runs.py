"""Moving shapes, stage 3: what is run, on how many clips, and within which margins; written before any run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from batches import TURN
from small_vlm import PIXELS, build_processor
from torch import Tensor

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.data.moving_shapes import NUM_SLOTS, MovingShapes, Query, Scene, make_queries, questions_across
from video2lora.data.moving_shapes.dataset import SceneClip, question_fields
from video2lora.evaluation.benchmarks import BENCHMARKS, Benchmark
from video2lora.evaluation.conditions import CONDITIONS, Condition
from video2lora.evaluation.samples import Question, Sample
from video2lora.video import VideoFrames

MARGIN = 0.02  # of exact match: the largest difference to the video in context that does not matter
LOSS = 0.03  # of exact match: what an adapter may lose from its accuracy at 12 frames
KEPT = 0.97  # of the whole video's adapter's accuracy: what a composed one has to keep
ENOUGH = 500  # decided questions of a task, below which a loss is shown but not claimed
LEARNT = 0.95  # accuracy of the VLM with the video in context, below which it is no teacher
ALPHA = 0.025
METRICS = ("exact_match", "repetition", "empty", "unended")
CLIPS = 4000  # of which about 2,100 have an order question, and all others more
BOTH = ("video", "adapter")
GROUP, GROUP_PICTURES = 1000, 98_304  # clips, and pictures of 64 pixels, that are ready at once: 4.8 GB of them
QUESTIONS = 11  # of a clip, at most


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        split: of the benchmark; "phrasings" is "test" in words that no hypernetwork was trained on.
        num_frames: sampled of each clip.
        conditions: names, as the records have them.
        clips: how many.
        clip_frames: of a clip, where it has to have more than are sampled.
        across: order questions whose two events lie in different ones of so many segments, and no others.
        longest_edge: give the frames as pictures of this size, cut into tiles of 64.
    """

    split: str = "test"
    num_frames: int = NUM_SLOTS
    conditions: tuple[str, ...] = BOTH
    clips: int = CLIPS
    clip_frames: int | None = None
    across: int | None = None
    longest_edge: int | None = None

    @property
    def length(self) -> int:
        """Frames of a clip: a multiple of 12, so that 12 sampled ones see all its slots."""
        return self.clip_frames or -(-self.num_frames // NUM_SLOTS) * NUM_SLOTS

    @property
    def pictures(self) -> int:
        """Pictures of 64 pixels that are prepared of a clip, for all conditions together."""
        tiles = 1 if (self.longest_edge or 0) <= PIXELS else ((self.longest_edge or 0) // PIXELS) ** 2 + 1
        segments = {segments_of(name)[0] for name in self.conditions} - {1}
        return self.num_frames * (tiles + sum(segments))

    @property
    def group(self) -> int:
        """Clips whose questions share batches: what memory allows."""
        return max(1, min(GROUP, GROUP_PICTURES // self.pictures))

    @property
    def shards(self) -> list[range]:
        """Clips by number, in parts that processes take one by one: a group each."""
        number = -(-self.clips // self.group)
        return [range(self.clips * i // number, self.clips * (i + 1) // number) for i in range(number)]

    def cost(self, clips: range) -> float:
        """About how long a shard takes, to begin with the longest; milliseconds of one core."""
        return len(clips) * (0.5 * self.pictures + (20 + 0.25 * self.num_frames) * len(self.conditions))


def backwards(segments: int) -> str:
    """The condition that composes the segments in the wrong order."""
    return f"adapter_segment_{'_'.join(str(n) for n in range(segments, 0, -1))}_of_{segments}"


def across(segments: int) -> Run:
    """Order questions across segments: composed, composed backwards, and the first segment alone."""
    names = ("adapter", f"adapter_{segments}_segments", backwards(segments), f"adapter_segment_1_of_{segments}")
    return Run(conditions=("video", *names), clip_frames=96, across=segments)


COMPOSED = ("adapter_2_segments", "adapter_4_segments", "adapter_8_segments")
FRAMES = {4: CLIPS, 8: CLIPS, 24: CLIPS, 48: CLIPS, 96: CLIPS, 256: 2000, 1024: 1000}
PICTURES = (32, 64, 128, 256)
SEGMENTS = (2, 4, 8)
RUNS: dict[str, Run] = {
    "main": Run(conditions=("video", "adapter", "no_adapter", "other_adapter", "caption")),
    "phrasings": Run("phrasings"),
    "combinations": Run("combinations"),
    **{f"frames_{n}": Run(num_frames=n, clips=clips) for n, clips in FRAMES.items()},
    **{f"pixels_{n}": Run(longest_edge=n) for n in PICTURES},
    "composition": Run(
        conditions=(*BOTH, *COMPOSED, backwards(2), "adapter_segment_1_of_2", "adapter_segment_2_of_2"), clip_frames=96
    ),
    **{f"across_{n}": across(n) for n in SEGMENTS},
}


def segments_of(name: str) -> tuple[int, list[int]]:
    """Into how many segments a condition cuts the clip, and which of them it keeps, in order."""
    if name.startswith("adapter_segment_"):
        kept, _, parts = name.removeprefix("adapter_segment_").partition("_of_")
        return int(parts), [int(part) - 1 for part in kept.split("_")]
    if name.endswith("_segments"):
        parts = name.split("_")[1]
        return int(parts), list(range(int(parts)))
    return 1, [0]


def make_condition(name: str, model: Video2LoraModel, processor: Video2LoraProcessor) -> Condition:
    """A condition by the name that it has in the records."""
    kind: Any = CONDITIONS[name.split("_")[0] if name.startswith("adapter_") else name]
    if name == "caption":
        return kind(model, processor, prompt="describe the video.", max_new_tokens=96)
    segments, kept = segments_of(name)
    return kind(model, processor, segments=segments, keep_segments=kept) if segments > 1 else kind(model, processor)


def benchmark_of(run: Run, clips: range | None = None) -> Benchmark:
    """The clips of a run, or some of them by number, with everything that is asked about them."""
    spec, samples = BENCHMARKS["moving_shapes"], []
    numbers = range(run.clips) if clips is None else clips
    asked = clips_of(run, numbers.start)
    for _ in numbers:
        scene, queries = next(asked)
        questions = tuple(Question(**question_fields(scene, i, query)) for i, query in enumerate(queries))
        samples.append(Sample(scene.id, SceneClip(scene, run.length, run.longest_edge or PIXELS), questions))
    number = sum(len(sample.questions) for sample in samples)
    return Benchmark(spec, tuple(samples), run.split, spec.seed, number)


def clips_of(run: Run, start: int = 0) -> Iterator[tuple[Scene, list[Query]]]:
    """Scenes from a number on with what is asked about them, without end.

    Every 100th number starts a clip of questions across segments, which few scenes have: so parts never meet.
    """
    split = "test" if run.split == "phrasings" else run.split
    shapes = MovingShapes(split, 10**9, seed=BENCHMARKS["moving_shapes"].seed)
    for index in range(start if run.across is None else 100 * start, 10**9):
        scene = shapes.scene(index)
        queries = queries_of(run, scene)
        if queries:
            yield scene, queries


def queries_of(run: Run, scene: Scene) -> list[Query]:
    """What a run asks about a scene, in order."""
    if run.across is not None:
        return questions_across(scene, run.across)[:1]
    return make_queries(scene, phrasings=("held_out" if run.split == "phrasings" else "train",))


def processor_of(checkpoint: str, run: Run) -> ShapesProcessor:
    """The checkpoint's processor with the settings of a run."""
    processor = Video2LoraProcessor.from_pretrained(checkpoint)
    return ShapesProcessor.of(processor, run.num_frames, run.longest_edge)


class ShapesProcessor(Video2LoraProcessor):
    """The ordinary processor, faster: a clip is rendered once, and its further questions are put behind it.

    This model's tokenizer never joins the text before a question with the question. (A test holds it against the
    ordinary processor.) With `pictures`, frames are given as pictures that are cut into tiles.
    """

    pictures = False
    _last: tuple[VideoFrames, dict[str, Tensor]] | None = None

    @classmethod
    def of(cls, processor: Video2LoraProcessor, num_frames: int, longest_edge: int | None) -> ShapesProcessor:
        """The same processor for so many frames, as pictures of `longest_edge` pixels if that is given."""
        settings = {name: getattr(processor, name) for name in ("internalization_prompt", "prompt_timestamps")}
        edge = longest_edge or PIXELS
        made = cls(build_processor(processor.tokenizer, edge), num_frames=num_frames, longest_edge=edge, **settings)
        made.pictures = longest_edge is not None
        return made

    def encode_video(
        self,
        video: VideoFrames,
        prompt: str | None = None,
        add_generation_prompt: bool = False,
        image_splitting: bool = False,
    ) -> dict[str, Tensor]:
        splitting = image_splitting or self.pictures
        if prompt is None:
            inputs = super().encode_video(video, None, add_generation_prompt, splitting)
            self._last = None if add_generation_prompt else (video, inputs)
            return inputs
        if self._last is None or self._last[0] is not video or not add_generation_prompt:
            return super().encode_video(video, prompt, add_generation_prompt, splitting)
        inputs = self._last[1]
        ids = inputs["input_ids"][0]
        own = self._tokenize(f"\n\n{self.internalization_prompt}{TURN.removesuffix('Assistant:')}")
        if ids[-len(own) :].tolist() != own:
            return super().encode_video(video, prompt, add_generation_prompt, splitting)
        asked = torch.tensor(self._tokenize(f"\n\n{prompt}{TURN}"))
        whole = torch.cat([ids[: -len(own)], asked])[None]
        changed: dict[str, Any] = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        return inputs | changed
