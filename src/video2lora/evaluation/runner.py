"""Evaluation: a run, in which all conditions answer the same questions about the same frames, and what it measures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from .. import __version__
from ..modeling.model import Video2LoraModel
from ..modeling.processor import SETTINGS, Video2LoraProcessor
from .comparison import SAME, rows_told, why_rows_differ
from .conditions import CONDITIONS, Condition, Decoding
from .journal import RunFolder
from .records import (
    FORMAT_VERSION,
    EvaluationError,
    EvaluationRun,
    make_records,
    read_run,
    read_settings,
    write_records,
)
from .scoring import check_metrics, score_run
from .work import Work

if TYPE_CHECKING:
    from .benchmarks import Benchmark
    from .judge import Judge

_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "av")


def evaluate_model(
    model: Video2LoraModel,
    processor: Video2LoraProcessor,
    benchmark: Benchmark,
    conditions: Sequence[Condition | str],
    output_dir: str | os.PathLike[str],
    *,
    decoding: Decoding | None = None,
    metrics: Sequence[str] | None = None,
    margins: Mapping[str, float] | None = None,
    alpha: float = 0.025,
    baseline: str = "video",
    judge: Judge | None = None,
    num_workers: int = 4,
    max_bad_fraction: float = 0.05,
    seed: int = 0,
) -> EvaluationRun:
    """Let every condition answer every question of a benchmark, greedily, and score the answers.

    What the run is (`run.json`: benchmark, model, conditions, decoding, metrics, margins) is written before the first
    answer, and another start on the same folder must ask for the same. `records.parquet` gets a row for each condition
    and question (`records.RECORD_FIELDS`); a video that cannot be read has rows with its `error`, in every condition.

    Stopped at any moment, even by kill -9, the same call goes on where it was; the records are those of a run never
    stopped, but for the two columns of times. For this, which samples share a batch depends on the benchmark and
    `decoding.batch_size` alone; the same hardware and library versions are needed too. A run that goes on tries again
    videos that it could not read. A finished run is returned as it is; only what a judge left open is judged.

    Launched with accelerate or torchrun, processes take groups of samples in turn, wait for each other only before the
    first and after the last, and the main one merges and scores. One launch a folder.

    Args:
        model: on the device to use.
        processor: its `num_frames` and `longest_edge` decide the frames, which all conditions see.
        benchmark: samples in a fixed order.
        conditions: objects, or names in `CONDITIONS`, which are then made without options.
        output_dir: made if missing; of several machines, on a disk they share.
        decoding: of all conditions; by default at most as many tokens as the benchmark has it.
        metrics: names in `METRICS`; by default the benchmark's, without the judge if there is none.
        margins: by metric, the difference in scores that is too small to matter; by default the benchmark's.
        alpha: of each one-sided test; 0.025 is the paper's rule, the 95 % interval inside the margin.
        baseline: the condition that the others are compared with.
        judge: for the metric "judge".
        num_workers: threads that decode ahead of the model. A video is decoded once for all conditions.
        max_bad_fraction: stop when more than this part of the samples cannot be read.
        seed: of the resampling for intervals.

    Returns:
        The finished run, in every process.

    Raises:
        EvaluationError: another run's folder, too many bad videos, or an argument that makes no sense.
    """
    if decoding is None:
        decoding = Decoding(max_new_tokens=benchmark.spec.max_new_tokens)
    model.eval()
    for item in conditions:
        if isinstance(item, str) and item not in CONDITIONS:
            raise EvaluationError(f"there is no condition {item!r}: there are {', '.join(CONDITIONS)}.")
    made = [CONDITIONS[item](model, processor) if isinstance(item, str) else item for item in conditions]
    chosen = _metrics(benchmark, metrics, judge)
    margins = {n: m for n, m in benchmark.spec.margins.items() if n in chosen} if margins is None else dict(margins)
    _check(made, baseline, chosen, margins, alpha, num_workers, max_bad_fraction)
    check_metrics(chosen, judge, margins)
    work = Work(processor, benchmark, made, decoding)
    settings = run_settings(model, processor, benchmark, made, decoding) | {
        "seed": seed,
        "metrics": chosen,
        "margins": margins,
        "alpha": alpha,
        "baseline": baseline,
        "judge": None if "judge" not in chosen or judge is None else judge.settings(),
    }
    state = PartialState(cpu=model.device.type == "cpu", timeout=timedelta(days=7))  # a judge may take long
    _check_rows(Path(output_dir), settings)
    folder = RunFolder(Path(output_dir), json.loads(json.dumps(settings)), state.process_index)
    if not folder.finished:
        done = folder.open(state.num_processes)
        state.wait_for_everyone()  # nobody counts bad videos of an earlier start
        limit = max_bad_fraction * len(benchmark)
        own = range(state.process_index, len(work.groups), state.num_processes)
        try:
            work.run(folder, done, own, num_workers, limit, show=state.is_main_process)
        finally:
            folder.close()
        state.wait_for_everyone()
        work.stop_if_bad(folder, limit, max_bad_fraction)
    if state.is_main_process:
        if not folder.finished:
            write_records(folder.path, make_records(work.rows(folder)))
            folder.drop_counts()
        run = read_run(folder.path)
        # as the folder says, should this be a finished run
        if missing := [name for name in run.settings["metrics"] if name not in run.metrics or run.unscored(name)]:
            score_run(folder.path, missing, judge=judge)
    state.wait_for_everyone()  # so that every process finds the records
    return read_run(folder.path)


def run_settings(
    model: Video2LoraModel,
    processor: Video2LoraProcessor,
    benchmark: Benchmark,
    conditions: Sequence[Condition],
    decoding: Decoding,
) -> dict[str, Any]:
    """What decides the answers, and where they are given, as `run.json` has it."""
    spec, config, base = benchmark.spec, model.config, model.vlm
    template = json.dumps(processor.chat_template)
    generation = base.generation_config.to_diff_dict()
    return {
        "format_version": FORMAT_VERSION,
        "benchmark": {
            **{name: getattr(spec, name) for name in ("name", "version", "title", "dataset", "revision")},
            **{name: getattr(benchmark, name) for name in ("split", "seed", "num_available", "tasks")},
            "num_samples": len(benchmark),
            "num_questions": sum(len(sample.questions) for sample in benchmark),
            "skipped": dict(benchmark.skipped),
            "digest": benchmark.digest,  # last: a difference is told by what people understand
        },
        "model": {
            "id": model.name_or_path or None,
            **model.hypernetwork_identity(),
            **{name: getattr(config, name) for name in ("rank", "lora_scaling", "target_modules")},
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": base.config._attn_implementation,
            "device": base.device.type,
        },
        "base": {
            "id": config.base_model_name_or_path,
            "revision": config.base_model_revision,
            "generation_config": {name: value for name, value in generation.items() if name != "transformers_version"},
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        },
        "conditions": [{"name": condition.name, "settings": condition.settings()} for condition in conditions],
        "decoding": {"strategy": "greedy", **asdict(decoding)},
        "sampling": {"fps": None, **{name: getattr(processor, name) for name in SETTINGS}},
        "environment": {
            "versions": {"video2lora": __version__} | {name: version(name) for name in _PACKAGES},
            "device_name": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
    }


def _check_rows(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that holds a run of the same benchmark with other rows, in words rather than by a digest."""
    there = read_settings(folder)
    if there is None:
        return
    different = [name for name in SAME if there["benchmark"].get(name) != settings["benchmark"][name]]
    if different == ["digest"]:
        raise EvaluationError(
            f"{folder} holds an evaluation of {rows_told(there)}, and {rows_told(settings)} were asked for"
            f"{why_rows_differ(there, settings)}. What was declared before the first answer stays: use the same "
            "--num-samples, --tasks and --num-frames to go on, or name another folder."
        )


