"""Hub cards: what evaluations found, as the `model-index` of a card's metadata."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, metadata_load
from huggingface_hub.repocard import metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..data.files import PART

TASK = "video-text-to-text"
DIGITS = 4


def evaluation_results(
    run_dirs: Sequence[str | os.PathLike[str]], *, conditions: Sequence[str] = ("adapter",)
) -> list[EvalResult]:
    """The mean scores of finished runs, a result for each metric and condition.

    Each names benchmark, version, frames and questions; `metric_args` hold the number of answers and the baseline's
    score on the same benchmark. Metrics without any score are left out.

    Args:
        run_dirs: folders; each its own benchmark or its own frames.
        conditions: those that count as the model's results.

    Raises:
        EvaluationError: a folder holds no finished run, or none of the conditions, or two runs are of the same thing.
    """
    from ..evaluation.records import EvaluationError, read_run

    results: list[EvalResult] = []
    seen: dict[Any, Path] = {}
    for run in map(read_run, run_dirs):
        chosen = [name for name in conditions if name in run.conditions]
        if not chosen:
            raise EvaluationError(
                f"{run.path} has none of the conditions {', '.join(conditions)}: it has {', '.join(run.conditions)}."
            )
        found = []
        for metric in run.metrics:
            for condition in chosen:
                mean, count = _mean(run.scores(metric, condition))
                if mean is not None:
                    found.append(_result(run, metric, condition, mean, count))
        results += found
        if found and (same := seen.setdefault(found[0].unique_identifier, run.path)) != run.path:
            raise EvaluationError(
                f"{same} and {run.path} are of one benchmark with the same frames and number of questions: a card has "
                "one result of each."
            )
    return results


def model_index(
    run_dirs: Sequence[str | os.PathLike[str]], model_name: str, *, conditions: Sequence[str] = ("adapter",)
) -> list[dict[str, Any]]:
    """The `model-index` of a card: what `huggingface_hub.metadata_update(repo, {"model-index": ...})` takes.

    Arguments and errors are those of [`evaluation_results`]; `model_name` is the model's in the index.
    """
    return eval_results_to_model_index(model_name, evaluation_results(run_dirs, conditions=conditions))


def add_to_card(card: str | os.PathLike[str], index: Sequence[Mapping[str, Any]]) -> None:
    """Merge a `model-index` into the metadata of a local `README.md`; its text stays as it is, byte for byte.

    A result of the same task, dataset, configuration, split, revision, metric and name is replaced; everything else,
    other results too, stays. The file is replaced at once.

    Args:
        card: the file.
        index: as [`model_index`] makes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its metadata holds something else where a `model-index` should be.
    """
    path = Path(card)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such card. Write one first, or name the README.md itself.")
    metadata = metadata_load(path) or {}
    there = metadata.get("model-index") or []
    if not isinstance(there, list) or not all(
        isinstance(m, dict) and isinstance(m.get("results"), list) for m in there
    ):
        raise ValueError(
            f"{path}: the model-index of its metadata is no list of models with results. Correct it first."
        )
    for model in index:
        # the card is of one model, whatever that is called in it
        target = next((m for m in there if m.get("name") == model["name"]), there[0] if there else None)
        if target is None:
            target = {"name": model["name"], "results": []}
            there.append(target)
        for result in model["results"]:
            _merge(target["results"], result)
    metadata["model-index"] = there
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        shutil.copyfile(path, part)
        metadata_save(part, metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _result(run: Any, metric: str, condition: str, mean: float, count: int) -> EvalResult:
    settings = run.settings
    benchmark, sampling, baseline = settings["benchmark"], settings["sampling"], settings["baseline"]
    edge = sampling.get("longest_edge")
    frames = f"{sampling['num_frames']} frames" + (f" of {edge} px" if edge else "")
    revision, questions = benchmark.get("revision"), f"{benchmark['num_questions']} questions"
    arguments: dict[str, Any] = {"condition": condition, "num_answers": count}
    if baseline in run.conditions and baseline != condition:
        reference, _ = _mean(run.scores(metric, baseline))
        arguments |= {} if reference is None else {"baseline": baseline, "baseline_score": round(reference, DIGITS)}
    if metric == "judge" and run.judge:
        arguments["judge"] = run.judge["model"]
    return EvalResult(
        task_type=TASK,
        # the Hub joins results that differ in the dataset's name or arguments alone: all that matters is in the config
        dataset_type=benchmark.get("dataset") or benchmark["name"],
        dataset_name=benchmark["title"],
        dataset_config=f"{benchmark['name']} v{benchmark['version']}, {questions}, {frames}",
        dataset_split=benchmark.get("split") or None,
        dataset_revision=None if revision in (None, "main") else revision,
        metric_type=metric,
        metric_name=f"{metric} ({condition})",
        metric_value=round(mean, DIGITS),
        metric_args=arguments,
    )


def _mean(scores: Sequence[float | None]) -> tuple[float | None, int]:
    known = [score for score in scores if score is not None]
    return (sum(known) / len(known) if known else None), len(known)


def _merge(results: list[dict[str, Any]], new: Mapping[str, Any]) -> None:
    """Put a result's metrics into that of the same thing, or add it."""
    same = next((result for result in results if _thing(result) == _thing(new)), None)
    if same is None:
        results.append(dict(new))
        return
    metrics = same.setdefault("metrics", [])
    for metric in new["metrics"]:
        place = next((i for i, m in enumerate(metrics) if _which(m) == _which(metric)), None)
        if place is None:
            metrics.append(metric)
        else:
            metrics[place] = metric


def _thing(result: Mapping[str, Any]) -> tuple[Any, ...]:
    dataset = result.get("dataset") or {}
    task = (result.get("task") or {}).get("type")
    return (task, *(dataset.get(name) for name in ("type", "config", "split", "revision")))


def _which(metric: Mapping[str, Any]) -> tuple[Any, Any]:
    return metric.get("type"), metric.get("name")
