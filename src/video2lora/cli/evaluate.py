"""Command line: `video2lora evaluate`, a checkpoint against a benchmark, in several conditions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ._errors import EXPECTED_ERROR, CommandError, about
from ._options import Device, Dtype, Json, torch_device, torch_dtype
from ._output import note, print_fields, print_json, print_table
from ._processes import process_state

if TYPE_CHECKING:
    from ..evaluation.benchmarks import Benchmark
    from ..evaluation.judge import Judge
    from ..evaluation.records import EvaluationRun
    from ..evaluation.scoring import Verdict

CONDITIONS = "video,adapter,no_adapter,other_adapter"
JUDGE_KEY = "VIDEO2LORA_JUDGE_API_KEY"


class JudgeKind(str, Enum):
    """What a judge grades by."""

    question = "question"
    caption = "caption"


def evaluate(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint: Hub id or directory.", show_default=False)
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option("--benchmark", "-b", help="Name (see --list), or your own JSONL file.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the run.", show_default=False)
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the benchmark's annotations and videos.")] = None,
    split: Annotated[str | None, typer.Option(help="Split, by default the benchmark's.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, with commas between.")] = None,
    conditions: Annotated[str, typer.Option(help="How the questions are answered, with commas between.")] = CONDITIONS,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KEY=VALUE,...",
            help="One more with options, such as lora_from_adapter:steps=20 or adapter:segments=2; give several.",
            show_default=False,
        ),
    ] = None,
    num_samples: Annotated[
        str | None, typer.Option(help="How many questions (or videos) are drawn, or 'all'.", metavar="N|all")
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each video; by default the benchmark's, or the model's.")
    ] = None,
    longest_edge: Annotated[
        int | None, typer.Option(min=1, help="Pixels to which frames are shrunk; by default the model's.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most; by default the benchmark's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together, in each process.")] = 8,
    metrics: Annotated[str | None, typer.Option(help="By default the benchmark's, with commas between.")] = None,
    margin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE", help="A difference too small to matter; give several.", show_default=False
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Of each one-sided test; 0.025 is the paper's rule.")] = 0.025,
    judge: Annotated[
        str | None,
        typer.Option(help=f"Model that grades answers, for the metric judge; its key is in {JUDGE_KEY}."),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server of the judge; by default a Hugging Face provider.")
    ] = None,
    judge_kind: Annotated[
        JudgeKind | None,
        typer.Option(help="What it grades by; by default the benchmark's, for your own file that of questions."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Number format of the base; by default that of its files.")
    ] = None,
    device: Device = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of the checkpoint.")] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Threads that decode ahead, in each process.")] = 4,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Stop when more than this part of the videos cannot be read.")
    ] = 0.05,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch what the benchmark lacks into --data-dir first.")
    ] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Show the benchmarks, their sizes and access, and exit.")
    ] = False,
    json: Json = False,
) -> None:
    """Let a checkpoint answer a benchmark's questions in several conditions, score them and compare.

    OUTPUT gets run.json (what was declared before the first answer, margins included), records.parquet (every answer)
    and a report. Stopped at any moment, the same command goes on. For several GPUs: accelerate launch -m video2lora
    evaluate ...
    """
    if list_:
        _list(json)
        return
    for name, value in (("CHECKPOINT", checkpoint), ("--benchmark", benchmark), ("--output", output)):
        if value is None:
            raise CommandError(f"{name} is missing. (`video2lora evaluate --list` shows the benchmarks.)")
    assert checkpoint is not None and benchmark is not None and output is not None  # for mypy
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output {output} is a file: name the folder of the run.")
    from ..data.errors import DatasetError
    from ..evaluation.records import EvaluationError
    from ._conditions import make_conditions, read_conditions

    asked = {"split": split, "tasks": _names(tasks), "num_samples": _count(num_samples), "num_frames": num_frames}
    state = process_state(device)
    try:
        _check_judge(judge, judge_url)
        more = read_conditions(condition or ())
        with state.main_process_first():
            samples = _load_benchmark(benchmark, data_dir, download and state.is_main_process, asked)
        scored = _metrics(metrics, samples, judge)
        margins = _margins(margin or (), samples, scored)
        judging = None
        if judge is not None:
            kind = _judge_kind(judge_kind, samples)
            judging = _judge(judge, judge_url, kind)
            if state.is_main_process:
                limit = max_new_tokens or samples.spec.max_new_tokens
                _say_what_it_takes(judging, samples, limit, len(_names(conditions) or []) + len(more))
        model, processor = _load_model(checkpoint, revision, dtype, state.device if device is None else device)
        processor.num_frames = num_frames or (
            processor.num_frames if samples.spec.schema == "local" else samples.spec.num_frames
        )
        processor.longest_edge = longest_edge or processor.longest_edge
        from ..evaluation.conditions import Decoding
        from ..evaluation.runner import evaluate_model

        run = evaluate_model(
            model,
            processor,
            samples,
            [*(_names(conditions) or []), *make_conditions(more, model, processor)],
            output,
            decoding=Decoding(max_new_tokens or samples.spec.max_new_tokens, batch_size),
            metrics=scored,
            margins=margins,
            alpha=alpha,
            judge=judging,
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
        )
    except (DatasetError, EvaluationError) as error:
        raise CommandError(str(error)) from error
    if state.is_main_process:
        _show(run, _write_report(run.path, samples), json)
    state.destroy_process_group()


# --- what is asked for -----------------------------------------------------------------------------------------------


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _count(text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    if not text.isdecimal() or not int(text):
        raise CommandError(f"--num-samples {text}: expected a number of at least 1, or 'all'.")
    return int(text)


def _metrics(text: str | None, benchmark: Benchmark, judge: str | None) -> list[str]:
    """The benchmark's metrics or those given; the judge's where there is a judge."""
    names = _names(text)
    if names is not None and "judge" in names and judge is None:
        raise CommandError("--metrics judge: name the model that judges, --judge MODEL.")
    names = [name for name in benchmark.spec.metrics if name != "judge"] if names is None else names
    return list(dict.fromkeys([*names, *(["judge"] if judge is not None else ())]))


def _margins(texts: Sequence[str], benchmark: Benchmark, metrics: Sequence[str]) -> dict[str, float]:
    """The benchmark's margins of the metrics that are scored, and those given."""
    margins = {name: value for name, value in benchmark.spec.margins.items() if name in metrics}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            margins[name.strip()] = float(value)
        except ValueError:
            raise CommandError(f"--margin {text}: expected METRIC=VALUE, such as token_f1=0.05.") from None
    return margins


