"""What a step of training changes, and that its numbers are those of a plain loop."""

from __future__ import annotations

import json
import logging
import math
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import HfArgumentParser, TrainerCallback

from video2lora.data import DatasetError
from video2lora.modeling import Video2LoraModel, Video2LoraProcessor
from video2lora.trainer import Video2LoraCollator, Video2LoraTrainer, Video2LoraTrainingArguments

from ..parity.model import PARITY, parity_model
from .runs import ARGUMENTS, SGD, assert_near, assert_same, losses, make_model, make_trainer, weights


class Gradients(TrainerCallback):
    """Which parameters ever had a gradient that is not zero."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.first: set[str] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        now = {name for name, p in named if p.grad is not None and p.grad.abs().max() > 0}
        self.first = now if self.first is None else self.first
        self.seen |= now


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_every_parameter_of_the_hypernetwork_moves_and_nothing_of_the_base(
    family, tiny_vlm_dir, qwen_dir, rows, tmp_path
):
    torch.manual_seed(0)
    base = tiny_vlm_dir if family == "smolvlm" else qwen_dir
    model = Video2LoraModel.from_vlm(  # as a user starts: the adapters change nothing yet
        base, dtype=torch.float32, latent_size=8, num_blocks=2, rank=2, num_latents=2, num_frames=2,
        num_self_attn_per_block=1, target_modules=["down_proj", "gate_proj"],
    )  # fmt: skip
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in model.vlm.named_buffers()}
    gradients = Gradients()
    trainer = make_trainer(
        base, tmp_path, rows, model, [gradients], weight_decay=0.0, max_steps=4, per_device_train_batch_size=2
    )
    trainer.train()
    names = {f"hypernetwork.{name}" for name, _ in model.hypernetwork.named_parameters()}
    assert gradients.seen == names
    assert gradients.first is not None and gradients.first < names  # the zero-initialised ones alone
    after = model.state_dict()
    assert set(after) == set(before)
    assert [name for name in names if torch.equal(after[name], before[name])] == []
    base_names = [name for name in before if not name.startswith("hypernetwork.")]
    assert [name for name in base_names if not torch.equal(after[name], before[name])] == []
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.vlm.named_buffers())
    assert all(p.grad is None and not p.requires_grad for p in model.vlm.parameters())
    assert not model.vlm.training
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.hypernetwork.parameters()}
    assert len(trainer.optimizer.state) == len(names)


# --- the same numbers as a plain loop ------------------------------------------------------------------------------


class ParityBatches:
    """A collator over the stored tensors: both videos with two and one queries, or one video with one; in turn."""

    def __init__(self, weights: tuple[float, float, float]) -> None:
        inputs = load_file(PARITY / "inputs.safetensors")
        self.video = {
            "input_ids": inputs["e2e_input_ids"],
            "attention_mask": inputs["e2e_attention_mask"],
            "pixel_values": inputs["e2e_pixel_values"].float(),
            "pixel_attention_mask": inputs["e2e_pixel_attention_mask"],
        }
        self.text = {name: inputs[f"text_{name}"] for name in ("input_ids", "attention_mask", "labels")}
        self.weights = torch.tensor(weights)
        self.given: list[dict[str, Any]] = []

    def __call__(self, rows: Any) -> dict[str, Any]:
        many = len(self.given) % 2 == 0
        queries, videos = ([0, 1, 1], [0, 1]) if many else ([1], [0])
        batch: dict[str, Any] = {name: tensor[queries] for name, tensor in self.text.items()}
        batch["video_inputs"] = {name: tensor[videos] for name, tensor in self.video.items()}
        batch |= {"queries_per_video": [2, 1] if many else [1], "segments_per_adapter": [1] * len(videos)}
        batch |= {"query_weights": self.weights[: len(queries)], "num_videos": len(videos)}
        self.given.append(batch)
        return batch | {"kept": list(range(len(videos))), "skipped": [], "query_ids": [("", 0)] * len(queries)}


def query_loss(model: Video2LoraModel, batch: dict[str, Any]) -> torch.Tensor:
    """Each query's cross-entropy over its answer, from the logits of the whole turn: `[queries]`."""
    lora = model.internalize(**batch["video_inputs"])
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**text, adapters=lora, queries_per_video=batch["queries_per_video"]).logits
    means = []
    for row, labels in zip(logits, batch["labels"], strict=True):
        places = [i for i in range(1, len(labels)) if labels[i] != -100]
        means.append(-torch.stack([row[i - 1].log_softmax(-1)[labels[i]] for i in places]).mean())
    return torch.stack(means)


