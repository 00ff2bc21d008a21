"""The loss on a validation set, and the best checkpoint."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from video2lora.data import DatasetError
from video2lora.trainer.checkpoints import is_complete

from .runs import assert_same, losses, make_model, make_trainer, saved_weights, weights


class Climb(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step >= 3:
            for parameter in kwargs["model"].hypernetwork.parameters():
                parameter.grad.neg_()


def loss_by_hand(trainer, rows) -> float:
    """The mean over all queries, from one video and one query at a time."""
    model, processor, found = trainer.model, trainer.processor, []
    with torch.no_grad():
        for row in rows:
            lora = model.internalize(**processor(row["video"]))[0]
            for turn in row["conversations"]:
                ids, labels = (torch.tensor(part) for part in processor.encode_turn(turn["prompt"], turn["response"]))
                logits = model(ids[None], adapters=lora).logits[0]
                token_losses = -logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
                found.append(token_losses[labels[1:] != -100].mean().item())
    return sum(found) / len(found)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_is_the_mean_over_all_queries(batch_size, tiny_vlm_dir, rows, broken, tmp_path):
    settings = {"per_device_eval_batch_size": batch_size, "composition_probability": 1.0, "max_queries_per_video": 1}
    bad = {"id": "bad", "video": broken, "prompt": "p", "response": "r"}
    trainer = make_trainer(tiny_vlm_dir, tmp_path, None, eval_rows=[rows[0], bad, *rows[1:7]], **settings)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_by_hand(trainer, rows[:7]), rel=1e-6)
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(
        loss_by_hand(trainer, rows[:7]), rel=1e-6
    )


def test_an_evaluation_without_one_readable_video_is_no_loss_of_zero(tiny_vlm_dir, broken, tmp_path, caplog):
    bad = [{"id": f"bad-{i}", "video": broken, "prompt": "p", "response": "r"} for i in range(2)]
    trainer = make_trainer(tiny_vlm_dir, tmp_path, None, eval_rows=bad)
    with pytest.raises(DatasetError, match="no video of the evaluation set"):
        trainer.evaluate()
    assert "bad-0" in caplog.text and "bad-1" in caplog.text


def test_several_evaluation_sets(tiny_vlm_dir, rows, tmp_path):
    sets = {"long": rows[2:3], "short": rows[:2]}
    trainer = make_trainer(
        tiny_vlm_dir, tmp_path, rows[:2], eval_rows=sets, max_steps=2, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    for name, part in sets.items():
        assert len(losses(trainer, f"eval_{name}_loss")) == 2
        assert losses(trainer, f"eval_{name}_loss")[-1] == pytest.approx(loss_by_hand(trainer, part), rel=1e-5)


def test_the_best_checkpoint_is_kept_and_loaded(tiny_vlm_dir, rows, tmp_path):
    """From the fourth step on the loss is climbed, so the best is not the last."""
    trainer = make_trainer(
        tiny_vlm_dir, tmp_path, rows[:4], callbacks=[Climb()], eval_rows=rows[4:7], max_steps=6, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", learning_rate=0.05, lr_scheduler_type="constant", adam_beta1=0.0,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    found = losses(trainer, "eval_loss")
    best = found.index(min(found)) + 1
    assert best == 3, found
    assert trainer.state.best_metric == min(found)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert is_complete(tmp_path / f"checkpoint-{best}")
    assert_same(weights(trainer.model), saved_weights(tmp_path / f"checkpoint-{best}"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(found), rel=1e-6)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]


def test_evaluating_changes_nothing(tiny_vlm_dir, rows, tmp_path):
    """Not the weights, and not what is drawn in training."""
    settings = {"max_steps": 3, "composition_probability": 0.5, "max_queries_per_video": 1}
    plain = make_trainer(tiny_vlm_dir, tmp_path / "a", rows, **settings)
    plain.train()
    evaluated = make_trainer(
        tiny_vlm_dir, tmp_path / "b", rows, make_model(tiny_vlm_dir), eval_rows=rows[:3], eval_strategy="steps",
        eval_steps=1, **settings,
    )  # fmt: skip
    evaluated.train()
    assert_same(weights(evaluated.model), weights(plain.model))