# --- benchmark, judge and model --------------------------------------------------------------------------------------


def _list(json: bool) -> None:
    from ..evaluation.benchmarks import describe_benchmarks

    rows = describe_benchmarks()
    if json:
        print_json(rows)
        return
    names = ["name", "questions", "videos", "drawn", "size", "access"]
    print_table(names, [[row[name] for name in names] for row in rows])


def _load_benchmark(name: str, data_dir: Path | None, download: bool, asked: dict[str, Any]) -> Benchmark:
    """The benchmark from its folder.

    Raises:
        typer.Exit: it lies nowhere yet; what has to be fetched was said.
    """
    from ..evaluation.benchmarks import BENCHMARKS, BenchmarkError, load_benchmark
    from ..evaluation.benchmarks import download as fetch

    spec = BENCHMARKS.get(name)
    if spec is not None and spec.downloads and data_dir is None:
        _say_what_to_fetch(f"{spec.title} has to be fetched first. {spec.instructions()}")
    if download:
        if spec is None or not spec.downloads or data_dir is None:
            raise CommandError(f"--download: there is nothing to fetch for {name}.")
        fetch(name, data_dir, tell=lambda line: typer.echo(line, err=True))
    try:
        return load_benchmark(name, data_dir=data_dir, **asked)
    except BenchmarkError as error:
        if "\n" not in str(error):
            raise
        _say_what_to_fetch(str(error))


def _say_what_to_fetch(text: str) -> NoReturn:
    """End with an error of several lines: what a benchmark needs is a list."""
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(EXPECTED_ERROR)


def _check_judge(model: str | None, url: str | None) -> None:
    """Refuse, before anything is answered, a judge that nobody may ask.

    Raises:
        CommandError: a provider is to be asked, and there is no key.
    """
    from huggingface_hub import get_token

    if model is None and url is not None:
        raise CommandError("--judge-url: name the model that judges, too: --judge MODEL.")
    if model is not None and url is None and not os.environ.get(JUDGE_KEY) and get_token() is None:
        raise CommandError(
            f"--judge {model}: a provider wants a key. Set {JUDGE_KEY}, log in with `hf auth login`, or name a server "
            "of your own: --judge-url."
        )


def _judge_kind(asked: JudgeKind | None, benchmark: Benchmark) -> str:
    """Which rubric: benchmarks of captions have no question by itself; prompts of a user's file may be anything."""
    if asked is not None:
        return asked.value
    questions = (question.question for sample in benchmark for question in sample.questions)
    captions = benchmark.spec.schema != "local" and all(question is None for question in questions)
    return (JudgeKind.caption if captions else JudgeKind.question).value


def _judge(model: str, url: str | None, kind: str) -> Judge:
    from ..evaluation.judge import Judge

    # what an earlier start could not read counts as open: the same command tries again, as it says
    return Judge(model, base_url=url, api_key=os.environ.get(JUDGE_KEY), kind=kind, retry_failed=True)


