"""The divergence from the teacher: PyTorch's own, the published implementation's numbers, and its mixture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div, log_softmax

from video2lora.trainer import Video2LoraCollator
from video2lora.trainer.losses import kl_per_token, kl_top_k_per_token, mean_per_query

from .runs import make_model, make_trainer

PARITY = Path(__file__).parents[1] / "parity"


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_divergence_is_that_of_pytorch(temperature):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 7, 50)
    log_s, log_t = (log_softmax(logits / temperature, -1) for logits in (student, teacher))
    expected = kl_div(log_s, log_t, reduction="none", log_target=True)
    ours = kl_per_token(student, teacher, temperature)
    torch.testing.assert_close(ours, expected.sum(-1) * temperature**2, rtol=1e-5, atol=1e-6)
    assert kl_per_token(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    assert kl_per_token(student, student).abs().max() < 1e-6


@pytest.mark.parametrize("case", ["r4_down", "r16_down"])
@pytest.mark.parametrize("temperature", [1, 2])
def test_the_divergence_is_that_of_the_published_implementation(case, temperature):
    outputs = load_file(PARITY / case / "outputs.safetensors")
    if f"kl_T{temperature}" not in outputs:
        pytest.skip("not stored for this case")
    labels = load_file(PARITY / "inputs.safetensors")["text_labels"]
    teacher = load_file(PARITY / "vlm_outputs.safetensors")["text_logits"]
    chosen = labels[:, 1:] != -100
    student_logits, teacher_logits = (logits[:, :-1][chosen] for logits in (outputs["logits_1_1"], teacher))
    per_query = mean_per_query(kl_per_token(student_logits, teacher_logits, temperature), labels)
    torch.testing.assert_close(per_query, outputs[f"kl_T{temperature}_per_sample"], rtol=0, atol=1e-5)
    torch.testing.assert_close(per_query.mean(), outputs[f"kl_T{temperature}"], rtol=0, atol=1e-5)


def test_the_k_largest_logits_bound_the_divergence_and_all_of_them_give_it():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 40, dtype=torch.float32) * 2
    exact = kl_per_token(student, teacher)
    bounds = []
    for k in (1, 5, 20, 40):
        logits, token_ids = teacher.topk(k)
        bounds.append(kl_top_k_per_token(student, token_ids, logits, teacher.logsumexp(-1)))
    for looser, tighter in zip(bounds, [*bounds[1:], exact], strict=True):
        assert (looser <= tighter + 1e-5).all()
    torch.testing.assert_close(bounds[-1], exact, rtol=0, atol=1e-5)
    student.requires_grad_()
    (full,) = torch.autograd.grad(kl_per_token(student, teacher).sum(), student)
    logits, token_ids = teacher.topk(40)
    (ours,) = torch.autograd.grad(kl_top_k_per_token(student, token_ids, logits, teacher.logsumexp(-1)).sum(), student)
    torch.testing.assert_close(ours, full, rtol=0, atol=1e-5)


def test_a_query_without_labels_counts_as_zero():
    labels = torch.tensor([[-100, 5, 6], [-100, -100, -100], [7, -100, 8]])
    means = mean_per_query(torch.tensor([1.0, 3.0, 5.0]), labels)  # the first column predicts nothing
    assert means.tolist() == [2.0, 0.0, 5.0]


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_the_online_teacher_is_the_base_that_sees_the_video(family, tiny_vlm_dir, qwen_dir, rows, tmp_path):
    """Its logits, one turn at a time and without a batch around it, at the positions of the answer."""
    base = tiny_vlm_dir if family == "smolvlm" else qwen_dir
    model = make_model(base)
    trainer = make_trainer(
        base, tmp_path, rows[:3], model, kl_weight=0.3, ce_weight=0.6, kl_temperature=2.0, teacher="online"
    )
    batch = trainer.train_collator([trainer.train_dataset[i] for i in range(3)])
    names = ("input_ids", "attention_mask", "labels", "video_inputs", "teacher_inputs")
    counts = {name: batch[name] for name in ("queries_per_video", "segments_per_adapter")}
    assert counts["queries_per_video"] == [1, 2, 3]
    outputs = model(**{name: batch[name] for name in names}, **counts)
    processor, expected, student = trainer.processor, [], []
    for i, row in enumerate(rows[:3]):
        frames = processor.load_video(row["video"])
        lora = model.internalize(**processor(frames))[0]
        for turn in row["conversations"]:
            context = processor.encode_video(frames, turn["prompt"], add_generation_prompt=True)
            ids, labels = processor.encode_turn(turn["prompt"], turn["response"])
            start = next(place for place, label in enumerate(labels) if label != -100)
            answer = torch.tensor([ids[start:]])
            length = context["input_ids"].shape[1]
            inputs = context | {"input_ids": torch.cat([context["input_ids"], answer], 1)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "mm_token_type_ids" in inputs:
                types = inputs["mm_token_type_ids"]
                inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(answer)], 1)
            if hasattr(model.vlm.model, "rope_deltas"):
                model.vlm.model.rope_deltas = None
            with torch.no_grad():
                expected.append(model.vlm(**inputs).logits[0, length - 1 : -1])
            student.append(model(torch.tensor([ids]), adapters=lora).logits[0, start - 1 : -1])
        assert i < 3
    teacher_logits, student_logits = torch.cat(expected), torch.cat(student)
    torch.testing.assert_close(outputs.teacher_logits, teacher_logits, rtol=0, atol=2e-5)
    assert not outputs.teacher_logits.requires_grad
    assert outputs.label_logits.requires_grad

    loss = trainer.compute_loss(model, batch)
    tokens = (batch["labels"][:, 1:] != -100).sum(1).tolist()
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    by_hand = []
    for s, t, target in zip(
        student_logits.split(tokens), teacher_logits.split(tokens), targets.split(tokens), strict=True
    ):
        ce = -log_softmax(s, -1).gather(-1, target[:, None]).mean()
        log_s, log_t = log_softmax(s / 2, -1), log_softmax(t / 2, -1)
        by_hand.append(0.6 * ce + 0.3 * 4 * kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean())
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), rtol=1e-5, atol=0)
    loss.backward()
    assert all(p.grad is None for p in model.vlm.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.hypernetwork.parameters())


def test_a_dummy_batch_has_a_teacher_too(tiny_vlm_dir, broken, tmp_path):
    model = make_model(tiny_vlm_dir)
    trainer = make_trainer(tiny_vlm_dir, tmp_path, None, model, kl_weight=1.0, teacher="online")
    row = {"id": "bad", "video": broken, "start": None, "end": None, "queries": [{"prompt": "p", "response": "r"}]}
    assert isinstance(trainer.train_collator, Video2LoraCollator)
    loss = trainer.compute_loss(model, trainer.train_collator([row]))
    assert loss.item() == 0
    loss.backward()
    grads = [p.grad for p in model.hypernetwork.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)  # takes part in every collective
