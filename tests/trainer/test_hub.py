"""What a run leaves to be shared: no pickle, and a model that loads with the trained weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download
from transformers import TrainerCallback

from video2lora.modeling import Video2LoraModel, Video2LoraProcessor
from video2lora.trainer.checkpoints import is_complete

from .runs import assert_same, make_trainer, weights

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def pushed(repo_id: str, revision: str | None = None) -> Path:
    return Path(snapshot_download(repo_id, revision=revision))


def assert_shared(folder: Path, trainer) -> None:
    assert [path for pattern in PICKLES for path in folder.rglob(pattern)] == []
    arguments = json.loads((folder / "training_args.json").read_text())
    assert arguments["composition_probability"] == 0.25
    assert_same(weights(Video2LoraModel.from_pretrained(folder)), weights(trainer.model))


def test_pushed_at_the_end_it_loads_with_the_trained_weights(patched_hub, tiny_vlm_dir, rows, tmp_path):
    trainer = make_trainer(
        tiny_vlm_dir, tmp_path / "run", rows, max_steps=2, save_strategy="steps", save_steps=1,
        composition_probability=0.25, hub_model_id="owner/trained",
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    assert_shared(pushed("owner/trained"), trainer)
    assert not list(pushed("owner/trained").glob("checkpoint-*"))
    model = Video2LoraModel.from_pretrained("owner/trained")
    assert_same(weights(model), weights(trainer.model))
    processor = Video2LoraProcessor.from_pretrained("owner/trained")
    assert processor.num_frames == trainer.processor.num_frames


class OneByOne(TrainerCallback):
    """Waits for each push: of two at once, either commit may come last."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, *_: Any, **__: Any) -> None:
        self.trainer._finish_current_push()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushed_while_training(strategy, patched_hub, tiny_vlm_dir, rows, tmp_path):
    repo = f"owner/{strategy.replace('_', '-')}"
    trainer = make_trainer(
        tiny_vlm_dir, tmp_path / "run", rows, max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True,
        composition_probability=0.25, hub_model_id=repo, hub_strategy=strategy, hub_always_push=True,
    )  # fmt: skip
    trainer.add_callback(OneByOne(trainer))
    trainer.train()
    trainer._finish_current_push()
    folder = pushed(repo)
    checkpoints = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}
    if strategy in checkpoints:  # what the user asked for: the optimizer too, to resume from
        checkpoint = folder / checkpoints[strategy]
        assert is_complete(checkpoint) and (checkpoint / "optimizer.pt").exists()
        assert not (checkpoint / "training_args.bin").exists()
        with_vlm = make_trainer(tiny_vlm_dir, tmp_path / "again", rows, max_steps=3)
        with_vlm.train(resume_from_checkpoint=str(checkpoint))
        assert with_vlm.state.global_step == 3
    else:
        assert_shared(folder, trainer)
    assert_same(weights(Video2LoraModel.from_pretrained(folder)), weights(trainer.model))
    arguments = json.loads((tmp_path / "run/checkpoint-2/training_args.json").read_text())
    assert arguments["push_to_hub"] is True
