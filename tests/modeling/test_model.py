"""The model: from pixels to adapters to answers and gradients, on three families of bases."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn.functional import cross_entropy

from video2lora.modeling import Video2LoraConfig, Video2LoraModel
from video2lora.modeling import model as model_module

from .helpers import SMALL, assert_same_lora, assert_unchanged, awaken, merged, num_hooks, snapshot, text_batch

FAMILIES = ["smolvlm", "idefics3", "qwen2_5_vl"]


def in_dtype(inputs, dtype):
    """Pixels in the base's dtype; a number for each video as it is."""
    return {k: v.to(dtype) if v.is_floating_point() and v.dim() > 1 else v for k, v in inputs.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request, families, make_model, make_processor, clips):
    """A model, its processor, three clips (2, 5 and 3 frames) as a padded batch, and the adapters they get."""
    family = families(request.param)
    model, processor = make_model(family.vlm), make_processor(family)
    inputs = processor(videos=[processor.load_video(clip, fps=1) for clip in clips])
    with torch.no_grad():
        return model, processor, inputs, model.internalize(**inputs)


@pytest.fixture(scope="module")
def smol(smolvlm, make_model, make_processor, clips):
    processor = make_processor(smolvlm)
    return make_model(smolvlm.vlm), processor(videos=[processor.load_video(clip, fps=1) for clip in clips])


@torch.no_grad()
def test_a_batch_gives_what_each_video_gets_alone(setup, clips):
    model, processor, inputs, adapters = setup
    assert inputs["attention_mask"].sum(1).unique().numel() == 3, "clips of the same length prove nothing"
    for row, clip in enumerate(clips):
        alone = model.internalize(**processor(videos=[processor.load_video(clip, fps=1)]))
        assert_same_lora(alone, adapters[row], atol=2e-6)
        assert (
            alone.lora_B["down_proj"][:, :, :3] - adapters[row - 1].lora_B["down_proj"][:, :, :3]
        ).abs().max() > 1e-4
    assert adapters.ranks == (6, 6, 6) and adapters.static_rank == 3
    assert adapters.lora_A["down_proj"].shape == (3, 4, 6, 128) and adapters.lora_B["down_proj"].shape == (3, 4, 6, 64)
    assert num_hooks(model.vlm) == 0


@torch.no_grad()
def test_streaming_in_groups_changes_nothing(smolvlm, make_model, clips, make_processor, monkeypatch):
    base = copy.deepcopy(smolvlm.vlm).double()
    model = make_model(base)
    model.hypernetwork.double()
    inputs = make_processor(smolvlm)(videos=clips)
    results = []
    for tokens in (1, 3 * inputs["input_ids"].shape[1] + 1, 10**9):
        monkeypatch.setattr(model_module, "TOKENS_IN_FLIGHT", tokens)
        results.append(model.internalize(**inputs))
    for other in results[1:]:
        assert_same_lora(other, results[0], atol=1e-12)
    # and the stack of all hidden states, all at once
    reported = base(**in_dtype(inputs, base.dtype), output_hidden_states=True).hidden_states
    stacked = model.hypernetwork(torch.stack(reported[:-1], dim=1), inputs["attention_mask"])
    assert_same_lora(stacked, results[0], atol=1e-12)


@torch.no_grad()
def test_forward_and_generate_answer_with_the_adapters(setup):
    model, _, inputs, adapters = setup
    queries = text_batch(3)
    ours = model(queries, video_inputs=inputs).logits
    assert torch.allclose(model(queries, adapters=adapters).logits, ours, atol=1e-5)
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    answers = model.generate(queries, torch.ones_like(queries), adapters=adapters, **arguments)
    for row in range(3):
        base = merged(model.vlm, model.targets, adapters[row])
        torch.testing.assert_close(
            ours[row : row + 1], base(input_ids=queries[row : row + 1]).logits, atol=2e-5, rtol=0
        )
        alone = base.generate(input_ids=queries[row : row + 1], pad_token_id=2, **arguments)
        assert answers[row].tolist() == alone[0].tolist()
    plain = model.generate(queries, **arguments)
    assert plain.tolist() == model.vlm.generate(input_ids=queries, pad_token_id=2, **arguments).tolist()
    assert plain.tolist() != answers.tolist()