def plain_loop(model: Video2LoraModel, batches: list[dict[str, Any]], accumulate: int, warmup: int) -> dict[str, list]:
    """The recipe in plain PyTorch: AdamW without decay of norms and biases, cosine with warm-up, clipping at 1."""
    steps = len(batches) // accumulate
    parameters = dict(model.hypernetwork.named_parameters())
    spared = [p for name, p in parameters.items() if "norm" in name or "bias" in name]
    decayed = [p for p in parameters.values() if not any(p is other for other in spared)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    log: dict[str, list] = {"loss": [], "grad_norm": []}
    for step in range(steps):
        warm = step / warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * (warm if step < warmup else cosine)
        several = batches[step * accumulate : (step + 1) * accumulate]
        queries = torch.cat([query_loss(model, batch) for batch in several])
        shares = torch.cat([batch["query_weights"] for batch in several])
        loss = (queries * shares).sum() / shares.sum()
        optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        norm = torch.sqrt(sum(((g.double() ** 2).sum() for g in grads), torch.zeros((), dtype=torch.float64)))
        for grad in grads:
            grad.mul_(min(1.0, 1.0 / (norm.item() + 1e-6)))
        optimizer.step()
        log["loss"].append(loss.item())
        log["grad_norm"].append(norm.item())
    return log


@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0), (0.25, 1.5, 0.125)])
def test_the_first_steps_on_the_parity_model_are_those_of_a_plain_loop(shares, tiny_vlm_dir, tmp_path):
    """With the recipe's own arguments, the defaults here; and with queries that a collator of one's own weighs."""
    collator = ParityBatches(shares)
    args = Video2LoraTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=1, max_steps=6,
        warmup_steps=2, num_eval_samples=0,
    )  # fmt: skip
    rows = [{"id": str(i), "video": "stored.mp4", "prompt": "p", "response": "r"} for i in range(12)]
    processor = Video2LoraProcessor.from_config(make_model(tiny_vlm_dir).config)
    trainer = Video2LoraTrainer(
        parity_model("r4_down"), args, rows, processing_class=processor, data_collator=collator
    )
    trainer.train()
    plain = parity_model("r4_down")
    expected = plain_loop(plain, collator.given[:12], accumulate=2, warmup=2)
    assert losses(trainer) == pytest.approx(expected["loss"], rel=1e-6)
    assert losses(trainer, "grad_norm") == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert max(expected["grad_norm"]) > 1  # so clipping was at work
    assert len(set(losses(trainer))) == 5  # the first of two steps of warm-up has learning rate 0
    assert_near(weights(trainer.model), weights(plain), 1e-5)


def test_the_defaults_are_the_recipe():
    args = Video2LoraTrainingArguments(output_dir="x", use_cpu=True)
    assert (args.learning_rate, args.warmup_steps, args.weight_decay, args.max_grad_norm) == (1e-4, 0.03, 0.01, 1.0)
    assert (args.lr_scheduler_type.value, args.seed) == ("cosine", 42)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)


# --- unequal queries, accumulation ---------------------------------------------------------------------------------


def test_accumulating_four_batches_of_two_equals_one_of_eight(tiny_vlm_dir, rows, tmp_path):
    settings = {"max_steps": 3, "composition_probability": 0.5} | SGD
    one = make_trainer(tiny_vlm_dir, tmp_path / "8", rows, per_device_train_batch_size=8, **settings)
    four = make_trainer(
        tiny_vlm_dir, tmp_path / "4x2", rows, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings
    )
    start = weights(one.model)
    one.train()
    four.train()
    assert losses(four) == pytest.approx(losses(one), rel=1e-6)
    assert losses(four, "grad_norm") == pytest.approx(losses(one, "grad_norm"), rel=1e-5)
    assert_near(weights(four.model), weights(one.model), 2e-6)
    assert any(not torch.equal(start[name], tensor) for name, tensor in weights(one.model).items())


