"""Command line: `video2lora report`, the reports of finished evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import CommandError
from ._options import Json
from ._output import note, print_json

if TYPE_CHECKING:
    from ..evaluation.records import EvaluationRun
    from ..evaluation.report_numbers import Effect
    from ..evaluation.samples import Sample


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished evaluations.", show_default=False)],
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the benchmark's videos, for frames beside answers.", show_default=False),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare two runs of one benchmark, B with A.")] = False,
    sweep: Annotated[
        Path | None,
        typer.Option(
            help="Report over runs of one benchmark with other frames, into this folder.", show_default=False
        ),
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Report over several benchmarks, into this folder.", show_default=False)
    ] = None,
    condition: Annotated[str, typer.Option(help="What --compare compares.")] = "adapter",
    metric: Annotated[
        str | None, typer.Option(help="What --compare compares it by; by default what has a margin.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Of --compare; by default that which both runs declared.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples of each interval.")] = 10_000,
    json: Json = False,
) -> None:
    """Write, or write again, the report of each run into its folder: report.md, report.html, plots.

    Nothing is answered again: all numbers are from run.json and records.parquet. With --compare, --sweep or --summary
    a report over all runs is written instead.
    """
    if sum((compare, sweep is not None, summary is not None)) > 1:
        raise CommandError("--compare, --sweep and --summary are different reports: take one.")
    with _expected():
        if compare:
            _compare(runs, condition, metric, margin, resamples, json)
            return
        if sweep is not None or summary is not None:
            from ..evaluation.report_sweep import write_summary_report, write_sweep_report

            written = (
                write_summary_report(runs, summary, resamples=resamples)
                if sweep is None and summary is not None
                else write_sweep_report(runs, sweep or "", resamples=resamples)
            )
            _show({str(summary if sweep is None else sweep): written}, json)
            return
        from ..evaluation.report import write_report

        found = {}
        for run in runs:
            note(f"writing the report of {run}")
            found[str(run)] = write_report(run, samples=_samples(run, data_dir), resamples=resamples)
        _show(found, json)


def _compare(
    runs: list[Path], condition: str, metric: str | None, margin: float | None, resamples: int, json: bool
) -> None:
    from ..evaluation.comparison import compare_runs
    from ..evaluation.records import read_run

    if len(runs) != 2:
        raise CommandError(f"--compare takes two runs, got {len(runs)}.")
    if margin is not None and margin <= 0:
        raise CommandError(f"--margin {margin:g}: expected a positive number, the largest difference of no matter.")
    if metric is None:
        declared, scored = (list(names) for names in _metrics(read_run(runs[0])))
        metric = next(iter([*declared, *scored]), None)
        if metric is None:
            raise CommandError(f"{runs[0]} has no scores: name a metric after scoring it.")
    found = compare_runs(runs[0], runs[1], condition=condition, metric=metric, margin=margin, resamples=resamples)
    if json:
        effects = [_effect(effect) for effect in found.effects]
        differences = {name: list(values) for name, values in found.differences.items()}
        print_json({"condition": condition, "metric": metric, "effects": effects, "differences": differences})
    else:
        typer.echo(found.to_markdown(), nl=False)


def _effect(effect: Effect) -> dict[str, Any]:
    """An effect for JSON; without a margin there is no verdict."""
    found = {"task": effect.task, **effect.comparison.to_dict(), "margin": effect.margin}
    verdicts = {"equivalent", "non_inferior", "superior"}
    hidden = {name for name in found if name in verdicts or name.startswith("p_")} if effect.margin is None else set()
    return {name: None if name in hidden else value for name, value in found.items()}


def _metrics(run: EvaluationRun) -> tuple[list[str], list[str]]:
    """Scored metrics with a declared margin, and all."""
    return [name for name in run.settings["margins"] if name in run.metrics], run.metrics


def _samples(run: Path, data_dir: Path | None) -> Iterator[Sample] | None:
    """The samples of a run's benchmark, loaded when a report first asks for a video; None where nobody said where."""
    from ..evaluation.records import read_run

    settings = read_run(run).settings
    benchmark = settings["benchmark"] | {"num_frames": settings["sampling"]["num_frames"]}
    if benchmark["name"] == "moving_shapes":  # made on the spot
        return _load(benchmark, None)
    if data_dir is None:
        return None
    if not data_dir.is_dir():
        raise CommandError(f"--data-dir {data_dir} is no folder.")
    return _load(benchmark, data_dir)


def _load(benchmark: dict[str, Any], data_dir: Path | None) -> Iterator[Sample]:
    from ..data.errors import DatasetError
    from ..evaluation.benchmarks import BENCHMARKS, load_benchmark

    name = benchmark["name"] if benchmark["name"] in BENCHMARKS else f"{data_dir}/{benchmark['name']}.jsonl"
    try:
        yield from load_benchmark(
            name,
            data_dir=data_dir,
            split=benchmark["split"] or None,
            # of all samples those of the run have the same ids; of what is made on the spot there is no end
            num_samples="all" if data_dir is not None else benchmark["num_samples"],
            seed=benchmark["seed"],
            tasks=benchmark["tasks"] or None,
            num_frames=benchmark["num_frames"],
        )
    except DatasetError as error:
        note(f"no frames are drawn: {error}")


def _show(written: dict[str, list[Path]], json: bool) -> None:
    if json:
        print_json({folder: [str(path) for path in paths] for folder, paths in written.items()})
        return
    for paths in written.values():
        for path in paths:
            if path.suffix in (".md", ".html"):
                typer.echo(str(path))


@contextmanager
def _expected() -> Iterator[None]:
    """Tell what is wrong with a run, or what is not installed, in a line."""
    try:
        yield
    except (ImportError, ValueError) as error:
        from ..evaluation.records import EvaluationError

        if isinstance(error, (ImportError, EvaluationError)):
            raise CommandError(str(error)) from error
        raise