@torch.no_grad()
def test_padding_changes_no_answer(setup):
    model, processor, _, adapters = setup
    prompts = ["What?", "What happens in the end?", "Who is it, and where?"]
    text = processor(text=prompts)
    assert text["attention_mask"].sum(1).unique().numel() == 3 and (text["attention_mask"][:, -1] == 1).all()
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(**text, adapters=adapters, **arguments)[:, -6:]
    training = processor(text=prompts, responses=["A square.", "It leaves.", "Nobody knows, nor do I."])
    losses = model(**training, adapters=adapters).query_losses
    for row in range(3):
        ids = text["input_ids"][row, text["attention_mask"][row].bool()][None]
        assert model.generate(ids, adapters=adapters[row], **arguments)[0, -6:].tolist() == together[row].tolist()
        valid = training["attention_mask"][row].bool()
        alone = {name: tensor[row, valid][None] for name, tensor in training.items()}
        torch.testing.assert_close(model(**alone, adapters=adapters[row]).loss, losses[row], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "queries, counts", [(3, None), (6, 2), (6, [2, 2, 2]), (6, [1, 3, 2]), (6, torch.tensor([3, 2, 1]))]
)
def test_queries_per_video(smol, queries, counts):
    model, inputs = smol
    adapters, ids = model.internalize(**inputs), text_batch(queries)
    each = [queries // 3] * 3 if not hasattr(counts, "__len__") else [int(n) for n in counts]
    owners = [owner for owner, count in enumerate(each) for _ in range(count)]
    expected = torch.cat([model(ids[row : row + 1], adapters=adapters[o]).logits for row, o in enumerate(owners)])
    ours = model(ids, video_inputs=inputs, queries_per_video=counts).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    arguments = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = [model.generate(ids[r : r + 1], adapters=adapters[o], **arguments) for r, o in enumerate(owners)]
    ours = model.generate(ids, adapters=adapters, queries_per_adapter=counts, **arguments)
    assert ours.tolist() == torch.cat(expected).tolist()


@torch.no_grad()
def test_one_adapter_answers_all_and_lists_of_adapters_are_batches(smol):
    model, inputs = smol
    adapters, ids = model.internalize(**inputs), text_batch(4)
    expected = torch.cat([model(ids[row : row + 1], adapters=adapters[1]).logits for row in range(4)])
    torch.testing.assert_close(model(ids, adapters=adapters[1]).logits, expected, atol=1e-5, rtol=0)
    pair, both = [adapters[2], adapters[0]], model.internalize(segments_per_adapter=[2, 1], **inputs)
    expected = torch.cat([model(ids[:1], adapters=adapters[2]).logits, model(ids[1:2], adapters=both[0]).logits])
    ours = model(ids[:2], adapters=[adapters[2], both[0]]).logits  # ranks 6 and 9
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert torch.equal(model(ids[:2], adapters=pair).logits[0], model(ids[:2], adapters=pair[:1] * 2).logits[0])


@torch.no_grad()
def test_segments(smol):
    model, inputs = smol
    joined = model.internalize(segments_per_adapter=[1, 2], **inputs)
    assert joined.ranks == (6, 9) and joined.static_rank == 3
    ids = text_batch(3)
    ours = model(ids, video_inputs=inputs, segments_per_adapter=torch.tensor([1, 2]), queries_per_video=[2, 1]).logits
    expected = torch.cat([model(ids[:2], adapters=joined[0]).logits, model(ids[2:], adapters=joined[1]).logits])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert_same_lora(model.hypernetwork.combine(model.generate_segments(**inputs), [1, 2]), joined)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"queries_per_video": [1, 1, 1]}, r"\[1, 1, 1\] of 3 adapters do not add up to the 4 rows"),
        ({}, "do not add up to the 4 rows"),
        ({"queries_per_video": 2}, "do not add up to the 4 rows"),
        ({"segments_per_adapter": [2, 2]}, "add up to the 3 segments"),
        ({"both": True}, "got both"),
    ],
)
def test_counts_that_do_not_add_up(smol, arguments, words):
    model, inputs = smol
    if arguments.get("both"):
        arguments = {"adapters": model.internalize(**inputs)}
    with pytest.raises(ValueError, match=words):
        model(text_batch(4), video_inputs=inputs, **arguments)
    assert num_hooks(model.vlm) == 0


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_loss_is_the_naive_cross_entropy(smol, with_mask):
    model, inputs = smol
    ids = text_batch(3, tokens=11)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[0, :4], labels[1, :9], labels[2, :] = -100, -100, -100
    labels[2, [2, 7]] = ids[2, [2, 7]]  # not side by side
    labels[1, 0] = ids[1, 0]  # the first token is predicted by nothing
    if with_mask:
        mask[0, 8:], labels[0, 8:] = 0, -100
    output = model(ids, mask, labels, video_inputs=inputs)
    logits = model(ids, mask, video_inputs=inputs).logits
    rows = []
    for row in range(3):
        rows.append(cross_entropy(logits[row, :-1].double(), labels[row, 1:], ignore_index=-100))
    torch.testing.assert_close(output.query_losses.double(), torch.stack(rows), atol=1e-6, rtol=0)
    torch.testing.assert_close(output.loss.double(), torch.stack(rows).mean(), atol=1e-6, rtol=0)
    assert output.logits is None and len(output.label_logits) == int((labels[:, 1:] != -100).sum())
    ours, naive = (
        torch.autograd.grad(loss, list(model.hypernetwork.parameters()))
        for loss in (output.loss, torch.stack(rows).mean())
    )
    for mine, wanted in zip(ours, naive, strict=True):
        assert (mine - wanted).norm() <= 2e-4 * wanted.norm() + 1e-9