def test_a_broken_video_weighs_nothing(tiny_vlm_dir, rows, broken, tmp_path):
    with_broken = [*rows[:3], {"id": "bad", "video": broken, "conversations": rows[5]["conversations"]}]
    settings = {"max_steps": 2, "per_device_train_batch_size": 4} | SGD
    trainer = make_trainer(tiny_vlm_dir, tmp_path / "broken", with_broken, **settings)
    trainer.train()
    clean = make_trainer(tiny_vlm_dir, tmp_path / "clean", rows[:3], **settings)
    clean.train()
    assert (trainer.num_videos, trainer.num_skipped) == (8, 2)
    assert losses(trainer) == pytest.approx(losses(clean), rel=1e-6)
    assert_near(weights(trainer.model), weights(clean.model), 2e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_videos_stop_the_run(workers, tiny_vlm_dir, rows, broken, tmp_path):
    bad = [{"id": f"bad-{i}", "video": broken, "prompt": "p", "response": "r"} for i in range(8)]
    trainer = make_trainer(
        tiny_vlm_dir, tmp_path, bad, max_bad_fraction=0.05, max_steps=20, per_device_train_batch_size=2,
        dataloader_num_workers=workers, weight_decay=0.0,
    )  # fmt: skip
    start = weights(trainer.model)
    with pytest.raises(DatasetError, match=r"6 of 6 videos could not be read.*max_bad_fraction=0.05"):
        trainer.train()
    assert_same(weights(trainer.model), start)  # two steps on dummies alone
    strict = make_trainer(tiny_vlm_dir, tmp_path, [*rows, bad[0]], max_bad_fraction=0.0, num_train_epochs=1)
    with pytest.raises(DatasetError, match="1 of . videos could not be read"):
        strict.train()


# --- precision, checkpointing, what a user sees --------------------------------------------------------------------


def test_autocast_to_bfloat16_trains(tiny_vlm_dir, rows, tmp_path):
    trainer = make_trainer(tiny_vlm_dir, tmp_path, rows, bf16=True, max_steps=2, per_device_train_batch_size=4)
    start = weights(trainer.model)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    now = weights(trainer.model)
    assert all(tensor.dtype == torch.float32 for tensor in now.values())
    assert [name for name in now if torch.equal(now[name], start[name])] == []
    exact = make_trainer(tiny_vlm_dir, tmp_path, rows, max_steps=2, per_device_train_batch_size=4)
    exact.train()
    assert losses(trainer) == pytest.approx(losses(exact), rel=1e-2)
    assert losses(trainer) != losses(exact)


def test_gradient_checkpointing_reaches_the_perceiver_alone(tiny_vlm_dir, rows, tmp_path):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4} | SGD
    fields = set(Video2LoraTrainingArguments.__dataclass_fields__)
    runs = []
    for name in [None, *sorted({"gradient_checkpointing", "activation_checkpointing"} & fields)]:
        trainer = make_trainer(tiny_vlm_dir, tmp_path, rows, **settings, **({name: True} if name else {}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert trainer.model.hypernetwork.gradient_checkpointing == (name is not None)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.vlm.modules())
        if name != "gradient_checkpointing":  # which newer versions of transformers call deprecated themselves
            assert [str(w.message) for w in caught if issubclass(w.category, FutureWarning)] == []
        runs.append(weights(trainer.model))
    assert len(runs) >= 2
    for run in runs[1:]:
        assert_near(run, runs[0], 1e-6)


def test_an_ordinary_run_says_nothing_of_ours_and_keeps_the_configuration(tiny_vlm_dir, rows, tmp_path, caplog):
    model = make_model(tiny_vlm_dir)
    model.save_pretrained(tmp_path / "before")
    caplog.clear()
    logger = logging.getLogger("transformers")  # which hands nothing on to the root logger
    logger.addHandler(caplog.handler)
    trainer = make_trainer(
        tiny_vlm_dir, tmp_path / "run", rows, model, eval_rows=rows[:2], max_steps=2, per_device_train_batch_size=2,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.train()
            trainer.save_model()
        finally:
            logger.removeHandler(caplog.handler)
    assert [str(w.message) for w in caught if "video2lora" in str(w.filename)] == []
    said = [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    # what SmolVLM's processor says to itself in transformers 5.17
    assert [message for message in said if not message.startswith("Kwargs passed to `processor.__call__`")] == []
    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-1"):
        assert json.loads((folder / "config.json").read_text()) == json.loads(
            (tmp_path / "before/config.json").read_text()
        )


# --- arguments -----------------------------------------------------------------------------------------------------


def test_arguments_can_be_parsed_from_a_command_line():
    parser: Any = HfArgumentParser(Video2LoraTrainingArguments)  # type: ignore[arg-type]
    command = "--output_dir x --use_cpu --lr_scheduler_type linear --kl_weight 0.5 --teacher online --max_segments 3"
    command += " --num_frames_range 4 32"
    (args,) = parser.parse_args_into_dataclasses(command.split())
    assert (args.lr_scheduler_type.value, args.kl_weight, args.max_segments) == ("linear", 0.5, 3)
    assert args.num_frames_range == [4, 32]
    assert args.max_queries_per_video is None and args.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"ce_weight": 0.0}, "both 0"),
        ({"kl_weight": -1.0}, "negative"),
        ({"kl_weight": 0.1}, "there is no teacher"),
        ({"kl_temperature": 0.0}, "positive"),
        ({"kl_weight": 1.0, "teacher": "folder", "kl_temperature": 2.0}, "know only 1"),
        ({"composition_probability": 1.5}, "1.5"),
        ({"max_segments": 1}, "at least 2"),
        ({"max_bad_fraction": -0.1}, "-0.1"),
        ({"max_queries_per_video": 0}, "at least 1"),
        ({"num_frames_range": [8, 4]}, r"1 <= least <= most, got \[8, 4\]"),
        ({"num_frames_range": [4]}, "two integers"),
        ({"num_frames_range": (0, 4)}, "least"),
        ({"num_frames_range": [1.5, 4]}, "integers"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Video2LoraTrainingArguments(output_dir=str(tmp_path), **ARGUMENTS | wrong)


def test_several_gpus_without_a_launcher_use_one(tiny_vlm_dir, rows, tmp_path):
    args = Video2LoraTrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
    assert args.n_gpu == 0
    args._n_gpu = 2
    Video2LoraTrainer(make_model(tiny_vlm_dir), args, rows)
    assert args.n_gpu == 1


def test_a_collator_of_ones_own_weighs_queries_and_hears_of_the_epoch(tiny_vlm_dir, rows, tmp_path):
    class First(Video2LoraCollator):
        """Only each batch's first query counts."""

        def __call__(self, given: Any) -> dict[str, Any]:
            batch = super().__call__(given)
            batch["query_weights"][1:] = 0.0
            return batch

    model = make_model(tiny_vlm_dir)
    args = Video2LoraTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", seed=3,
        logging_steps=1, per_device_train_batch_size=2, num_train_epochs=2, num_eval_samples=0, **SGD,
    )  # fmt: skip
    collator = First(Video2LoraProcessor.from_config(model.config), seed=3)
    trainer = Video2LoraTrainer(model, args, rows[:2], data_collator=collator)
    assert trainer.train_collator is collator
    trainer.train()
    assert int(collator._epoch) == 1
    plain = make_model(tiny_vlm_dir)
    batch = next(iter(trainer.get_train_dataloader()))
    names = ("input_ids", "attention_mask", "labels", "video_inputs", "queries_per_video", "segments_per_adapter")
    assert len(batch["query_weights"]) > 1
    expected = plain(**{name: batch[name] for name in names}).query_losses
    assert losses(trainer)[0] in [pytest.approx(value, rel=1e-5) for value in expected.tolist()]
