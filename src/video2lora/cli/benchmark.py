"""Command line: `video2lora benchmark`, what adapters save, measured over frames and resolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ._errors import CommandError, about
from ._options import Device, Dtype, Json, torch_device, torch_dtype
from ._output import note, print_fields, print_json


def benchmark(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="500M or 2.2B (SmolVLM2's sizes, random weights), or a checkpoint or base: Hub id or directory.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the sweep; one that is there goes on.", show_default=False),
    ] = None,
    frames: Annotated[str, typer.Option(help="Numbers of frames.")] = "8,12,24,48,128,256,512,1024",
    longest_edge: Annotated[
        str, typer.Option(help="Pixels that frames as images are resized to before they are cut into tiles.")
    ] = "224,336,512,1024",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each measurement at most; long ones have two.")] = 5,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens timed after an answer's first.")] = 32,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Leave out cells with more tokens in their context.")
    ] = 131072,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Of the base; by default bfloat16 on an accelerator, else float32.")
    ] = None,
    device: Device = None,
    plot_only: Annotated[
        Path | None,
        typer.Option(help="Measure nothing: write the report and draw the plots of this sweep.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Measure what questions about a video take with the video in the context, a KV cache, or an adapter.

    OUTPUT gets sweep.json, measurements.jsonl (a line as soon as it is measured: stopped at any moment, the same
    command goes on), report.md and, where matplotlib is installed, heat maps.
    """
    from ..evaluation.efficiency_results import EfficiencyError, read_results

    try:
        if plot_only is not None:
            if model is not None or output is not None:
                raise CommandError("--plot-only measures nothing: give it the folder, without --model and --output.")
            _show(read_results(plot_only), plot_only, json, must_draw=True)
            return
        if model is None or output is None:
            raise CommandError("give --model and --output, or --plot-only.")
        results = _run(
            model, output, _numbers("--frames", frames), _numbers("--longest-edge", longest_edge),
            {"repeats": repeats, "new_tokens": new_tokens, "max_tokens": max_tokens}, dtype, device,
        )  # fmt: skip
        _show(results, output, json, must_draw=False)
    except EfficiencyError as error:
        raise CommandError(str(error)) from error


def _run(
    model: str,
    output: Path,
    frames: tuple[int, ...],
    longest_edges: tuple[int, ...],
    options: dict[str, int],
    dtype: Dtype | None,
    device: str | None,
) -> Any:
    from ..evaluation.efficiency import Sweep, run_sweep

    where = torch_device(device)
    sweep = Sweep(model, frames, longest_edges, **options)
    with about(model):
        return run_sweep(
            sweep, output, device=where, dtype=None if dtype is None else torch_dtype(dtype), progress=note
        )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise CommandError(f"{option} {text}: expected whole numbers with commas between them.") from error


def _show(results: Any, folder: Path, json: bool, must_draw: bool) -> None:
    """Write the report and draw the plots; say where they are."""
    from ..evaluation.efficiency_plots import write_plots
    from ..evaluation.efficiency_report import write_report

    report, plots = write_report(results, folder), []
    try:
        plots = write_plots(results, folder)
    except ImportError as error:
        if must_draw:
            raise CommandError(f"plots need matplotlib: pip install matplotlib ({error}).") from error
        typer.echo(f"no plots without matplotlib; elsewhere: video2lora benchmark --plot-only {folder}", err=True)
    conditions = ("video_cold", "video_cached", "kv_cache", "internalize")
    statuses = [results.status(cell, condition) for cell in results.cells for condition in conditions]
    document: dict[str, Any] = {
        "model": results.settings["model"],
        "device": results.settings["device"],
        "cells": len(results.cells),
        "measured": sum(status == "ok" for status in statuses),
        "not measured": len(statuses) - sum(status == "ok" for status in statuses),
        "report": str(report),
        "plots": [str(path) for path in plots],
    }
    if json:
        print_json(document)
        return
    print_fields(document | {"plots": ", ".join(path.name for path in plots) or None})
