"""Moving shapes, stage 3: answer held-out questions in every condition, and write down what came out.

    python prove.py run CHECKPOINT -o runs/proof --only main frames_4   (all runs by default; goes on where it stopped)
    python prove.py report runs/proof -o results.md

What is run, on how many clips, and within which margin, stands in `RUNS`, before any run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from results import write_results
from small_vlm import build_processor
from torch import Tensor

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.data.moving_shapes import MovingShapes, Query, Scene, make_queries, questions_across
from video2lora.data.moving_shapes.dataset import SceneClip, question_fields
from video2lora.evaluation.benchmarks import BENCHMARKS, Benchmark, load_benchmark
from video2lora.evaluation.conditions import CONDITIONS, Condition, Decoding
from video2lora.evaluation.runner import evaluate_model
from video2lora.evaluation.samples import Question, Sample

MARGIN = 0.02  # of exact match
CLIPS = 4000  # of which about 2,100 have an order question, and all others more
METRICS = ("exact_match", "repetition", "empty", "unended")
BOTH = ("video", "adapter")


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        split: of the benchmark.
        num_frames: sampled of each clip.
        conditions: names of `conditions`.
        clips: how many.
        clip_frames: of a clip, where it has to have more than are sampled.
        across: order questions whose two events lie in different ones of so many segments, and no others.
        longest_edge: give the frames as pictures of this size, cut into tiles of 64.
    """

    split: str = "test"
    num_frames: int = 12
    conditions: tuple[str, ...] = BOTH
    clips: int = CLIPS
    clip_frames: int | None = None
    across: int | None = None
    longest_edge: int | None = None


SEGMENTS = ("adapter", "adapter_2_segments", "adapter_4_segments", "adapter_8_segments", "adapter_segment_1_of_2")
RUNS: dict[str, Run] = {
    "main": Run(conditions=("video", "adapter", "no_adapter", "other_adapter", "caption")),
    "phrasings": Run("phrasings"),
    "combinations": Run("combinations"),
    **{f"frames_{n}": Run(num_frames=n) for n in (4, 8, 24, 48, 96, 256, 1024)},
    **{f"pixels_{n}": Run(longest_edge=n) for n in (32, 64, 128, 256)},
    "composition": Run(conditions=("video", *SEGMENTS), clip_frames=96),
    **{f"across_{n}": Run(conditions=("video", *SEGMENTS), clip_frames=96, across=n) for n in (2, 4, 8)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("checkpoint")
    run.add_argument("-o", "--output", type=Path, required=True)
    run.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    run.add_argument("--clips", type=int, help="another number of clips than declared: for trying out")
    run.add_argument("--batch-size", type=int, default=512, help="questions answered together")
    run.add_argument("--workers", type=int, default=8)
    report = commands.add_parser("report")
    report.add_argument("runs", type=Path)
    report.add_argument("-o", "--output", type=Path, default=Path("results.md"))
    options = parser.parse_args()
    if options.command == "report":
        write_results(options.runs, RUNS, MARGIN, options.output)
        return
    model = load(options.checkpoint)
    for name in options.only:
        declared = RUNS[name] if options.clips is None else replace(RUNS[name], clips=options.clips)
        answer(model, options.checkpoint, declared, options.output / name, options.batch_size, options.workers)


def load(checkpoint: str) -> Video2LoraModel:
    """The trained model, in bfloat16 where there is a GPU."""
    on_gpu = torch.cuda.is_available()
    model = Video2LoraModel.from_pretrained(checkpoint, dtype=torch.bfloat16 if on_gpu else torch.float32)
    return model.to("cuda" if on_gpu else "cpu").eval()


def answer(model: Video2LoraModel, checkpoint: str, run: Run, output: Path, batch_size: int, workers: int) -> None:
    """Do one run; its folder has the records and `run.json`."""
    processor = Video2LoraProcessor.from_pretrained(checkpoint)
    processor.num_frames = run.num_frames
    if run.longest_edge is not None:
        processor = PicturesProcessor.of(processor, run.longest_edge)
    evaluate_model(
        model,
        processor,
        benchmark_of(run),
        [make_condition(name, model, processor) for name in run.conditions],
        output,
        decoding=Decoding(max_new_tokens=96, batch_size=batch_size),
        metrics=METRICS,
        margins={"exact_match": MARGIN},
        num_workers=workers,
    )


def make_condition(name: str, model: Video2LoraModel, processor: Video2LoraProcessor) -> Condition:
    """A condition by the name that it has in the records."""
    if name == "caption":
        return CONDITIONS[name](model, processor, prompt="describe the video.", max_new_tokens=96)
    if name.endswith("_segments"):
        return CONDITIONS["adapter"](model, processor, segments=int(name.split("_")[1]))
    if name.startswith("adapter_segment_"):
        part, parts = name.removeprefix("adapter_segment_").split("_of_")
        return CONDITIONS["adapter"](model, processor, segments=int(parts), keep_segments=[int(part) - 1])
    return CONDITIONS[name](model, processor)


def benchmark_of(run: Run) -> Benchmark:
    """The clips and questions of a run."""
    if run.across is None and run.longest_edge is None:
        frames = run.clip_frames or run.num_frames
        return load_benchmark("moving_shapes", split=run.split, num_samples=run.clips, num_frames=frames)
    spec = BENCHMARKS["moving_shapes"]
    samples = []
    pixels, length = run.longest_edge or 64, run.clip_frames or 12
    for scene, queries in clips_of(run):
        questions = tuple(Question(**question_fields(scene, i, query)) for i, query in enumerate(queries))
        samples.append(Sample(scene.id, SceneClip(scene, length, pixels), questions))
        if len(samples) == run.clips:
            break
    number = sum(len(sample.questions) for sample in samples)
    return Benchmark(spec, tuple(samples), run.split, spec.seed, number)


def clips_of(run: Run) -> Iterator[tuple[Scene, list[Query]]]:
    """Test scenes with what is asked about them, without end."""
    shapes = MovingShapes("test", 10**9, seed=BENCHMARKS["moving_shapes"].seed)
    for index in range(10**9):
        scene = shapes.scene(index)
        queries = make_queries(scene) if run.across is None else questions_across(scene, run.across)[:1]
        if queries:
            yield scene, queries


class PicturesProcessor(Video2LoraProcessor):
    """Gives frames as pictures that are cut into tiles, instead of as a video of one tile a frame."""

    @classmethod
    def of(cls, processor: Video2LoraProcessor, longest_edge: int) -> PicturesProcessor:
        """The same processor for pictures of `longest_edge` pixels."""
        settings = {name: getattr(processor, name) for name in ("num_frames", "internalization_prompt")}
        return cls(build_processor(processor.tokenizer, longest_edge), longest_edge=longest_edge, **settings)

    def encode_video(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return super().encode_video(*args, **kwargs | {"image_splitting": True})


if __name__ == "__main__":
    main()
