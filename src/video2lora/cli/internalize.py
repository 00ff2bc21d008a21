"""Command line: `video2lora internalize`, from videos, or folders and datasets of them, to adapter directories."""

from __future__ import annotations

import os
import re
import shlex
import time
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from ._errors import CommandError, check_is_there
from ._options import Device, Dtype, DtypeOption, Json, Layout, LayoutOption, Output, Overwrite, torch_dtype
from ._output import check_output, directory_bytes, human_bytes, print_fields, print_json, print_table, progress
from ._processes import process_state

if TYPE_CHECKING:
    from ..adapters import VideoAdapter
    from ..pipelines.bulk import BulkSummary

_ROWS = (".jsonl", ".ndjson", ".json")


def internalize(
    videos: Annotated[
        list[str],
        typer.Argument(
            help="Video files or URLs; or a folder of videos, a JSONL file of rows, a dataset (folder or Hub id).",
            show_default=False,
        ),
    ],
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
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="With --chunk-seconds: the adapter's rank at most; chunks share it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Videos at a time, in each process.")] = 1,
    num_workers: Annotated[
        int | None, typer.Option(min=0, help="Threads that decode ahead; 4 in each process of a bulk run, else none.")
    ] = None,
    layout: LayoutOption = Layout.vlm,
    dtype: DtypeOption = Dtype.float32,
    device: Device = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of the checkpoint.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder where adapters made before are found, and new ones are kept.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Bulk: split of a dataset or of rows.")] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Bulk: do the I-th of N parts, for launches side by side.")
    ] = None,
    max_bad_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="Bulk: stop when more videos cannot be read; by default never.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Turn videos into LoRA adapters.

    One video becomes the adapter directory OUTPUT; of several, each becomes OUTPUT/<name of the file>.

    A folder, JSONL file or dataset is a bulk run: OUTPUT gets an adapter of each video and index.jsonl, bad files are
    skipped, and the same command goes on where it was stopped. On several GPUs: accelerate launch -m video2lora ...
    """
    check_is_there(model)
    sampling: dict[str, Any] = {
        "num_frames": num_frames,
        "fps": fps,
        "start": start,
        "end": end,
        "longest_edge": longest_edge,
    }
    if batch_size < 1:
        raise CommandError(f"--batch-size must be at least 1, got {batch_size}.")
    if max_rank is not None and chunk_seconds is None:
        raise CommandError("--max-rank is shared by the chunks of a video: give --chunk-seconds too.")
    options: dict[str, Any] = {"chunk_seconds": chunk_seconds, "max_rank": max_rank}
    options |= {"batch_size": batch_size, "num_workers": num_workers}
    if _is_bulk(videos, split, shard, max_bad_fraction):
        bulk = {"layout": layout.value, "split": split, "overwrite": overwrite, "max_bad_fraction": max_bad_fraction}
        given = {name: value for name, value in (sampling | options | bulk).items() if value is not None}
        _internalize_bulk(videos, model, output, _shard(shard), revision, device, dtype, store, json, given)
        return
    targets = _targets(videos, output)
    _check_outputs(targets, overwrite)
    _check_videos(videos, chunk_seconds, **sampling)
    from ._models import load_pipeline

    pipeline = load_pipeline(model, revision=revision, device=device)
    rows = []
    with progress("internalizing", len(videos)) as advance:
        before = time.perf_counter()
        adapters: Any = pipeline(iter(videos), store=_store(store), **options, **sampling)
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
    if pipeline.model.config.bundle_base:
        words = ["video2lora", "ask", str(targets[0]), "What happens in the video?", "--base", model]
        typer.echo(f"The base is inside the checkpoint; ask the adapter: {shlex.join(words)}", err=True)


def _is_bulk(videos: list[str], split: str | None, shard: str | None, max_bad_fraction: float | None) -> bool:
    """Whether this is a run over many videos rather than over those named, which are few and all must be good."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several or any(option is not None for option in (split, shard, max_bad_fraction)):
        return True
    if all("://" in video or (os.path.isfile(video) and not video.lower().endswith(_ROWS)) for video in videos):
        return False  # without importing anything
    from ..data import DatasetError
    from ..pipelines.bulk_videos import kind_of

    try:
        return any(kind_of(video) != "video" for video in videos)
    except DatasetError as error:
        raise CommandError(str(error)) from error


