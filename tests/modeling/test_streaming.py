"""Streaming hands over exactly what enters each decoder layer, and no more of the base runs than has to."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch

from video2lora.modeling.streaming import stream_hidden_states
from video2lora.modeling.targets import decoder_layers

from .helpers import num_hooks, text_batch


@pytest.fixture(scope="module")
def inputs(family, make_processor, clips):
    """Three clips as one padded batch."""
    return dict(make_processor(family)(videos=clips))


class Calls(Counter):
    """How often each module of a model runs, inside a `with` block."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def __enter__(self) -> Calls:
        def count(name):
            return lambda *_: self.update([name])

        modules = self.model.named_modules()
        self.handles = [module.register_forward_pre_hook(count(name)) for name, module in modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def test_what_is_streamed_is_what_the_base_reports(family, inputs):
    seen = {}
    stream_hidden_states(family.vlm, inputs, range(4), seen.__setitem__)
    reported = family.vlm(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    assert list(seen) == [0, 1, 2, 3] and len(reported) == 5
    for layer, states in seen.items():
        assert torch.equal(states, reported[layer])
    assert num_hooks(family.vlm) == 0


@pytest.mark.parametrize("stop_early", [True, False])
def test_what_runs(family, inputs, stop_early):
    layers = [
        name for name, module in family.vlm.named_modules() if any(module is x for x in decoder_layers(family.vlm))
    ]
    seen = []
    with Calls(family.vlm) as calls:
        stream_hidden_states(family.vlm, inputs, [0, 2], lambda place, _: seen.append(place), stop_early)
    assert seen == [0, 1] and len(layers) == 4
    assert [calls[name] for name in layers[:2]] == [1, 1] and calls[layers[3]] == (not stop_early)
    assert calls[f"{layers[2]}.mlp"] == (not stop_early), "the last wanted layer ran"
    heads = [name for name, module in family.vlm.named_modules() if module is family.vlm.get_output_embeddings()]
    assert len(heads) == 1 and calls[heads[0]] == 0


def test_gradient_mode_is_the_callers_and_the_base_builds_no_graph(family, inputs):
    modes = []

    def consume(_, states):
        modes.append((torch.is_grad_enabled(), states.requires_grad, torch.is_inference(states)))

    stream_hidden_states(family.vlm, inputs, [0, 3], consume)
    with torch.no_grad():
        stream_hidden_states(family.vlm, inputs, [0, 3], consume)
    assert modes == [(True, False, False)] * 2 + [(False, False, False)] * 2
    assert torch.is_grad_enabled()


@torch.no_grad()
def test_an_exception_in_consume_leaves_nothing(family, inputs):
    queries = text_batch(2)
    before = family.vlm(input_ids=queries).logits

    def consume(place, _):
        if place == 1:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        stream_hidden_states(family.vlm, inputs, range(4), consume)
    assert num_hooks(family.vlm) == 0
    assert torch.equal(family.vlm(input_ids=queries).logits, before)


def test_another_thread_may_use_the_base_meanwhile(smolvlm, clips, make_processor):
    inputs, queries = dict(make_processor(smolvlm)(videos=clips)), text_batch(2)
    with torch.no_grad():
        expected = smolvlm.vlm(input_ids=queries).logits
    answers, widths = [], []

    def answer():
        with torch.no_grad():
            answers.append(smolvlm.vlm(input_ids=queries).logits)

    here = threading.current_thread()

    def consume(_, states):
        widths.append(states.shape)
        assert threading.current_thread() is here, "another thread's states were consumed"
        other = threading.Thread(target=answer)
        other.start()
        other.join()

    stream_hidden_states(smolvlm.vlm, inputs, range(4), consume)
    assert widths == [(3, inputs["input_ids"].shape[1], 64)] * 4
    assert len(answers) == 4 and all(torch.equal(answer, expected) for answer in answers)


@torch.no_grad()
def test_qwens_position_offset_is_kept(qwen, clips, make_processor, make_model):
    """Qwen2.5-VL remembers a video's position offset for the answer: the text that follows is about no video."""
    from transformers import AutoModelForImageTextToText

    queries = text_batch(2, tokens=12)
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    fresh = AutoModelForImageTextToText.from_pretrained(qwen.path)
    expected, logits = fresh.generate(input_ids=queries, **arguments), fresh(input_ids=queries).logits
    model = make_model(AutoModelForImageTextToText.from_pretrained(qwen.path))
    inputs = make_processor(qwen)(videos=clips)
    model.internalize(**inputs)
    assert model.vlm.generate(input_ids=queries, **arguments).tolist() == expected.tolist()
    model.internalize(**inputs)
    assert torch.equal(model.vlm(input_ids=queries).logits, logits)
    model.internalize(**inputs)
    assert torch.equal(model(queries).logits, logits)

    # between a prompt with a video and its answer, another video may be internalized
    prompt = {
        name: value[:1]
        for name, value in make_processor(qwen)(videos=clips[:1]).items()
        if name != "pixel_values_videos"
    }
    prompt["pixel_values_videos"] = make_processor(qwen)(videos=clips[:1])["pixel_values_videos"]
    model.vlm(**prompt)
    kept = model.vlm.model.rope_deltas.clone()
    model.internalize(**inputs)
    assert torch.equal(model.vlm.model.rope_deltas, kept)