def test_a_base_that_caps_its_logits(smolvlm, make_model, make_processor, clips):
    """Gemma's and Granite's own forward scales or caps what the head gives: forward, loss and generate agree."""
    model, inputs = make_model(copy.deepcopy(smolvlm.vlm)), make_processor(smolvlm)(videos=clips)

    class Capped(type(model.vlm)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 0.5 * torch.tanh(output.logits)
            return output

    model.vlm.__class__ = Capped
    ids = text_batch(3)
    output, logits = model(ids, labels=ids, video_inputs=inputs), model(ids, video_inputs=inputs).logits
    assert logits.abs().max() <= 0.5 and output.label_logits.abs().max() <= 0.5
    torch.testing.assert_close(output.loss, cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert num_hooks(model.vlm) == 0


def test_a_query_without_labels_has_no_loss_and_no_nan(smol):
    model, inputs = smol
    ids = text_batch(3)
    labels = torch.full_like(ids, -100)
    labels[0] = ids[0]
    output = model(ids, labels=labels, video_inputs=inputs)
    assert output.query_losses[1:].tolist() == [0, 0] and output.loss.isfinite()
    torch.testing.assert_close(output.loss, output.query_losses[0] / 3)
    nothing = model(ids, labels=torch.full_like(ids, -100), video_inputs=inputs)
    nothing.loss.backward()
    assert nothing.loss == 0 and all(
        p.grad.isfinite().all() for p in model.hypernetwork.parameters() if p.grad is not None
    )
    model.zero_grad()


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_moves_every_parameter_and_nothing_of_the_base(
    families, make_model, make_processor, clips, family_name, optimizer
):
    """From a fresh hypernetwork: its output is zero at first, so the first step moves `scaler_B` and `bias_B` only."""
    family = families(family_name)
    torch.manual_seed(0)
    model = make_model(family.vlm, asleep=True, num_self_attn_per_block=1, target_modules=["down_proj", "o_proj"])
    processor = make_processor(family)
    inputs = processor(
        videos=clips, text=["What?", "Who is it?", "Where?"], responses=["A square.", "Nobody.", "Here."]
    )
    base, start = snapshot(model.vlm), snapshot(model.hypernetwork)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == len(list(model.hypernetwork.parameters()))
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0),
    }
    steps, losses, touched = make[optimizer](trainable), [], set()
    model.train()
    assert model.training and model.hypernetwork.training
    assert not any(module.training for module in model.vlm.modules())
    for _ in range(3):
        steps.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        touched |= {
            n for n, p in model.hypernetwork.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
        }
        steps.step()
    names = set(start)
    assert touched == names, sorted(names - touched)
    unmoved = [name for name, tensor in snapshot(model.hypernetwork).items() if torch.equal(tensor, start[name])]
    assert not unmoved
    assert losses[2] < losses[0]
    assert_unchanged(model.vlm, base)
    assert not any(p.requires_grad or p.grad is not None for p in model.vlm.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(smol):
    model, inputs = smol
    ids, grads = text_batch(3), []
    model.train()
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        model(ids, labels=ids, video_inputs=inputs).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.hypernetwork.named_parameters()})
    assert model.hypernetwork.gradient_checkpointing
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.vlm.modules())
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model.eval()
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], atol=1e-7, rtol=1e-5)


