"""Command line: `video2lora teach`, the base that sees the videos answers the queries to train on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import CommandError, about
from ._options import Device, Dtype, Json, Output, torch_device, torch_dtype
from ._output import print_fields, print_json
from ._processes import process_state

if TYPE_CHECKING:
    from ..trainer.teacher import TeachSummary
    from ._models import LoadedBase


def teach(
    rows: Annotated[
        str, typer.Argument(help="JSONL file, or dataset folder or Hub id, of training rows.", show_default=False)
    ],
    base: Annotated[
        str, typer.Option("--base", "-b", help="Vision-language model: Hub id or directory.", show_default=False)
    ],
    output: Output,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of the base.")] = None,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames of each video.")] = 12,
    longest_edge: Annotated[int, typer.Option(min=1, help="Pixels to which frames are shrunk.")] = 384,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries answered together, in each process.")] = 8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Also keep so many of the largest logits of each token, for KL.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Number format of the base; by default that of its files.")
    ] = None,
    device: Device = None,
    split: Annotated[str | None, typer.Option(help="Split of the rows.")] = None,
    video_root: Annotated[Path | None, typer.Option(help="Folder that relative video paths start from.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first rows.")] = None,
    overwrite_responses: Annotated[
        bool, typer.Option("--overwrite-responses", help="Answer also queries that have a response.")
    ] = False,
    num_workers: Annotated[int, typer.Option(min=0, help="Threads that decode ahead, in each process.")] = 4,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Stop when more than this part of the videos cannot be read.")
    ] = 0.05,
    json: Json = False,
) -> None:
    """Let the base, which sees the videos, answer the queries of training rows that have no response.

    OUTPUT gets manifest.jsonl, to train on, and with --top-k the teacher's logits. Stopped at any moment, the same
    command goes on. For several GPUs: accelerate launch -m video2lora teach ...
    """
    from ..data import DatasetError
    from ..trainer.teacher import teach as run

    state = process_state(device)
    try:
        with about(rows):
            dataset = _load(rows, split, video_root, limit)
        found = _load_base(base, revision, dtype, state.device if device is None else device)
        vlm, processor = found.vlm, found.processor
        vocab_size = vlm.get_output_embeddings().weight.shape[0]
        if top_k is not None and top_k > vocab_size:
            raise CommandError(f"--top-k {top_k} is more than the {vocab_size} tokens of {base}.")
        processor.num_frames, processor.longest_edge = num_frames, longest_edge
        summary = run(
            vlm,
            processor,
            dataset,
            output,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            top_k=top_k,
            num_workers=num_workers,
            overwrite_responses=overwrite_responses,
            max_bad_fraction=max_bad_fraction,
            base_revision=found.revision,
        )
    except DatasetError as error:
        raise CommandError(str(error)) from error
    if state.is_main_process:
        _show(summary, base, json)
    state.destroy_process_group()


def _load(rows: str, split: str | None, video_root: Path | None, limit: int | None) -> Any:
    from ..data import load_rows

    dataset: Any = load_rows(rows, split=split, video_root=video_root)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _load_base(base: str, revision: str | None, dtype: Dtype | None, device: Any) -> LoadedBase:
    from ._models import load_base_or_bundled

    arguments = {} if dtype is None else {"dtype": torch_dtype(dtype)}
    return load_base_or_bundled(base, revision, torch_device(str(device)), **arguments)


def _show(summary: TeachSummary, base: str, json: bool) -> None:
    document = asdict(summary) | {"manifest": str(summary.manifest), "base": base}
    if json:
        print_json(document)
        return
    print_fields(
        {
            "base": base,
            "rows": summary.num_rows,
            "rows skipped": summary.num_skipped,
            "queries": summary.num_queries,
            "responses generated": summary.num_generated,
            "cut at max_new_tokens": summary.num_truncated,
            "empty": summary.num_empty,
            "tokenised otherwise in training": summary.num_retokenized,
            "manifest": str(summary.manifest),
        }
    )