def _metrics(benchmark: Benchmark, metrics: Sequence[str] | None, judge: Judge | None) -> list[str]:
    """Names of the metrics, each once."""
    if metrics is not None:
        return list(dict.fromkeys(metrics))
    return [name for name in benchmark.spec.metrics if name != "judge" or judge is not None]


def _check(
    conditions: Sequence[Condition],
    baseline: str,
    metrics: Sequence[str],
    margins: Mapping[str, float],
    alpha: float,
    num_workers: int,
    max_bad_fraction: float,
) -> None:
    names = [condition.name for condition in conditions]
    if not names or len(set(names)) < len(names):
        raise EvaluationError(f"expected one or more conditions, each once, got {', '.join(names) or 'none'}.")
    if baseline not in names and baseline not in CONDITIONS:
        raise EvaluationError(f"baseline={baseline!r} is none of the conditions {', '.join(names)}.")
    for metric, margin in margins.items():
        if metric not in metrics:
            raise EvaluationError(
                f"there is a margin for {metric!r}, which is none of the metrics {', '.join(metrics)}."
            )
        if not margin > 0:
            raise EvaluationError(f"the margin of {metric} must be more than 0, got {margin}.")
    if not 0 < alpha < 0.5:
        raise EvaluationError(f"alpha must be between 0 and 0.5, got {alpha}.")
    if num_workers < 0:
        raise EvaluationError(f"num_workers must be at least 0, got {num_workers}.")
    if not 0 <= max_bad_fraction <= 1:
        raise EvaluationError(f"max_bad_fraction must be from 0 to 1, got {max_bad_fraction}.")