def test_a_subset_of_layers(smolvlm, make_model, clips, make_processor):
    model = make_model(smolvlm.vlm, layers_to_transform=[2, 0], target_modules=["down_proj", "o_proj"])
    assert model.targets.layer_indices == (0, 2) and model.config.layers_to_transform == [0, 2]
    with torch.no_grad():
        adapters = model.internalize(**make_processor(smolvlm)(videos=clips))
        assert adapters.num_layers == 2 and list(adapters.lora_A) == ["down_proj", "o_proj"]
        assert adapters.lora_A["o_proj"].shape[-1] == 64 and adapters.lora_A["down_proj"].shape[-1] == 128
        ids = text_batch(1)
        base = merged(smolvlm.vlm, model.targets, adapters[0])
        torch.testing.assert_close(
            model(ids, adapters=adapters[0]).logits, base(input_ids=ids).logits, atol=2e-5, rtol=0
        )
    for layer in (1, 3):
        path = model.targets.paths["down_proj"][0].replace(".0.", f".{layer}.")
        assert torch.equal(base.get_submodule(path).weight, smolvlm.vlm.get_submodule(path).weight)


@pytest.mark.parametrize("family_name", FAMILIES)
def test_a_bfloat16_base(families, family_name, make_model, clips, make_processor):
    """The hypernetwork stays in float32 and reads the base's bfloat16 states nearly as if they were float32."""
    family = families(family_name)
    inputs = make_processor(family)(videos=clips)
    model = make_model(copy.deepcopy(family.vlm).bfloat16())
    assert {p.dtype for p in model.hypernetwork.parameters()} == {torch.float32}
    with torch.no_grad():
        adapters = model.internalize(**inputs)
        states = model.vlm(**in_dtype(inputs, model.vlm.dtype), output_hidden_states=True).hidden_states
        exact = model.hypernetwork(torch.stack(states[:-1], dim=1).float(), inputs["attention_mask"])
        for name in exact.lora_A:
            for mine, wanted in ((adapters.lora_A, exact.lora_A), (adapters.lora_B, exact.lora_B)):
                assert mine[name].dtype == torch.float32
                assert (mine[name] - wanted[name]).norm() < 0.02 * wanted[name].norm()
        assert model(text_batch(3), adapters=adapters).logits.dtype == torch.bfloat16
        assert model.generate(text_batch(3), adapters=adapters, max_new_tokens=2).shape[0] == 3
    ids = text_batch(3)
    model(ids, labels=ids, video_inputs=inputs).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.hypernetwork.parameters())


def test_small_floats_of_a_processor_are_not_rounded(qwen, make_model, clips, make_processor):
    """Qwen2.5-VL's positions come from seconds per grid step: cast to bfloat16 they would shift."""
    model, seen = make_model(copy.deepcopy(qwen.vlm).bfloat16()), {}
    inputs = make_processor(qwen)(videos=clips)
    inputs["second_per_grid_ts"] = torch.tensor([1.0 / 3, 0.7, 2.1])
    handle = model.vlm.base_model.register_forward_pre_hook(lambda m, a, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model.internalize(**inputs)
    handle.remove()
    assert torch.equal(seen["second_per_grid_ts"], inputs["second_per_grid_ts"])
    assert seen["pixel_values_videos"].dtype == torch.bfloat16


OLD_MERGER = pytest.mark.xfail(
    Version(transformers.__version__) < Version("5.23"),
    raises=RuntimeError,
    reason="SmolVLM of older transformers merges bfloat16 image features into float32 embeddings",
)


AUTOCAST = [(name, dtype) for name in FAMILIES for dtype in (torch.bfloat16, torch.float32)]
AUTOCAST[1] = pytest.param(*AUTOCAST[1], marks=OLD_MERGER)


@pytest.mark.parametrize("name, dtype", AUTOCAST)
def test_autocast(families, make_model, make_processor, clips, name, dtype):
    """A bfloat16 base, or one of float32 that autocast runs in bfloat16."""
    family = families(name)
    model, inputs = make_model(copy.deepcopy(family.vlm).to(dtype)), make_processor(family)(videos=clips)
    ids = text_batch(3)
    exact = model(ids, labels=ids, video_inputs=inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids, video_inputs=inputs)
    assert output.loss.dtype == torch.float32 and output.lora.lora_A["down_proj"].dtype == torch.float32
    assert abs(output.loss - exact) < 0.05 * exact
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.hypernetwork.parameters())


@torch.no_grad()
def test_a_model_cast_to_bfloat16_runs(smolvlm, make_model, clips, make_processor):
    model = make_model(copy.deepcopy(smolvlm.vlm)).to(torch.bfloat16)
    adapters = model.internalize(**make_processor(smolvlm)(videos=clips))
    assert model.generate(text_batch(3), adapters=adapters, max_new_tokens=2).shape[0] == 3


