"""Command line: `video2lora demo`, a video becomes an adapter that answers, and what that saves."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import Device, Json
from ._output import check_output, directory_bytes, human_bytes, print_json, print_table, removed_on_failure

if TYPE_CHECKING:
    from ..modeling import Video2LoraModel, Video2LoraProcessor

QUESTIONS = ["What moves in the video?", "Where does it go?", "Which colour has it?"]
REPEATS = 5
NOISE = (
    "The weights are random: this shows how everything fits together, and the answers are noise. Give a trained "
    "checkpoint with --model to get answers that mean something."
)


def demo(
    video: Annotated[str | None, typer.Argument(help="A video; by default one is made.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint: Hub id or directory.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New directory that keeps the files.", show_default=False)
    ] = None,
    question: Annotated[list[str] | None, typer.Option(help="A question; give several.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 16,
    device: Device = None,
    json: Json = False,
) -> None:
    """Turn a video into an adapter, ask questions both ways, and compare.

    Needs no network: without --model it uses the trained example checkpoint of a source checkout where there is one,
    and otherwise a tiny random model.
    """
    if output is not None:
        check_output(output, overwrite=False, replaceable=lambda _: False, kind="")
    if video is not None:
        from ..video import probe_video

        probe_video(video)
    model = model or _trained_example()
    place: AbstractContextManager[Any] = (
        tempfile.TemporaryDirectory(prefix="video2lora-demo-") if output is None else removed_on_failure(output)
    )
    with place as folder:
        document = _run(Path(folder), video, model, question or QUESTIONS, max_new_tokens, device)
    document["kept"] = None if output is None else str(output)
    if json:
        print_json(document)
    else:
        _show(document)


def _trained_example() -> str | None:
    """The checkpoint in `examples` of a source checkout, where there is one."""
    path = Path(__file__).resolve().parents[3] / "examples" / "moving_shapes" / "checkpoint"
    return str(path) if (path / "config.json").exists() else None


def _run(
    folder: Path, video: str | None, model: str | None, questions: list[str], max_new_tokens: int, device: str | None
) -> dict[str, Any]:
    from peft import PeftModel

    from ..testing import tiny_clip
    from ._models import load_pipeline
    from .ask import generate_answer

    if video is None:
        video = str(tiny_clip(folder / "clip.mp4", seconds=4, size=(320, 240)))
    name = model or str(_random_checkpoint(folder))
    pipeline = load_pipeline(name, device=device)
    adapter: Any = pipeline(video)
    adapter_folder = adapter.save_pretrained(folder / "adapter")
    whole, processor = pipeline.model, pipeline.processor

    neither = [generate_answer(whole.vlm, processor, question, max_new_tokens) for question in questions]
    before = [_ask_about_video(whole, processor, video, question, max_new_tokens) for question in questions]
    seconds_before = _median_seconds(lambda: _ask_about_video(whole, processor, video, questions[0], 1))
    # from here on nothing is ours but the files: the adapter comes off the disk, through PEFT
    merged: Any = PeftModel.from_pretrained(whole.vlm, str(adapter_folder)).merge_and_unload()
    after = [generate_answer(merged, processor, question, max_new_tokens) for question in questions]
    seconds_after = _median_seconds(lambda: generate_answer(merged, processor, questions[0], 1))
    return {
        "random_weights": model is None,
        "model": model,
        "video": Path(video).name,
        "device": str(whole.device),
        "frames": sum(segment.num_frames or 0 for segment in adapter.segments),
        "visual_tokens": {"before": before[0]["visual_tokens"], "now": 0},
        "context_tokens": {"before": before[0]["context_tokens"], "now": after[0]["context_tokens"]},
        "seconds_to_first_token": {"before": seconds_before, "now": seconds_after},
        "adapter_rank": adapter.rank,
        "adapter_bytes": directory_bytes(adapter_folder),
        "answers": [
            {"question": q, "video_in_context": b["answer"], "adapter": a["answer"], "neither": n["answer"]}
            for q, b, a, n in zip(questions, before, after, neither, strict=True)
        ],
    }


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
    visual, context = document["visual_tokens"], document["context_tokens"]
    seconds = {key: f"{1000 * value:.1f} ms" for key, value in document["seconds_to_first_token"].items()}
    if document["random_weights"]:
        typer.echo(f"{NOISE}\n")
    rows = [
        ("frames", document["frames"], 0),
        ("visual tokens in context", visual["before"], visual["now"]),
        ("context tokens", context["before"], context["now"]),
        ("time to first token", seconds["before"], seconds["now"]),
        ("adapter on disk", "-", f"{human_bytes(document['adapter_bytes'])}, rank {document['adapter_rank']}"),
    ]
    print_table(["", "video in context", "adapter"], rows, f"{document['video']} on {document['device']}")
    typer.echo()
    answers = [
        (entry["question"], *(repr(entry[key]) for key in ("video_in_context", "adapter", "neither")))
        for entry in document["answers"]
    ]
    print_table(["question", "video in context", "adapter", "neither"], answers)
    if document["kept"]:
        kept = Path(document["kept"])
        typer.echo(f'\nThe adapter is kept. Ask it more: video2lora ask {kept / "adapter"} "What moves?"')
