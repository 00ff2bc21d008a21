"""Command line: `video2lora demo`, a video becomes an adapter that answers, and what that saves."""

from __future__ import annotations

import shlex
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import check_is_there
from ._options import Device, Json
from ._output import check_output, directory_bytes, human_bytes, print_json, print_table, removed_on_failure
from ._terminal import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..modeling import Video2LoraModel, Video2LoraProcessor
    from ..pipelines import VideoToLoraPipeline

QUESTIONS = ["What moves in the video?", "Where does it go?", "Which colour has it?"]
SHAPES_QUESTIONS = ["describe the video.", "how many objects are there?"]  # in words that models of moving shapes know
SHAPES_TASKS = ("count", "motion", "position", "how_often", "order", "caption")
SHAPES_SEED, SHAPES_PIXELS = 749, 256  # a test clip of three objects and three events, about which all can be asked
REPEATS = 5
WIDTH = 110
LONGEST, LONGEST_NOISE = 96, 16  # tokens: a caption has 60 words; noise does not end
WAYS = {
    "adapter": "adapter, no visual tokens",
    "video_in_context": "video in context",
    "neither": "neither of the two",
}
NOISE = (
    "The weights are random: this shows how everything fits together, and the answers are noise. Give a trained "
    "checkpoint with --model to get answers that mean something."
)
ONLY_SHAPES = (
    "This model knows only moving shapes: of any other video its answers mean nothing. --model takes another one."
)


@dataclass(frozen=True)
class Asked:
    """A question, and its answer where the scene gives one."""

    prompt: str
    task: str | None = None
    right: str | None = None


