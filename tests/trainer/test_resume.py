"""Stopped by kill -9 and resumed in one process, the run ends in the very weights of one never stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.testing import save_tiny_vlm
from video2lora.trainer.checkpoints import MARKER, is_complete, last_complete_checkpoint, mark_complete

from .runs import (
    assert_same,
    launch,
    losses,
    make_model,
    make_trainer,
    run_training,
    saved,
    saved_weights,
    succeed,
    train,
    weights,
)

WRITERS = ["_save", "_save_optimizer_and_scheduler", "_save_rng_state", "_save_arguments", "mark_complete"]


@pytest.fixture(scope="module")
def settings(tiny_vlm_dir, rows, tmp_path_factory) -> dict[str, Any]:
    """Two passes of four steps, a checkpoint after each; everything random is at work."""
    return {
        "base": str(tiny_vlm_dir),
        "rows": rows,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "composition_probability": 0.5,
        "max_segments": 3,
        "max_queries_per_video": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }


@pytest.fixture(scope="module")
def unstopped(settings, tmp_path_factory) -> tuple[dict, list[float]]:
    trainer = train(settings, output=str(tmp_path_factory.mktemp("unstopped")))
    assert trainer.state.global_step == 8
    return weights(trainer.model), losses(trainer)


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (4, 0), (6, 0), (6, 2)])
def test_killed_in_a_step(step, workers, settings, unstopped, tmp_path):
    """In the first pass, at its end, and in the second; with data loader workers too."""
    settings = settings | {"output": str(tmp_path / "run"), "dataloader_num_workers": workers}
    assert launch(run_training, tmp_path / "killed", settings=settings | {"kill_step": step}) == [-9]
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / f"run/checkpoint-{step}")
    succeed(run_training, tmp_path / "resumed", settings=settings | {"resume": True})
    assert_same(saved(tmp_path / "resumed"), unstopped[0])
    log = json.loads((tmp_path / "resumed/log.json").read_text())
    assert [entry["loss"] for entry in log if "loss" in entry] == unstopped[1]


@pytest.fixture(scope="module")
def streamed(settings, tmp_path_factory) -> Callable[[int], tuple[dict[str, Any], dict]]:
    """Of a number of workers: settings of a run on a stream, and what it ends in if it is not stopped."""

    @cache
    def streamed(workers: int) -> tuple[dict[str, Any], dict]:
        columns = ("id", "video", "conversations")
        rows = Dataset.from_list([{name: row[name] for name in columns} for row in settings["rows"][:5]])
        stream = rows.to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=3)
        ours = settings | {"rows": stream, "max_steps": 8, "dataloader_num_workers": workers}
        del ours["num_train_epochs"]
        output = str(tmp_path_factory.mktemp("streamed"))
        return ours, weights(train(ours, output=output, save_strategy="no").model)

    return streamed


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (3, 0), (5, 0), (6, 2), (7, 0)])
def test_a_stream_killed_in_any_pass(step, workers, streamed, tmp_path):
    """Three steps a pass, the last of one batch; shuffled anew in each; killed in and between the passes."""
    settings, unstopped = streamed(workers)
    settings = settings | {"output": str(tmp_path / "run")}
    assert launch(run_training, tmp_path / "killed", settings=settings | {"kill_step": step}) == [-9]
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / f"run/checkpoint-{step}")
    succeed(run_training, tmp_path / "resumed", settings=settings | {"resume": True})
    assert_same(saved(tmp_path / "resumed"), unstopped)


@pytest.mark.parametrize("writer", WRITERS)
def test_killed_while_a_checkpoint_is_written(writer, settings, unstopped, tmp_path):
    """Right after each part of it; with one checkpoint to be kept, the last whole one is still there."""
    settings = settings | {"output": str(tmp_path / "run"), "save_total_limit": 1}
    assert launch(run_training, tmp_path / "killed", settings=settings | {"kill_writing": (3, writer)}) == [-9]
    assert (tmp_path / "run/checkpoint-3").is_dir() and not is_complete(tmp_path / "run/checkpoint-3")
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run/checkpoint-2")
    trainer = train(settings | {"resume": True})
    assert_same(weights(trainer.model), unstopped[0])
    assert losses(trainer) == unstopped[1]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_second_run_in_the_same_folder_takes_the_mark_away_first(settings, tmp_path):
    """What a kill leaves of an overwritten checkpoint is a mixture of two runs, and no checkpoint."""
    settings = settings | {"output": str(tmp_path / "run"), "max_steps": 2}
    train(settings)
    before = saved_weights(tmp_path / "run/checkpoint-2")
    codes = launch(run_training, tmp_path / "killed", settings=settings | {"kill_writing": (1, "_save"), "seed": 7})
    assert codes == [-9]
    assert not is_complete(tmp_path / "run/checkpoint-1")
    assert is_complete(tmp_path / "run/checkpoint-2")
    assert_same(saved_weights(tmp_path / "run/checkpoint-2"), before)


def test_the_limit_is_recorded_and_holds(settings, tmp_path):
    trainer = train(settings, output=str(tmp_path), save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-8"]
    arguments = json.loads((tmp_path / "checkpoint-8/training_args.json").read_text())
    assert (arguments["save_total_limit"], trainer.args.save_total_limit) == (2, 2)
    assert not list(tmp_path.rglob("training_args.bin"))


def test_folders_that_are_no_whole_checkpoint(settings, tmp_path):
    with pytest.raises(ValueError, match="nothing to resume from"):
        train(settings, output=str(tmp_path / "empty"), resume=True)
    run = tmp_path / "run"
    train(settings, output=str(run), max_steps=2)
    (run / "checkpoint-9").mkdir()
    (run / "checkpoint-best").mkdir()
    mark_complete(run / "checkpoint-best", 1)
    (run / "checkpoint-11").write_text("a file")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    for folder in (run / "checkpoint-9", run, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{folder} is no complete checkpoint"):
            train(settings, output=str(run), resume=str(folder))
    (run / "checkpoint-2" / MARKER).unlink()
    assert last_complete_checkpoint(run) == str(run / "checkpoint-1")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"rank": 4}, ["rank 2", "now 4"]),
        ({"target_modules": ["up_proj"]}, [r"target_modules \['down_proj'\]", r"now \['up_proj'\]"]),
        ({"layers_to_transform": [0, 1]}, ["layers_to_transform None", r"now \[0, 1\]"]),
        ({"latent_size": 16}, ["latent_size 8", "now 16"]),
        ({"lora_scaling": 1.0}, ["lora_scaling", "now 1.0"]),
    ],
)
def test_a_checkpoint_of_another_hypernetwork_is_refused(fields, names, settings, checkpoint, tmp_path):
    trainer = make_trainer(
        settings["base"], tmp_path, settings["rows"], make_model(settings["base"], **fields), max_steps=2
    )
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    for name in names:
        assert error.match(name)


def test_a_checkpoint_of_another_base_is_refused(settings, checkpoint, tmp_path):
    other = save_tiny_vlm("smolvlm", tmp_path / "other", seed=5)
    trainer = make_trainer(other, tmp_path / "run", settings["rows"], max_steps=2)
    with pytest.raises(ValueError, match="base_model_name_or_path") as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert settings["base"] in str(error.value) and str(other) in str(error.value)


@pytest.fixture(scope="module")
def checkpoint(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    train(settings, output=str(folder), max_steps=1)
    shutil.rmtree(folder / "checkpoint-1/vlm_processor")  # not needed to go on
    return folder / "checkpoint-1"


def test_a_checkpoint_that_holds_its_base_is_trained_further_and_resumed(settings, tmp_path):
    """As the trained example is: its base has no name, and is nowhere but in the checkpoint."""
    model = make_model(settings["base"])
    processor = Video2LoraProcessor.from_config(model.config)
    model.config.base_model_name_or_path = model.config.base_model_revision = None
    model.save_pretrained(tmp_path / "bundle", bundle_base=True)
    processor.save_pretrained(tmp_path / "bundle")
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "per_device_train_batch_size": 2}
    found = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-1"))):
        loaded = Video2LoraModel.from_pretrained(tmp_path / "bundle")
        trainer = make_trainer(settings["base"], tmp_path / name, settings["rows"], loaded, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        found.append(weights(trainer.model))
    assert_same(*found)
    again = Video2LoraModel.from_pretrained(tmp_path / "resumed" / "checkpoint-3")
    assert again.config.bundle_base
    assert_same(weights(again), found[0])
    assert_same(again.vlm.state_dict(), model.vlm.state_dict())


def test_a_base_without_a_name_is_refused_before_the_first_step(settings, tmp_path):
    model = make_model(settings["base"])
    trainer = make_trainer(settings["base"], tmp_path, settings["rows"], model, save_strategy="steps", max_steps=2)
    model.config.base_model_name_or_path = None
    with pytest.raises(ValueError, match="no name or path"):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.glob("checkpoint-*"))
