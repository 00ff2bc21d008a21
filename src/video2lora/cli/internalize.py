"""Command line: `video2lora internalize`, from video files to adapter directories."""

from __future__ import annotations

import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from ._errors import CommandError
from ._options import Device, Dtype, DtypeOption, Json, Layout, LayoutOption, Output, Overwrite, torch_dtype
from ._output import check_output, directory_bytes, human_bytes, print_json, print_table, progress

if TYPE_CHECKING:
    from ..adapters import VideoAdapter


def internalize(
    videos: Annotated[list[str], typer.Argument(help="Video files or URLs.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint: Hub id or directory.", show_default=False)],
    output: Output,
    num_frames: Annotated[int | None, typer.Option(help="Frames of each video; by default the model's.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second, instead.")] = None,
    start: Annotated[float | None, typer.Option(help="First second.")] = None,
    end: Annotated[float | None, typer.Option(help="Last second.")] = None,
    longest_edge: Annotated[int | None, typer.Option(help="Pixels to which frames are shrunk.")] = None,
    chunk_seconds: Annotated[
        float | None, typer.Option(help="Read chunks of at most this length by themselves; one adapter of them all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Videos at a time.")] = 1,
    layout: LayoutOption = Layout.vlm,
    dtype: DtypeOption = Dtype.float32,
    device: Device = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of the checkpoint.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Turn videos into LoRA adapters.

    One video becomes the adapter directory OUTPUT; of several, each becomes OUTPUT/<name of the file>.
    """
    targets = _targets(videos, output)
    _check_outputs(targets, overwrite)
    sampling: dict[str, Any] = {
        "num_frames": num_frames,
        "fps": fps,
        "start": start,
        "end": end,
        "longest_edge": longest_edge,
    }
    _check_videos(videos, batch_size, **sampling)
    from ._models import load_pipeline

    pipeline = load_pipeline(model, revision=revision, device=device)
    rows = []
    with progress("internalizing", len(videos)) as advance:
        before = time.perf_counter()
        adapters: Any = pipeline(iter(videos), batch_size=batch_size, chunk_seconds=chunk_seconds, **sampling)
        for video, target, adapter in zip(videos, targets, adapters, strict=True):
            adapter.save_pretrained(target, layout=layout.value, dtype=torch_dtype(dtype), overwrite=overwrite)
            now = time.perf_counter()
            rows.append(_describe(video, target, adapter, now - before))
            before = now
            advance()
    if json:
        print_json({"model": model, "adapters": rows})
        return
    columns = ["video", "span", "frames", "visual tokens", "rank", "size", "seconds", "adapter"]
    print_table(columns, [_row(row) for row in rows])


def _targets(videos: list[str], output: Path) -> list[Path]:
    """The directory each video becomes."""
    if len(videos) == 1:
        return [output]
    stems = [PurePosixPath(urlsplit(v).path if "://" in v else Path(v).as_posix()).stem for v in videos]
    for i, stem in enumerate(stems):
        if stem in stems[:i]:
            raise CommandError(
                f"{videos[stems.index(stem)]} and {videos[i]} would both become {output / stem}: internalize them one "
                "by one, each with its own --output."
            )
    return [output / stem for stem in stems]


def _check_outputs(targets: list[Path], overwrite: bool) -> None:
    def replaceable(directory: Path) -> bool:
        from ..adapters.storage import is_replaceable

        return is_replaceable(directory)

    if len(targets) > 1 and (targets[0].parent / "adapter_config.json").exists():
        raise CommandError(f"{targets[0].parent} is an adapter: choose another --output for several videos.")
    for target in targets:
        check_output(target, overwrite=overwrite, replaceable=replaceable, kind="a video2lora adapter")


def _check_videos(videos: list[str], batch_size: int, longest_edge: int | None, **sampling: Any) -> None:
    """Refuse, before a model is loaded, what no model could read."""
    from ..video import VideoReader
    from ..video.sampling import check_request, select_frames

    if batch_size < 1:
        raise CommandError(f"--batch-size must be at least 1, got {batch_size}.")
    for video in videos:
        check_request(**sampling, source=video)
        if "://" in video:
            continue  # fetched once, when its turn comes
        with VideoReader(video, longest_edge=longest_edge) as reader:
            select_frames(reader.times, **sampling, duration=reader.duration, tick=reader.tick, source=reader.name)


def _describe(video: str, target: Path, adapter: VideoAdapter, seconds: float) -> dict[str, Any]:
    segments = adapter.segments
    return {
        "video": video,
        "adapter": str(target),
        "start": segments[0].start,
        "end": segments[-1].end,
        "segments": len(segments),
        "num_frames": sum(segment.num_frames or 0 for segment in segments),
        "num_visual_tokens": sum(segment.num_visual_tokens or 0 for segment in segments),
        "rank": adapter.rank,
        "bytes": directory_bytes(target),
        "seconds": round(seconds, 3),
        "content_hash": adapter.content_hash,
    }


def _row(row: dict[str, Any]) -> list[object]:
    span = f"{row['start']:.2f}-{row['end']:.2f} s" + (f" in {row['segments']}" if row["segments"] > 1 else "")
    size, seconds = human_bytes(row["bytes"]), f"{row['seconds']:.2f}"
    name = row["video"] if "://" in row["video"] else Path(row["video"]).name
    return [name, span, row["num_frames"], row["num_visual_tokens"], row["rank"], size, seconds, row["adapter"]]
