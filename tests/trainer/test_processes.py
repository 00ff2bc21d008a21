"""Two processes (gloo, on the CPU) do what one does with the same global batches, and stop and go on together."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from video2lora.trainer.checkpoints import is_complete, last_complete_checkpoint

from .runs import (
    SGD,
    assert_near,
    assert_same,
    launch,
    losses,
    make_trainer,
    run_training,
    run_two,
    saved,
    succeed,
    train,
    weights,
)


@pytest.fixture(scope="module")
def two(tiny_vlm_dir, rows, broken, tmp_path_factory) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """What each of two processes found, and its weights."""
    output = tmp_path_factory.mktemp("two")
    succeed(run_two, output, processes=2, base=str(tiny_vlm_dir), rows=rows, broken=broken)
    results = [json.loads((output / f"results-{rank}.json").read_text()) for rank in (0, 1)]
    return results, [load_file(output / f"weights-{rank}.safetensors") for rank in (0, 1)]


def part(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def one_process(base: Path, output: Path, rows: list, **settings: Any) -> Any:
    trainer = make_trainer(base, output, rows, max_steps=3, **SGD, **settings)
    trainer.train()
    return trainer


def assert_equals(two: Any, name: str, trainer: Any) -> None:
    results, tensors = two
    for rank in (0, 1):
        assert results[rank][name]["norms"] == pytest.approx(losses(trainer, "grad_norm"), rel=1e-5)
        assert_near(part(tensors[rank], name), weights(trainer.model), 2e-6)
    assert results[0][name]["losses"] == pytest.approx(losses(trainer), rel=1e-6)
    assert_same(part(tensors[0], name), part(tensors[1], name))


def test_two_processes_equal_one(two, tiny_vlm_dir, rows, tmp_path):
    """With 1, 2 or 3 queries a video, so the processes' shares of a step are unequal."""
    settings = {"composition_probability": 0.5, "max_queries_per_video": 2, "per_device_train_batch_size": 4}
    assert_equals(two, "equal", one_process(tiny_vlm_dir, tmp_path, rows, **settings))


def test_a_broken_video_on_one_of_two_weighs_nothing(two, tiny_vlm_dir, rows, tmp_path):
    assert_equals(two, "broken", one_process(tiny_vlm_dir, tmp_path, rows[:3], per_device_train_batch_size=3))
    assert [result["broken"]["counts"] for result in two[0]] == [[12, 3]] * 2


def test_a_process_with_nothing_left_takes_part(two, tiny_vlm_dir, rows, tmp_path):
    assert_equals(two, "dummy", one_process(tiny_vlm_dir, tmp_path, rows[1:2]))
    assert [result["dummy"]["counts"] for result in two[0]] == [[6, 3]] * 2


def test_too_many_broken_videos_stop_both_with_the_same_words(two):
    first, second = two[0]
    assert first["many"] == second["many"] and first["none"] == second["none"]
    assert first["many"].startswith("8 of 8 videos could not be read, more than max_bad_fraction=0.05 allows")
    assert first["none"].startswith("1 of ") and "max_bad_fraction=0.0 " in first["none"]


def test_rows_repeated_to_fill_the_last_batch_count_once_in_the_evaluation(two, tiny_vlm_dir, rows, tmp_path):
    trainer = make_trainer(tiny_vlm_dir, tmp_path, None, eval_rows=rows[:6])
    expected = trainer.evaluate()["eval_loss"]
    assert [result["eval"] for result in two[0]] == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize("dealt", ["1 0", "4 0", "3 2"])
def test_a_stream_is_evaluated_row_by_row_once(dealt, two, tiny_vlm_dir, rows, tmp_path):
    """In one shard, in shards of unequal length, and in more workers than shards of a process."""
    trainer = make_trainer(tiny_vlm_dir, tmp_path, None, eval_rows=rows)
    expected, few = trainer.evaluate()["eval_loss"], trainer.evaluate(rows[:1])["eval_loss"]
    results = [result["streams"][dealt] for result in two[0]]
    for result in results:
        assert result["losses"] == pytest.approx([expected] * 3, rel=1e-6)
        assert result["few"] == pytest.approx(few, rel=1e-6)
    seen = Counter(results[0]["seen"] + results[1]["seen"])
    names = [row["id"] for row in rows] + ["bad-0"]
    assert seen == Counter(names * 3 + names[:1])  # three times the whole stream, and once its first row
    assert 8 <= len(results[0]["seen"]) <= 20  # both had something to do


resumes_on_cpu = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="older versions of transformers cannot load an optimizer in two processes on a CPU (map_location cpu:0)",
)


# --- stop and resume -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tiny_vlm_dir, rows) -> dict[str, Any]:
    """Two passes of four steps."""
    return {
        "base": str(tiny_vlm_dir),
        "rows": rows,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "composition_probability": 0.5,
        "max_queries_per_video": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }


@pytest.fixture(scope="module")
def unstopped(settings, tmp_path_factory) -> dict[str, torch.Tensor]:
    output = tmp_path_factory.mktemp("unstopped")
    arguments = settings | {"output": str(output / "run"), "save_strategy": "no"}
    return saved(succeed(run_training, output, processes=2, settings=arguments))


@resumes_on_cpu
@pytest.mark.parametrize("workers", [0, 1])
def test_both_killed_in_a_step(workers, settings, unstopped, tmp_path):
    settings = settings | {"output": str(tmp_path / "run"), "dataloader_num_workers": workers}
    codes = launch(run_training, tmp_path / "killed", 2, settings=settings | {"kill_step": 6})
    assert -9 in codes and 0 not in codes
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run/checkpoint-6")
    succeed(run_training, tmp_path / "resumed", 2, settings=settings | {"resume": True})
    assert_same(saved(tmp_path / "resumed"), unstopped)


@resumes_on_cpu
@pytest.mark.parametrize("writer", ["_save_optimizer_and_scheduler", "_save_arguments"])
def test_one_killed_while_the_checkpoint_is_written(writer, settings, unstopped, tmp_path):
    """The main process dies, the other one may already have written its part."""
    settings = settings | {"output": str(tmp_path / "run"), "save_total_limit": 1}
    codes = launch(run_training, tmp_path / "killed", 2, settings=settings | {"kill_writing": (3, writer)})
    assert -9 in codes and 0 not in codes
    assert (tmp_path / "run/checkpoint-3").is_dir() and not is_complete(tmp_path / "run/checkpoint-3")
    succeed(run_training, tmp_path / "resumed", 2, settings=settings | {"resume": True})
    assert_same(saved(tmp_path / "resumed"), unstopped)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-8"]


def test_one_process_resumes_what_two_began(settings, unstopped, tmp_path):
    """With the same global batch; the sums are then made in another order, so to rounding."""
    settings = settings | {"output": str(tmp_path / "run"), **SGD}
    succeed(run_training, tmp_path / "two", 2, settings=settings)
    trainer = train(settings, resume=str(tmp_path / "run/checkpoint-6"), per_device_train_batch_size=2)
    assert_near(weights(trainer.model), saved(tmp_path / "two"), 2e-6)
