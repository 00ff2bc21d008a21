"""Datasets of torch: rows made by own code, with frames in memory, train as rows of files do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from video2lora.data import DatasetError
from video2lora.modeling import Video2LoraProcessor
from video2lora.trainer import Video2LoraCollator
from video2lora.trainer.checkpoints import last_complete_checkpoint

from .runs import (
    SGD,
    DrawnSquares,
    assert_near,
    assert_same,
    launch,
    losses,
    make_model,
    make_trainer,
    run_training,
    saved,
    succeed,
    train,
    weights,
)

COMPOSED: dict[str, Any] = {"composition_probability": 0.5, "max_segments": 3, "max_queries_per_video": 2}


def test_rows_go_through_untouched_and_train(tiny_vlm_dir, tmp_path):
    """No copy in arrow: the trainer holds the very dataset, and asks for its items."""
    dataset, held_out = DrawnSquares(6), DrawnSquares(3)
    trainer = make_trainer(
        tiny_vlm_dir, tmp_path, dataset, eval_rows={"drawn": held_out}, max_steps=3, per_device_train_batch_size=2,
        eval_strategy="steps", eval_steps=3, num_eval_samples=5, eval_max_new_tokens=2, **COMPOSED,
    )  # fmt: skip
    assert trainer.train_dataset is dataset and trainer.eval_dataset["drawn"] is held_out
    start = weights(trainer.model)
    trainer.train()
    assert [name for name, tensor in weights(trainer.model).items() if torch.equal(tensor, start[name])] == []
    assert len(losses(trainer)) == 3 and len(losses(trainer, "eval_drawn_loss")) == 1
    table = (tmp_path / "samples/step-3-drawn.md").read_text()
    assert all(f"drawn-{i} | row 0?" in table for i in range(3))
    assert trainer.predict(held_out).metrics["test_loss"] == pytest.approx(
        trainer.evaluate(held_out)["eval_loss"], rel=1e-6
    )
    trainer.create_model_card()
    assert "6 rows" in (tmp_path / "README.md").read_text()


def test_workers_draw_what_one_process_draws(tiny_vlm_dir, tmp_path):
    settings = {"rows": DrawnSquares(), "base": tiny_vlm_dir, "max_steps": 6, "per_device_train_batch_size": 2, **SGD}
    one, two = (
        train(settings | COMPOSED, output=tmp_path / str(workers), dataloader_num_workers=workers,
              dataloader_persistent_workers=workers > 0)
        for workers in (0, 2)
    )  # fmt: skip
    assert losses(one) == losses(two)
    assert_same(weights(one.model), weights(two.model))


def test_a_video_without_frames_is_left_out(tiny_vlm_dir, tmp_path):
    trainer = make_trainer(
        tiny_vlm_dir, tmp_path, DrawnSquares(4, hole=2), num_train_epochs=1, per_device_train_batch_size=4
    )
    trainer.train()
    assert (trainer.num_videos, trainer.num_skipped) == (4, 1)


def test_composed_of_frames_in_memory_as_of_arrays_of_them(tiny_vlm_dir):
    """A drawn video's segments are the processor's own spans of it (a frame a second)."""
    model = make_model(tiny_vlm_dir)
    processor = Video2LoraProcessor.from_config(model.config)
    row = DrawnSquares()[1]
    batch = Video2LoraCollator(processor, composition_probability=1.0, max_segments=2)([row])
    assert batch["segments_per_adapter"] == [2]
    parts = [processor(row["video"], start=a, end=b) for a, b in ((0, 4), (4, 8))]
    with torch.no_grad():
        whole = model.internalize([2], **batch["video_inputs"])
        first, second = (model.internalize(**part) for part in parts)
    rank = model.config.rank
    assert_near(
        {name: whole.lora_A[name] for name in whole.lora_A},
        {name: torch.cat([first.lora_A[name][:, :, :rank], second.lora_A[name]], dim=2) for name in whole.lora_A},
        1e-5,
    )


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, True)])
def test_killed_and_resumed(workers, persistent, tiny_vlm_dir, tmp_path):
    """In the second of two passes; with workers that live through both and hear of the epoch."""
    settings: dict[str, Any] = {
        "base": str(tiny_vlm_dir), "rows": DrawnSquares(), "num_train_epochs": 2, "per_device_train_batch_size": 2,
        "save_strategy": "steps", "save_steps": 1, "num_frames_range": [1, 4], **COMPOSED,
    }  # fmt: skip
    unstopped = train(settings, output=str(tmp_path / "unstopped"))
    settings |= {
        "output": str(tmp_path / "run"), "dataloader_num_workers": workers,
        "dataloader_persistent_workers": persistent,
    }  # fmt: skip
    assert launch(run_training, tmp_path / "killed", settings=settings | {"kill_step": 6}) == [-9]
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run/checkpoint-6")
    succeed(run_training, tmp_path / "resumed", settings=settings | {"resume": True})
    assert_same(saved(tmp_path / "resumed"), weights(unstopped.model))


def test_an_item_that_is_no_row_is_an_error(tiny_vlm_dir, tmp_path):
    class Wrong(DrawnSquares):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"frames": super().__getitem__(index)["video"]}

    with pytest.raises(DatasetError, match=r"expected a row .* got the keys \['frames'\]"):
        make_trainer(tiny_vlm_dir, tmp_path, Wrong(), max_steps=1).train()


def test_it_needs_no_datasets_library(tiny_vlm_dir, tmp_path):
    code = f"""
import sys
for name in ("datasets", "evaluate", "pandas", "pyarrow"):
    sys.modules[name] = None
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.trainer.runs import DrawnSquares, losses, make_trainer
base, output = {str(tiny_vlm_dir)!r}, {str(tmp_path)!r}
trainer = make_trainer(base, output, DrawnSquares(), eval_rows=DrawnSquares(2), max_steps=2)
trainer.train()
trainer.evaluate()
print(losses(trainer))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