def demo(
    video: Annotated[str | None, typer.Argument(help="A video; by default one is made.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint: Hub id or directory.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New directory that keeps the files.", show_default=False)
    ] = None,
    question: Annotated[list[str] | None, typer.Option(help="A question; give several.", show_default=False)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Longest answer, in tokens; by default {LONGEST}.", show_default=False)
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Turn a video into an adapter, ask questions both ways, and compare.

    Needs no network: without --model it uses the trained moving-shapes models, where they came with the installation,
    and otherwise a tiny random model. Without VIDEO it writes an H.264 clip of moving shapes and asks about that; a
    trained model's answers are marked: right is what is right word for word.
    """
    if model is not None:
        check_is_there(model)
    if output is not None:
        check_output(output)
    if video is not None:
        from ..video import probe_video

        probe_video(video)
    place: AbstractContextManager[Any] = (
        tempfile.TemporaryDirectory(prefix="video2lora-demo-") if output is None else removed_on_failure(output)
    )
    with place as folder:
        document = _run(Path(folder).resolve(), video, model, question, max_new_tokens, device)
    document["kept"] = None if output is None else str(output)
    if json:
        print_json(document)
    else:
        _show(document)


def _trained_example() -> str | None:
    """The trained moving-shapes checkpoint: of the installed package, or of the source checkout; if there is one."""
    package, source = Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[3]
    for path in (package / "data" / "moving_shapes" / "checkpoint", source / "examples" / "moving_shapes/checkpoint"):
        if (path / "config.json").is_file():
            return str(path)
    return None


def _run(
    folder: Path,
    video: str | None,
    model: str | None,
    given: list[str] | None,
    longest: int | None,
    device: str | None,
) -> dict[str, Any]:
    from ._models import load_pipeline

    box = _trained_example()
    trained = model or box
    if box and trained and Path(trained).resolve() != Path(box).resolve():
        box = None  # somebody's own model
    pipeline = load_pipeline(trained or str(_random_checkpoint(folder)), device=device)
    if box:
        # eight million parameters: there is nothing to gain from merging an adapter into rounded weights
        pipeline.model.vlm.float()
    own_clip = video is None
    questions: list[Asked] = []
    if video is None:
        video, questions = _moving_shapes(folder / "shapes")
        pipeline(video)  # warms up
    if given or not own_clip or not trained:  # noise is not marked
        questions = [Asked(prompt) for prompt in given or (SHAPES_QUESTIONS if box else QUESTIONS)]
    started = time.perf_counter()
    adapter: Any = pipeline(video)
    seconds = time.perf_counter() - started
    base = _save_bundled_base(pipeline, folder / "base")
    if base is not None:
        adapter = replace(adapter, provenance=replace(adapter.provenance, base_model=str(base)))
    adapter_folder = adapter.save_pretrained(folder / "adapter")
    longest = longest or (LONGEST if trained else LONGEST_NOISE)
    return {
        "random_weights": not trained,
        "only_moving_shapes": bool(box) and not own_clip,
        "model": trained,
        "video": Path(video).name,
        "device": str(pipeline.model.device),
        "frames": sum(segment.num_frames or 0 for segment in adapter.segments),
        "seconds_to_internalize": seconds,
        "adapter_rank": adapter.rank,
        "adapter_bytes": directory_bytes(adapter_folder),
        "base_kept": base is not None,
        **_ask_all_ways(pipeline, video, adapter_folder, base, questions, longest),
    }


def _ask_all_ways(
    pipeline: VideoToLoraPipeline, video: str, adapter: Path, base: Path | None, questions: list[Asked], longest: int
) -> dict[str, Any]:
    """Ask without anything, with the video in the context, and with the adapter: answers, tokens and times."""
    from peft import PeftModel

    from .ask import generate_answer

    whole, processor, prompts = pipeline.model, pipeline.processor, [asked.prompt for asked in questions]
    neither = [generate_answer(whole.vlm, processor, prompt, longest) for prompt in prompts]
    before = [_ask_about_video(whole, processor, video, prompt, longest) for prompt in prompts]
    seconds_before = _median_seconds(lambda: _ask_about_video(whole, processor, video, prompts[0], 1))
    # from here on nothing is ours but the files: base and adapter come off the disk, through transformers and PEFT
    vlm = whole.vlm if base is None else _load_bundled_base(base, whole)
    merged: Any = PeftModel.from_pretrained(vlm, str(adapter)).merge_and_unload()
    after = [generate_answer(merged, processor, prompt, longest) for prompt in prompts]
    seconds_after = _median_seconds(lambda: generate_answer(merged, processor, prompts[0], 1))
    ways = {"adapter": after, "video_in_context": before, "neither": neither}
    return {
        "visual_tokens": {"before": before[0]["visual_tokens"], "now": 0},
        "context_tokens": {"before": before[0]["context_tokens"], "now": after[0]["context_tokens"]},
        "seconds_to_first_token": {"before": seconds_before, "now": seconds_after},
        "answers": [_answer(asked, i, ways) for i, asked in enumerate(questions)],
    }


def _moving_shapes(folder: Path) -> tuple[str, list[Asked]]:
    """Write a clip of moving shapes that no training has seen; its path, and questions with their answers."""
    from ..data.moving_shapes import MovingShapes, write_moving_shapes

    rows = write_moving_shapes(folder, "test", 1, seed=SHAPES_SEED, pixels=SHAPES_PIXELS, tasks=SHAPES_TASKS)
    shapes = MovingShapes("test", 1, seed=SHAPES_SEED, tasks=SHAPES_TASKS)
    scene = shapes.scene(0)
    queries = shapes.queries(scene)
    return str(rows.parent / "videos" / f"{scene.id}.mp4"), [Asked(q.prompt, q.task, q.response) for q in queries]


def _answer(asked: Asked, index: int, ways: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One question with the answers of all ways, and which of them are right, where that is known."""
    answers: dict[str, Any] = {way: given[index]["answer"] for way, given in ways.items()}
    found: dict[str, Any] = {"question": asked.prompt} | answers
    if asked.right is not None:
        from ..evaluation.metrics_text import exact_match

        right = {way: exact_match(answer, [asked.right]) == 1 for way, answer in answers.items()}
        found |= {"task": asked.task, "right_answer": asked.right, "right": right}
    return found


def _save_bundled_base(pipeline: VideoToLoraPipeline, folder: Path) -> Path | None:
    """Write the base of a bundled checkpoint as transformers has it, so that an adapter of it can be used alone."""
    if not pipeline.model.config.bundle_base:
        return None
    pipeline.model.vlm.save_pretrained(folder)
    pipeline.processor.vlm_processor.save_pretrained(folder)
    return folder


def _load_bundled_base(folder: Path, model: Video2LoraModel) -> PreTrainedModel:
    from transformers import AutoModelForImageTextToText

    vlm: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=model.vlm.dtype)
    return vlm.to(model.device)


def _random_checkpoint(folder: Path) -> Path:
    """A tiny random SmolVLM and a hypernetwork for it whose adapters change something, as a checkpoint."""
    import torch

    from ..modeling import Video2LoraModel, Video2LoraProcessor
    from ..testing import save_tiny_vlm

    base = save_tiny_vlm("smolvlm", folder / "base")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Video2LoraModel.from_vlm(
            base, rank=4, latent_size=32, num_blocks=2, perceiver_num_heads=4, perceiver_num_key_value_heads=2,
            perceiver_head_dim=16, num_frames=8, longest_edge=64,
        )  # fmt: skip
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.constant_(scaler, 1.0)  # a fresh one is 0, and its adapters change nothing
    model.save_pretrained(folder / "checkpoint")
    Video2LoraProcessor.from_config(model.config).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


def _ask_about_video(
    model: Video2LoraModel, processor: Video2LoraProcessor, video: str, question: str, max_new_tokens: int
) -> dict[str, Any]:
    """Answer with the video in the context, from the file on: decode, preprocess, generate."""
    import torch

    inputs = processor.encode_video(processor.load_video(video), question, add_generation_prompt=True)
    length, visual_tokens = inputs["input_ids"].shape[1], processor.count_visual_tokens(inputs["input_ids"])
    vlm: Any = model.vlm
    moved = {k: v.to(vlm.device, vlm.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    with torch.inference_mode():
        tokens = vlm.generate(
            **moved, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=processor.pad_token_id
        )[0, length:]
    answer = processor.decode(tokens, skip_special_tokens=True).strip()
    return {"answer": answer, "context_tokens": length, "visual_tokens": visual_tokens}


def _median_seconds(run: Callable[[], object]) -> float:
    """Median of a few runs; what ran before has warmed up. Each ends with text, so that no device is still busy."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _show(document: dict[str, Any]) -> None:
    if document["random_weights"]:
        typer.echo(f"{NOISE}\n")
    if document["only_moving_shapes"]:
        typer.echo(f"{ONLY_SHAPES}\n")
    for entry in document["answers"]:
        _show_answers(entry)
    visual, context = document["visual_tokens"], document["context_tokens"]
    seconds = {key: f"{1000 * value:.1f} ms" for key, value in document["seconds_to_first_token"].items()}
    rows: list[tuple[object, ...]] = [
        ("frames", document["frames"], 0),
        ("visual tokens in context", visual["before"], visual["now"]),
        ("context tokens", context["before"], context["now"]),
        ("time to first token", seconds["before"], seconds["now"]),
        ("video to adapter, once", "-", f"{1000 * document['seconds_to_internalize']:.1f} ms"),
        ("adapter on disk", "-", f"{human_bytes(document['adapter_bytes'])}, rank {document['adapter_rank']}"),
    ]
    graded = [entry["right"] for entry in document["answers"] if "right" in entry]
    if graded:
        counts = [f"{sum(right[way] for right in graded)} of {len(graded)}" for way in ("video_in_context", "adapter")]
        rows.append(("right answers", *counts))
    print_table(["", "video in context", "adapter"], rows, f"{document['video']} on {document['device']}")
    typer.echo("\nThe adapter was written to disk, and PeftModel.from_pretrained read it from there to answer.")
    if document["kept"]:
        adapter, base = Path(document["kept"]) / "adapter", Path(document["kept"]) / "base"
        if document["base_kept"]:
            load = f'PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("{base}"), "{adapter}")'
            typer.echo(f"It is kept, with its base: {load}")
        else:
            typer.echo("It is kept.")
        words = ["video2lora", "ask", str(adapter), document["answers"][0]["question"]]
        typer.echo(f"Ask it more: {shlex.join(words)}")
    else:
        typer.echo("Keep it, with the clip, by --output DIRECTORY.")


def _show_answers(entry: dict[str, Any]) -> None:
    """A question, the right answer and what each way says: long answers go on under themselves."""
    typer.echo(printable(entry["question"]))
    lines = [(label, entry[way], entry["right"][way] if "right" in entry else None) for way, label in WAYS.items()]
    if "right" in entry:
        lines.insert(0, ("right answer", entry["right_answer"], None))
    wide = max(map(len, WAYS.values()))
    for label, answer, right in lines:
        head = f"  {label.ljust(wide)}  {_mark(right)} "
        text = printable(answer.replace("\n", " ")) or "(nothing)"
        typer.echo(textwrap.fill(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)))
    typer.echo()


def _mark(right: bool | None) -> str:
    """A tick or a cross; a letter where the terminal's encoding has no such sign."""
    sign, letter = (" ", " ") if right is None else ("✓", "y") if right else ("✗", "n")
    try:
        sign.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return letter
    return sign
