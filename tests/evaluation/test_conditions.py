"""Conditions answer what plain generation answers, one query at a time, and count what they really used."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from video2lora.evaluation import condition as condition_module
from video2lora.evaluation.condition import batches_of, cached_tokens, expected_lengths, longest_first
from video2lora.evaluation.condition_video import CAPTION_TEMPLATE
from video2lora.evaluation.conditions import CONDITIONS, Decoding
from video2lora.evaluation.samples import Sample
from video2lora.modeling.streaming import keep_rope_deltas
from video2lora.pipelines import VideoToLoraPipeline

from .conditions_setup import (
    DECODING,
    FAMILIES,
    Setup,
    answer,
    ask,
    by_itself,
    facts,
    make_samples,
    prepare,
    setup_of,
    texts,
    token_ids,
)

FEW = {"steps": 2, "prompts": ["What is it?", "And where?"], "max_new_tokens": 4}
CHEAP = {"lora_from_zero": FEW, "lora_from_adapter": FEW, "caption": {"max_new_tokens": 5}}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return make_samples(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request) -> Setup:
    return setup_of(request.param)


def frames_of(setup: Setup, sample: Sample):
    return setup.processor.load_video(sample.video, start=sample.start, end=sample.end)


def turn_of(setup: Setup, sample: Sample, prompt: str) -> dict[str, torch.Tensor]:
    return setup.processor.encode_video(frames_of(setup, sample), prompt, add_generation_prompt=True)


def text_of(setup: Setup, prompt: str) -> dict[str, torch.Tensor]:
    return dict(setup.processor(text=[prompt]))


def adapter_of(setup: Setup, sample: Sample):
    with torch.no_grad():
        return setup.model.internalize(**setup.processor.encode_video(frames_of(setup, sample)))


def test_video_is_plain_generation_with_the_video_in_context(setup, samples):
    answers = answer(setup, samples, "video")
    for sample, several in zip(samples, answers, strict=True):
        for question, found in zip(sample.questions, several, strict=True):
            inputs = turn_of(setup, sample, question.prompt)
            with keep_rope_deltas(setup.model.vlm):
                assert found.text == by_itself(setup, inputs)
            assert found.context_tokens == inputs["input_ids"].shape[1]
            assert found.visual_tokens == setup.processor.count_visual_tokens(inputs["input_ids"]) > 0
            assert found.num_frames == len(frames_of(setup, sample).frames)
    assert len({found.text for several in answers for found in several}) > 2  # the noise depends on the input


def test_kv_cache_says_what_video_says(setup, samples):
    decoding = replace(DECODING, max_new_tokens=12)
    expected = token_ids(setup, samples, "video", decoding)
    for batch_size in (1, 2, 8):
        assert token_ids(setup, samples, "kv_cache", replace(decoding, batch_size=batch_size)) == expected


def test_kv_cache_computes_the_prefix_once_and_nothing_of_it_again(setup, samples):
    lengths: list[int] = []
    handle = setup.model.vlm.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        [found] = answer(setup, samples[2:3], "kv_cache", replace(DECODING, batch_size=1, max_new_tokens=1))
    finally:
        handle.remove()
    prefix, *rest = lengths
    assert [prefix + length for length in rest] == [item.context_tokens for item in found]
    assert prefix > found[0].visual_tokens and max(rest) < prefix


def test_adapter_is_the_pipelines_adapter_without_visual_tokens(setup, samples):
    answers = answer(setup, samples, "adapter")
    pipe = VideoToLoraPipeline(model=setup.model, processor=setup.processor, device="cpu")
    for sample, several in zip(samples, answers, strict=True):
        adapter = pipe(frames_of(setup, sample))
        for question, found in zip(sample.questions, several, strict=True):
            inputs = text_of(setup, question.prompt)
            assert found.text == by_itself(setup, inputs, adapters=adapter)
            assert (found.context_tokens, found.visual_tokens) == (inputs["input_ids"].shape[1], 0)
            assert found.num_frames == len(frames_of(setup, sample).frames)
    assert texts(answers) != texts(answer(setup, samples, "no_adapter"))


def test_no_adapter_is_the_base_with_the_text_alone(setup, samples):
    for sample, several in zip(samples, answer(setup, samples, "no_adapter"), strict=True):
        for question, found in zip(sample.questions, several, strict=True):
            inputs = text_of(setup, question.prompt)
            assert found.text == by_itself(setup, inputs)
            assert (found.context_tokens, found.visual_tokens) == (inputs["input_ids"].shape[1], 0)
            assert (found.num_frames, found.prepare_seconds) == (0, 0.0)


def test_other_adapter_is_the_partners(setup, samples):
    answers = answer(setup, samples, "other_adapter")
    for sample, partner, several in zip(samples, [2, 2, 3, 0], answers, strict=True):
        adapter = adapter_of(setup, samples[partner])
        for question, found in zip(sample.questions, several, strict=True):
            assert found.text == by_itself(setup, text_of(setup, question.prompt), adapters=adapter)
            assert found.extra == samples[partner].id
            assert found.num_frames == len(frames_of(setup, samples[partner]).frames)


def test_caption_is_answered_from_as_text(setup, samples):
    answers = answer(setup, samples, "caption", max_new_tokens=9, prompt="What is it?")
    for sample, several in zip(samples, answers, strict=True):
        with keep_rope_deltas(setup.model.vlm):
            caption = by_itself(setup, turn_of(setup, sample, "What is it?"), 9)
        for question, found in zip(sample.questions, several, strict=True):
            assert found.extra == caption
            inputs = text_of(setup, CAPTION_TEMPLATE.format(caption=caption, prompt=question.prompt))
            assert found.text == by_itself(setup, inputs)
            assert (found.context_tokens, found.visual_tokens) == (inputs["input_ids"].shape[1], 0)


def test_a_caption_spells_no_special_token(samples, monkeypatch):
    setup = setup_of("smolvlm")
    condition = CONDITIONS["caption"](setup.model, setup.processor)
    read = condition.read
    monkeypatch.setattr(condition, "read", lambda ids: (" a <image> of <end_of_utterance>it ", read(ids)[1]))
    [[found]] = condition.answer(prepare(setup, samples[3:4], condition), DECODING)
    assert found.extra == "a  of it" and found.visual_tokens == 0


def test_braces_in_a_caption_or_prompt_stay():
    assert CAPTION_TEMPLATE.format(caption="{x}", prompt="{y}").endswith("{x}\n\n{y}")


def test_segments_are_one_adapter_of_their_parts(setup, samples):
    names = {}
    for keep in (None, [0], [1]):
        options = {} if keep is None else {"keep_segments": keep}
        condition = CONDITIONS["adapter"](setup.model, setup.processor, segments=2, **options)
        names[condition.name] = condition.settings()
        found = condition.answer(prepare(setup, samples[:1], condition), DECODING)[0]
        spans = [(0.0, 2.0), (2.0, 4.0)]
        spans = spans if keep is None else [spans[place] for place in keep]
        parts = [setup.processor.load_video(samples[0].video, start=start, end=end) for start, end in spans]
        turns = setup.processor.pad([setup.processor.encode_video(part) for part in parts])
        with torch.no_grad():
            adapter = setup.model.internalize([len(parts)], **turns)
        for question, item in zip(samples[0].questions, found, strict=True):
            assert item.text == by_itself(setup, text_of(setup, question.prompt), adapters=adapter)
            assert item.num_frames == 4 * len(parts)
    assert list(names) == ["adapter_2_segments", "adapter_segment_1_of_2", "adapter_segment_2_of_2"]


@pytest.mark.parametrize("name", CONDITIONS)
def test_an_answer_does_not_depend_on_its_batch(setup, samples, name):
    options = CHEAP.get(name, {})
    together = facts(answer(setup, samples, name, replace(DECODING, batch_size=8), **options))
    assert together == facts(answer(setup, samples, name, replace(DECODING, batch_size=2), **options))
    condition = CONDITIONS[name](setup.model, setup.processor, **options)
    alone = [condition.answer([item], DECODING)[0] for item in prepare(setup, samples, condition)]
    assert together == facts(alone)


@pytest.mark.parametrize("name", ["video", "adapter", "no_adapter", "other_adapter", "lora_from_adapter"])
def test_long_answers_share_batches(samples, name, monkeypatch):
    setup = setup_of("smolvlm")
    mixed = [
        replace(
            sample,
            questions=tuple(
                replace(question, task="colour" if number else "caption", references=("red" if number else "a" * 40,))
                for number, question in enumerate(sample.questions)
            ),
        )
        for sample in samples
    ]
    options = {"steps": 0} if name == "lora_from_adapter" else {}  # only what is asked is generated
    condition = CONDITIONS[name](setup.model, setup.processor, **options)
    prepared = prepare(setup, mixed, condition)
    expected = facts(condition.answer(prepared, replace(DECODING, batch_size=100)))
    batches, generate = [], condition.generate
    monkeypatch.setattr(
        condition,
        "generate",
        lambda inputs, *given, **options: batches.append(inputs) or generate(inputs, *given, **options),
    )
    assert facts(condition.answer(prepared, replace(DECODING, batch_size=4))) == expected
    prompts = [setup.processor.tokenizer.batch_decode(inputs["input_ids"]) for inputs in batches]
    first = [question.prompt for question in (sample.questions[0] for sample in mixed)]
    # of seven questions four are captions: all in the first batch, in the order of the samples
    assert [len(rows) for rows in prompts] == [4, 3]
    assert all(prompt in row for prompt, row in zip(first, prompts[0], strict=True))


def test_expected_lengths_are_those_of_the_task(samples):
    setup = setup_of("smolvlm")
    one, other = (
        replace(samples[2].questions[i], task="a", references=refs) for i, refs in ((0, ("xx", "x")), (1, ()))
    )
    item = prepare(setup, [replace(samples[2], questions=(one, other, samples[2].questions[2]))])[0]
    lengths = expected_lengths([item])
    assert lengths == [[1.0, 1.0, 3.0]]
    assert longest_first([item.prompts], lengths) == [(0, 2), (0, 0), (0, 1)]
    assert longest_first([item.prompts]) == [(0, 0), (0, 1), (0, 2)]
    assert longest_first([item.prompts], lengths, [[7, 8, 9]]) == [(0, 2), (0, 1), (0, 0)]
    assert longest_first([item.prompts], lengths=[[7, 9, 8]]) == [(0, 1), (0, 2), (0, 0)]


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_was_not_prepared_ahead_is_made_when_it_is_needed(samples, name):
    setup, options = setup_of("smolvlm"), CHEAP.get(name, {})
    condition = CONDITIONS[name](setup.model, setup.processor, **options)
    prepared = prepare(setup, samples, condition)
    bare = [replace(item, turns={}) for item in prepared]
    assert facts(condition.answer(bare, DECODING)) == facts(condition.answer(prepared, DECODING))


@pytest.mark.parametrize("name", ["adapter", "other_adapter"])
def test_a_video_is_internalized_once_for_all_its_questions(setup, samples, name, monkeypatch):
    videos: list[int] = []
    generate_segments = setup.model.generate_segments

    def counting(**inputs):
        videos.append(len(inputs["input_ids"]))
        return generate_segments(**inputs)

    monkeypatch.setattr(setup.model, "generate_segments", counting)
    answer(setup, samples, name)
    # s0 and s1 are about one video: both have the third as partner
    assert videos == ([3, 1] if name == "adapter" else [3])


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_the_vision_tower_sees_a_video_once_for_all_its_questions(samples, family):
    setup = setup_of(family)
    seen: list[int] = []
    tower = setup.model.vlm.base_model.vision_model
    handle = tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs.get("pixel_values", args[0] if args else None))),
        with_kwargs=True,
    )
    try:
        answer(setup, samples, "video", replace(DECODING, batch_size=1))
    finally:
        handle.remove()
    assert seen == [4, 4, 3, 2]


def test_long_contexts_do_not_share_a_batch(samples, monkeypatch):
    setup, rows = setup_of("smolvlm"), []
    condition = CONDITIONS["video"](setup.model, setup.processor)
    generate = setup.model.generate
    monkeypatch.setattr(
        setup.model, "generate", lambda **inputs: rows.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    prepared = prepare(setup, samples, condition)
    expected = facts(condition.answer(prepared, DECODING))
    assert condition.tokens_at_once > 2**20  # a tiny model's KV cache is tiny
    monkeypatch.setattr(condition, "tokens_at_once", 100)
    assert facts(condition.answer(prepared, DECODING)) == expected
    assert rows == [3, 3, 1] + [1] * 7
    monkeypatch.undo()
    monkeypatch.setattr(condition_module, "MASK_AT_ONCE", 2 * 60**2)
    lengths = [turn["input_ids"].shape[1] for item in prepared for turn in item.turns.values()]
    assert facts(condition.answer(prepared, DECODING)) == expected, lengths


def test_batches_keep_order_and_limits(monkeypatch):
    monkeypatch.setattr(condition_module, "CONTEXT_TOKENS_AT_ONCE", 10)
    assert list(batches_of([2, 2, 2, 2, 5, 5, 6, 11, 1], 3)) == [
        slice(0, 3),
        slice(3, 5),
        slice(5, 6),
        slice(6, 7),
        slice(7, 8),
        slice(8, 9),
    ]
    assert list(batches_of([], 3)) == []
    assert list(batches_of([2] * 5, 9, tokens_at_once=4)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    monkeypatch.setattr(condition_module, "MASK_AT_ONCE", 18)
    assert list(batches_of([3, 3, 3, 2, 2], 9, tokens_at_once=99)) == [slice(0, 3), slice(3, 5)]  # no mask in either
    assert list(batches_of([3, 2, 3], 9, tokens_at_once=99)) == [slice(0, 2), slice(2, 3)]


@pytest.mark.parametrize(
    "sizes, dtype, tokens",
    [
        ({"num_hidden_layers": 32, "num_key_value_heads": 5, "head_dim": 64}, torch.bfloat16, 65536),  # 500M: 2.7 GB
        ({"num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 32}, torch.bfloat16, 2**31 // 3072),
        ({"num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 32}, torch.float32, 2**31 // 6144),
        ({"num_hidden_layers": 6, "num_attention_heads": 8, "hidden_size": 256}, torch.float32, 2**31 // 12288),
    ],
)
def test_small_models_have_more_contexts_in_a_batch(sizes, dtype, tokens):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**sizes))
    assert cached_tokens(SimpleNamespace(config=config, dtype=dtype)) == tokens


def test_short_answers_do_not_wait_for_long_ones():
    expected = [80.0] * 100 + [30.0] * 10 + [16.0] * 60 + [15.0] * 300
    # 16 is more than half of 30
    assert list(batches_of([1] * 470, 1000, expected)) == [slice(0, 100), slice(100, 170), slice(170, 470)]
    limited = [slice(0, 100), slice(100, 170), slice(170, 370), slice(370, 470)]
    assert list(batches_of([1] * 470, 200, expected)) == limited
    few = [80.0] * 63 + [10.0] * 400
    assert list(batches_of([1] * 463, 1000, few)) == [slice(0, 64), slice(64, 463)]
    assert list(batches_of([1] * 463, 1000)) == [slice(0, 463)]


def test_an_answer_ends_with_its_turn(samples):
    setup = setup_of("smolvlm")
    for name in ("video", "adapter", "no_adapter", "kv_cache"):
        whole = answer(setup, samples[:1], name)[0][0]
        condition = CONDITIONS[name](setup.model, setup.processor)
        condition.end_token_ids = set(range(setup.model.config.get_text_config().vocab_size))
        [found, _] = condition.answer(prepare(setup, samples[:1], condition), DECODING)[0]
        assert (found.num_tokens, found.ended) == (1, True)
        assert (whole.num_tokens, whole.ended) == (6, False)


def test_ends_are_those_of_the_base_or_else_the_tokenizers(monkeypatch):
    setup = setup_of("smolvlm")
    config = setup.model.vlm.generation_config
    for eos, expected in ((7, {7}), ([7, 8], {7, 8}), (None, setup.processor.end_token_ids)):
        monkeypatch.setattr(config, "eos_token_id", eos)
        assert CONDITIONS["no_adapter"](setup.model, setup.processor).end_token_ids == expected


def test_decoding_is_greedy_whatever_the_bases_generation_config_says(samples, monkeypatch):
    setup = setup_of("qwen2_5_vl")
    expected = facts(answer(setup, samples, "video"))
    config = setup.model.vlm.generation_config
    for name, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "num_beams": 2}.items():
        monkeypatch.setattr(config, name, value)
    assert facts(answer(setup, samples, "video")) == expected


def test_half_a_character_is_not_said(samples):
    setup = setup_of("smolvlm")
    condition = CONDITIONS["no_adapter"](setup.model, setup.processor)
    ids = setup.processor.tokenizer("字")["input_ids"]
    assert condition.read(ids) == ("字", False)
    assert condition.read(ids[:-1]) == ("", False)
    assert condition.read([]) == ("", False)


def test_nothing_stays_on_the_model(setup, samples):
    def state():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in setup.model.modules())
        return hooks, [m.rope_deltas for m in setup.model.modules() if hasattr(m, "rope_deltas")]

    for module in setup.model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None  # the model is shared: what another test left would hide what is left here
    before = state()
    for name in CONDITIONS:
        answer(setup, samples[:2] + samples[3:], name, **CHEAP.get(name, {}))
        assert state() == before, name


def test_times_are_shares_of_their_batch(samples, monkeypatch):
    setup = setup_of("smolvlm")
    clock = iter(range(1000))
    condition = CONDITIONS["adapter"](setup.model, setup.processor)
    monkeypatch.setattr(condition, "now", lambda: float(next(clock)))
    answers = condition.answer(prepare(setup, samples, condition), DECODING)
    assert {found.prepare_seconds for several in answers for found in several} == {1 / 4}
    flat = [found.answer_seconds for several in answers for found in several]
    assert flat == [1 / 3] * 6 + [1.0]


def test_names_and_settings(samples):
    setup = setup_of("smolvlm")
    made = [condition(setup.model, setup.processor) for condition in CONDITIONS.values()]
    assert [condition.name for condition in made] == list(CONDITIONS)
    for condition in made:
        assert json.loads(json.dumps(condition.settings())) == condition.settings()
    few = CONDITIONS["lora_from_zero"](setup.model, setup.processor, steps=5)
    assert (few.name, few.settings()["steps"]) == ("lora_from_zero_5_steps", 5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adapter", {"segments": 0}),
        ("adapter", {"segments": 2, "keep_segments": [2]}),
        ("adapter", {"segments": 2, "keep_segments": [0, 0]}),
        ("adapter", {"segments": 2, "keep_segments": []}),
        ("adapter", {"segments": 2, "keep_segments": [0.0, 1.0]}),
        ("adapter", {"segments": 2, "keep_segments": ["0"]}),
        ("caption", {"max_new_tokens": 0}),
        ("lora_from_zero", {"steps": -1}),
        ("lora_from_zero", {"learning_rate": 0.0}),
        ("lora_from_adapter", {"prompts": "one text"}),
        ("lora_from_adapter", {"prompts": ["a text", {"of": "YAML"}]}),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options):
    setup = setup_of("smolvlm")
    with pytest.raises(ValueError, match="expected|at least one"):
        CONDITIONS[name](setup.model, setup.processor, **options)


def test_what_is_missing_is_named(samples):
    setup = setup_of("smolvlm")
    plain = CONDITIONS["no_adapter"](setup.model, setup.processor)
    [prepared] = prepare(setup, samples[:1], plain)
    with pytest.raises(ValueError, match="s0 was prepared without a partner"):
        CONDITIONS["other_adapter"](setup.model, setup.processor).answer([prepared], DECODING)
    with pytest.raises(ValueError, match="s0 was not prepared in 2 segments"):
        CONDITIONS["adapter"](setup.model, setup.processor, segments=2).answer([prepared], DECODING)


def test_bfloat16(setup, samples):
    model = copy.deepcopy(setup.model)
    model.vlm.to(torch.bfloat16)
    half = Setup(setup.family, model, setup.processor)
    for name in CONDITIONS:
        answers = answer(half, samples, name, **CHEAP.get(name, {}))
        assert [len(several) for several in answers] == [2, 1, 3, 1]
        assert all(0 < found.num_tokens <= 6 for several in answers for found in several)


def test_one_question_that_asks_what_the_internalization_prompt_asks(setup, samples):
    sample = replace(samples[0], questions=ask("same", setup.processor.internalization_prompt))
    assert token_ids(setup, [sample], "kv_cache") == token_ids(setup, [sample], "video")


def test_a_single_token_is_enough(setup, samples):
    decoding = Decoding(max_new_tokens=1, batch_size=2)
    for name in ("video", "kv_cache", "adapter"):
        assert all(found.num_tokens == 1 for several in answer(setup, samples, name, decoding) for found in several)