def _say_what_it_takes(judge: Judge, benchmark: Benchmark, max_new_tokens: int, num_conditions: int) -> None:
    """On stderr, what judging will take at most."""
    questions = [question for sample in benchmark for question in sample.questions]
    # as long as a limit's worth of answer, about four characters a token, and no two the same
    texts = [f"{number}".ljust(4 * max_new_tokens, "x") for number in range(len(questions))]
    asked = [question.prompt if question.question is None else question.question for question in questions]
    estimate = judge.estimate(texts, [question.references for question in questions], asked)
    typer.echo(f"judge {judge.model}, for each of {num_conditions} conditions at most: {estimate}", err=True)


def _load_model(checkpoint: str, revision: str | None, dtype: Dtype | None, device: Any) -> tuple[Any, Any]:
    from ..modeling import Video2LoraModel, Video2LoraProcessor
    from ._models import load_config

    where = torch_device(str(device))
    load_config(checkpoint, revision)
    note(f"loading {checkpoint}")
    arguments = {} if dtype is None else {"dtype": torch_dtype(dtype)}
    with about(checkpoint):
        model = Video2LoraModel.from_pretrained(checkpoint, revision=revision, **arguments)
        processor = Video2LoraProcessor.from_pretrained(checkpoint, revision=revision)
    return model.to(where), processor


# --- what came out ---------------------------------------------------------------------------------------------------


def _write_report(folder: Path, benchmark: Benchmark) -> list[Path]:
    """The report's files; none where it cannot be drawn, which loses nothing."""
    from ..evaluation.report import write_report

    note("writing the report")
    try:
        return write_report(folder, samples=benchmark)
    except ImportError as error:
        typer.echo(f"warning: there is no report: {error}; then run the same command again", err=True)
        return []


def _verdicts(run: EvaluationRun) -> list[Verdict]:
    """Verdicts against the declared margins; none where a library for them is missing."""
    from ..evaluation.scoring import verdicts

    try:
        return verdicts(run)
    except ImportError as error:
        typer.echo(f"warning: there are no verdicts: {error}; then run the same command again", err=True)
        return []


def _show(run: EvaluationRun, files: list[Path], json: bool) -> None:
    from ..evaluation.scoring import remarks

    scores, found = _scores(run), _verdicts(run)
    unscored = {metric: count for metric in run.settings["metrics"] if (count := run.unscored(metric))}
    if json:
        print_json(
            {
                "run": str(run.path),
                "scores": scores,
                "verdicts": [_verdict(verdict) for verdict in found],
                "remarks": remarks(found),
                "errors": run.errors,
                "unscored": unscored,
                "files": [str(file) for file in files],
            }
        )
        return
    columns = ["condition", "task", "questions", *run.metrics]
    print_table(columns, [[_cell(row[name]) for name in columns] for row in scores])
    for verdict in found:
        typer.echo(_sentence(verdict))
    for remark in remarks(found):
        typer.echo(remark)
    if run.settings["baseline"] not in run.conditions:
        typer.echo(f"no verdicts: the baseline, {run.settings['baseline']}, is none of the conditions")
    fields: dict[str, object] = {"run": run.path, **{file.name: file for file in files if file.parent == run.path}}
    if run.errors:
        sample, error = next(iter(run.errors.items()))
        fields["videos not read"] = f"{len(run.errors)} of {run.num_samples}, such as that of {sample}: {error}"
    for metric, count in unscored.items():
        fields[f"no score in {metric}"] = f"{count} answers; the same command tries again"
    print_fields(fields)


def _scores(run: EvaluationRun) -> list[dict[str, Any]]:
    """A row for each condition and task, and one for all tasks where there are several."""
    tasks: list[str | None] = [*run.tasks, None] if len(run.tasks) > 1 else [None]
    rows = []
    for condition in run.conditions:
        for task in tasks:
            row: dict[str, Any] = {"condition": condition, "task": "all" if task is None else task}
            for metric in run.metrics:
                scores = [score for score in run.scores(metric, condition, task) if score is not None]
                row[metric] = sum(scores) / len(scores) if scores else None
            row["questions"] = run.num_questions(task)
            rows.append(row)
    return rows


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        name: getattr(verdict, name) for name in ("metric", "condition", "baseline")
    } | verdict.comparison.to_dict()


def _sentence(verdict: Verdict) -> str:
    """Effect, interval and verdicts in a line."""
    from ..evaluation.report_numbers import claims_of

    found = verdict.comparison
    level = 100 * (1 - 2 * found.alpha)
    return (
        f"{verdict.metric}: {verdict.condition} - {verdict.baseline} = {found.effect:+.3f} "
        f"[{found.interval[0]:+.3f}, {found.interval[1]:+.3f}] ({level:g} %), margin {found.margin:g}: "
        f"{', '.join(claims_of(found)) or 'neither equivalent nor non-inferior'}"
    )


def _cell(value: Any) -> Any:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else value