def test_the_pad_id_of_generation_lies_in_the_vocabulary(smolvlm, make_model, clips):
    base = copy.deepcopy(smolvlm.vlm)
    base.config.pad_token_id = base.generation_config.pad_token_id = 128002  # as SmolVLM2's files say
    base.config.text_config.pad_token_id = 2
    model, seen = make_model(base), {}
    generate, base.generate = base.generate, lambda **kwargs: seen.update(kwargs) or generate(**kwargs)
    model.generate(text_batch(2), max_new_tokens=2)
    assert seen["pad_token_id"] == 2
    base.config.text_config.pad_token_id = None
    base.generation_config.eos_token_id = [300_000, 5]
    assert model._pad_token_id() == 5
    model.generate(text_batch(1), max_new_tokens=1, pad_token_id=7)
    assert seen["pad_token_id"] == 7


def test_a_given_base_is_shared_and_not_touched(smolvlm, make_model):
    base = copy.deepcopy(smolvlm.vlm).train()
    before = snapshot(base)
    model = make_model(base, asleep=True)
    assert model.vlm is base and not base.training
    assert_unchanged(base, before)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.hypernetwork.parameters())


def test_a_base_that_was_never_initialised_by_transformers_is_not_initialised_again(smolvlm, make_model):
    """A base built from its config, weights loaded by hand, carries no mark that it has been initialised."""
    base = type(smolvlm.vlm)(smolvlm.vlm.config)
    base.load_state_dict(smolvlm.vlm.state_dict())
    for module in base.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    before = snapshot(base)
    make_model(base, asleep=True)
    assert_unchanged(base, before)


def test_from_config_alone(smolvlm):
    """As every transformers model: random weights, the base's too."""
    model = Video2LoraModel(Video2LoraConfig(vlm_config=smolvlm.vlm.config, **SMALL))
    awaken(model.hypernetwork)
    assert model(text_batch(2)).logits.shape == (2, 9, smolvlm.vlm.config.text_config.vocab_size)
    assert not any(p.requires_grad for p in model.vlm.parameters())
    with pytest.raises(ValueError, match="from_vlm"):
        Video2LoraModel(Video2LoraConfig())


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"target_modules": ["wrong_proj"]}, "'wrong_proj'.*expected exactly one"),
        ({"layers_to_transform": [9]}, "0..3"),
        ({"rank": 0}, "rank"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
def test_from_vlm_with_a_wrong_field(smolvlm, fields, words):
    with pytest.raises(ValueError, match=words):
        Video2LoraModel.from_vlm(smolvlm.vlm, **fields)


@pytest.mark.parametrize("name", ["FSDPLlamaDecoderLayer", "FullyShardedDataParallel"])
def test_a_sharded_base_runs_to_its_end(smolvlm, make_model, make_processor, clips, name):
    """FSDP (2 and 1, known by their classes) may shard the decoder layers alone."""
    model, inputs = make_model(copy.deepcopy(smolvlm.vlm)), make_processor(smolvlm)(videos=clips[:1])
    last, calls = model.vlm.get_decoder().layers[-1], []
    last.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model.internalize(**inputs)
        assert not calls
        last.__class__ = type(name, (type(last),), {})
        assert_same_lora(model.internalize(**inputs), expected)
    assert calls == [1]


@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "model.compile"])
def test_a_compiled_model_has_the_same_loss_and_gradients(whole, smolvlm, make_model, make_processor, clips):
    """Its hooks stay out of graphs, whatever the shapes of the batches; its hypernetwork can still be compiled."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    model, processor = make_model(smolvlm.vlm, num_blocks=1), make_processor(smolvlm)
    texts = {"text": ["What?", "Where to?", "Who?"], "responses": ["A square.", "Left.", "Nobody at all."]}
    batches = [dict(processor(videos=clips[:n], **{k: v[:n] for k, v in texts.items()})) for n in (3, 2)]

    def losses(called):
        found = []
        for batch in batches:
            model.zero_grad()
            loss = called(**batch).loss
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in model.hypernetwork.parameters())]
        return found

    expected = losses(model)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend=backend) if whole else model
        if not whole:
            model.compile(backend=backend)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(losses(compiled), expected, strict=True))
        assert not graphs
        model.hypernetwork.residual_mlps[0].compile(backend=backend)
        for ours, theirs in zip(losses(compiled), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert graphs
    finally:
        torch._dynamo.reset()
    assert num_hooks(model.vlm) == 0
