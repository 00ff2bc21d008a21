"""Training on logits a teacher has stored: the same loss as with the teacher in the loop, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from video2lora.data import DatasetError, load_rows
from video2lora.modeling import Video2LoraModel, Video2LoraProcessor
from video2lora.testing import tiny_clip
from video2lora.trainer import Video2LoraTrainer, Video2LoraTrainingArguments
from video2lora.trainer.teacher import teach

SETTINGS: dict[str, Any] = {"num_frames": 3, "longest_edge": 48}


@pytest.fixture(scope="module")
def taught(tiny_vlm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Two rows with three queries, and the folder with all logits of their responses."""
    folder = tmp_path_factory.mktemp("taught")
    rows: list[dict[str, Any]] = []
    for seed in range(2):
        queries = [{"prompt": f"Question {i}?", "response": "yes " * (i + 1)} for i in range(seed + 1)]
        video = str(tiny_clip(folder / f"{seed}.mp4", seed=seed))
        rows.append({"id": f"r{seed}", "video": video, "conversations": queries})
    vlm = AutoModelForImageTextToText.from_pretrained(tiny_vlm_dir, dtype=torch.float32)
    processor = Video2LoraProcessor(AutoProcessor.from_pretrained(tiny_vlm_dir), **SETTINGS)
    vocab_size = vlm.get_output_embeddings().weight.shape[0]
    teach(vlm, processor, load_rows(rows), folder / "out", top_k=vocab_size, num_workers=1)
    return rows, folder / "out"


@pytest.fixture
def loss(tiny_vlm_dir: Path, tmp_path: Path) -> Any:
    """The loss of a batch under the arguments given."""

    def compute(rows: list[dict[str, Any]], **arguments: Any) -> float:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"rank": 2, "latent_size": 8, "num_latents": 2, "num_blocks": 1}
        model = Video2LoraModel.from_vlm(tiny_vlm_dir, dtype=torch.float32, **sizes, **SETTINGS)
        for scaler in model.hypernetwork.scaler_B.values():
            torch.nn.init.normal_(scaler, std=0.3)
        args = Video2LoraTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)
        trainer = Video2LoraTrainer(model, args, train_dataset=rows)
        batch = trainer.train_collator(list(trainer.train_dataset))
        return trainer.compute_loss(model, batch).item()

    return compute


def test_all_logits_stored_give_the_loss_of_the_teacher_in_the_loop(taught: Any, loss: Any) -> None:
    rows, folder = taught
    settings = {"kl_weight": 0.7, "ce_weight": 0.2}
    online = loss(rows, teacher="online", **settings)
    assert loss(rows, teacher=str(folder), **settings) == pytest.approx(online, rel=2e-3)  # stored in 16 bits
    assert abs(loss(rows, ce_weight=0.2) - online) > 0.05


def test_logits_of_something_else_are_refused(taught: Any, loss: Any) -> None:
    rows, folder = taught
    other = [{**rows[0], "conversations": [{"prompt": "Question 0?", "response": "no"}]}]
    with pytest.raises(DatasetError, match="query 0 of row 'r0' are of another response"):
        loss(other, kl_weight=1.0, teacher=str(folder))
    with pytest.raises(DatasetError, match="no logits for query 0 of row 'new'"):
        loss([{**rows[0], "id": "new"}], kl_weight=1.0, teacher=str(folder))


def test_a_batch_with_nothing_left_needs_no_teacher(taught: Any, loss: Any, tmp_path: Path) -> None:
    rows, folder = taught
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    assert loss([{**rows[0], "video": str(broken)}], kl_weight=1.0, ce_weight=0.0, teacher=str(folder)) == 0