def _internalize_bulk(
    videos: list[str],
    model: str,
    output: Path,
    shard: tuple[int, int] | None,
    revision: str | None,
    device: str | None,
    dtype: Dtype,
    store: Path | None,
    json: bool,
    options: dict[str, Any],
) -> None:
    """A bulk run, as one process of those that were launched."""
    from ..data import DatasetError
    from ..pipelines.bulk import internalize_many
    from ..pipelines.bulk_folder import check_folder
    from ..pipelines.bulk_videos import kind_of
    from ..video.sampling import check_request
    from ._models import load_pipeline

    try:
        # before a model is loaded
        check_folder(output)
        names = ("num_frames", "fps", "start", "end", "longest_edge", "chunk_seconds")
        check_request(**{name: options.get(name) for name in names}, source="every video")
        for video in videos:
            if kind_of(video) == "rows" and not Path(video).is_file():
                raise CommandError(f"{video}: there is no such file.")
        state = process_state(device)
        pipeline = load_pipeline(model, revision=revision, device=device or str(state.device))
        found = {"dtype": torch_dtype(dtype), "store": _store(store), "shard": shard}
        summary = internalize_many(pipeline, videos, output, **found, **options)
    except DatasetError as error:
        raise CommandError(str(error)) from error
    if state.is_main_process:
        _show_summary(summary, model, json)
    state.destroy_process_group()


def _show_summary(summary: BulkSummary, model: str, json: bool) -> None:
    if json:
        print_json(asdict(summary) | {"model": model})
        return
    skipped = f"{summary.num_skipped}, see {summary.output_dir / 'skipped.jsonl'}" if summary.num_skipped else 0
    print_fields(
        {
            "videos": summary.num_videos,
            "made": summary.num_made,
            "from the store": summary.num_from_store or None,
            "already there": summary.num_found,
            "same bytes as another": summary.num_shared or None,
            "skipped": skipped,
            "seconds": f"{summary.seconds:.1f}",
            "videos/s": f"{summary.videos_per_second:.2f}",
            "size": human_bytes(summary.num_bytes),
            "index": str(summary.index),
        }
    )


def _shard(text: str | None) -> tuple[int, int] | None:
    """The part I/N to do."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise CommandError(f"--shard {text}: expected I/N with I from 1 to N, such as 1/4.")
    return int(match[1]), int(match[2])


def _store(directory: Path | None) -> Any:
    from ..adapters import VideoAdapterStore

    return None if directory is None else VideoAdapterStore(directory)


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


def _check_videos(videos: list[str], chunk_seconds: float | None, longest_edge: int | None, **sampling: Any) -> None:
    """Refuse, before a model is loaded, what no model could read."""
    from ..video import VideoReader
    from ..video.sampling import check_request, select_frames

    for video in videos:
        check_request(**sampling, chunk_seconds=chunk_seconds, longest_edge=longest_edge, source=video)
        if "://" in video:
            continue  # fetched once, when its turn comes
        with VideoReader(video, longest_edge=longest_edge) as reader:
            select_frames(reader.times, **sampling, duration=reader.duration, tick=reader.tick, source=reader.name)


def _describe(video: str, target: Path, adapter: VideoAdapter, seconds: float) -> dict[str, Any]:
    from ..pipelines.video_to_lora import count_decode_errors

    segments = adapter.segments
    return {
        "video": video,
        "adapter": str(target),
        "start": segments[0].start,
        "end": segments[-1].end,
        "segments": len(segments),
        "num_frames": sum(segment.num_frames or 0 for segment in segments),
        "num_decode_errors": count_decode_errors(segments),
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
