"""LoRA trained on one video: it learns, it leaves the base alone, and it depends on its sample alone."""

from __future__ import annotations

import json

import pytest
import torch

from video2lora.evaluation.conditions import CONDITIONS
from video2lora.evaluation.samples import Sample
from video2lora.modeling.processor import IGNORE_INDEX

from ..modeling.helpers import assert_same_lora, assert_unchanged, snapshot
from .conditions_setup import DECODING, FAMILIES, Setup, answer, facts, make_samples, prepare, setup_of

NAMES = ("lora_from_zero", "lora_from_adapter")
TRAINING = {"steps": 16, "learning_rate": 3e-3, "prompts": ["What is it?", "Describe it."], "max_new_tokens": 8}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return make_samples(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request) -> Setup:
    return setup_of(request.param)


def make(setup, name, **options):
    return CONDITIONS[name](setup.model, setup.processor, **(TRAINING | options))


def tuned(setup, samples, name, **options):
    condition = make(setup, name, **options)
    return [condition.fine_tune(item, DECODING) for item in prepare(setup, samples, condition)]


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_its_loss_and_leaves_the_model_as_it_was(setup, samples, name):
    before = snapshot(setup.model)
    answers = answer(setup, samples[:2], name, **TRAINING)
    assert_unchanged(setup.model, before)
    assert all(parameter.grad is None for parameter in setup.model.parameters())
    for several in answers:
        losses = json.loads(several[0].extra)["losses"]
        assert len(losses) == 16 and losses[-1] < 0.9 * losses[0]


def test_from_zero_begins_as_the_base_and_from_adapter_as_the_adapter(setup, samples):
    for name, other in zip(NAMES, ("no_adapter", "adapter"), strict=True):
        found = answer(setup, samples, name, **(TRAINING | {"steps": 0}))
        expected = facts(answer(setup, samples, other))
        frames = [[a.num_frames for a in several] for several in answer(setup, samples, "adapter")]
        without_frames = [[fact[:-1] for fact in several] for several in facts(found)]
        assert without_frames == [[fact[:-1] for fact in several] for several in expected]
        assert [[a.num_frames for a in several] for several in found] == frames
        assert {a.extra for several in found for a in several} == {'{"losses": []}'}


def test_rank_modules_and_layers_are_those_of_a_generated_adapter(setup, samples):
    [(zero, _)] = tuned(setup, samples[:1], "lora_from_zero")
    [(generated, _)] = tuned(setup, samples[:1], "lora_from_adapter", steps=0)
    assert zero.ranks == generated.ranks and zero.scaling == generated.scaling == 1.0
    for kind in ("lora_A", "lora_B"):
        shapes = [{n: t.shape for n, t in getattr(adapter, kind).items()} for adapter in (zero, generated)]
        assert shapes[0] == shapes[1]
    assert all(tensor.any() for tensor in zero.lora_B.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_result_depends_on_the_sample_alone(samples, name):
    setup = setup_of("smolvlm")
    together = tuned(setup, samples, name)
    for sample, (adapter, losses) in zip(samples, together, strict=True):
        torch.manual_seed(len(sample.id))
        [(alone, again)] = tuned(setup, [sample], name)
        assert_same_lora(alone, adapter)
        assert again == losses
    assert len({losses[0] for _, losses in together}) == len(samples)


def test_seed_and_sample_decide_the_random_factors(samples):
    setup = setup_of("smolvlm")
    drawn = {
        (seed, place): next(iter(adapter.lora_A.values()))
        for seed in (0, 1)
        for place, (adapter, _) in enumerate(tuned(setup, samples[:2], "lora_from_zero", steps=0, seed=seed))
    }
    tensors = list(drawn.values())
    assert not any(torch.equal(a, b) for n, a in enumerate(tensors) for b in tensors[:n])
    bound = tensors[0].shape[-1] ** -0.5
    assert 0.9 * bound < tensors[0].abs().max() <= bound


def test_the_training_text_is_what_the_base_says_with_the_video(setup, samples, monkeypatch):
    condition = make(setup, "lora_from_zero")
    [prepared] = prepare(setup, samples[:1], condition)
    ended = condition.vlm.get_input_embeddings().num_embeddings  # no such token: nothing ends
    monkeypatch.setattr(condition, "end_token_ids", {ended - 1})
    texts = condition._own_answers(prepared, DECODING)
    for row, prompt in enumerate(condition.prompts):
        turn = prepared.turns[prompt]
        with torch.no_grad():
            output = setup.model.generate(**turn, max_new_tokens=8, do_sample=False, eos_token_id=ended - 1)
        said = output[0, turn["input_ids"].shape[1] :].tolist()
        asked = setup.processor(text=[prompt])["input_ids"][0].tolist()
        kept = texts["attention_mask"][row].bool()
        assert texts["input_ids"][row][kept].tolist() == asked + said
        assert texts["labels"][row][kept].tolist() == [IGNORE_INDEX] * len(asked) + said


def test_training_time_is_preparation(samples, monkeypatch):
    setup = setup_of("smolvlm")
    condition = make(setup, "lora_from_zero")
    clock = iter(range(1000))
    monkeypatch.setattr(condition, "now", lambda: float(next(clock)))
    answers = condition.answer(prepare(setup, samples[:2], condition), DECODING)
    seconds = [{found.prepare_seconds for found in several} for several in answers]
    assert all(len(several) == 1 and min(several) > 1 for several in seconds)


def test_gradients_are_had_whatever_the_caller_switched_off(samples):
    setup = setup_of("smolvlm")
    condition = make(setup, "lora_from_zero")
    [prepared] = prepare(setup, samples[:1], condition)
    expected, _ = condition.fine_tune(prepared, DECODING)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found, _ = condition.fine_tune(prepared, DECODING)
        assert_same_lora(found, expected)
        assert not any(tensor.requires_grad for tensor in found.lora_A.values())
