"""Parity with numbers of the published implementation (tests/parity/README.md says how they were made)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from video2lora.modeling.hypernetwork import Padding
from video2lora.modeling.published import convert_state_dict

from ..parity.model import PARITY, parity_model

CASES = ["r4_down", "r16_down"]


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(ours.float(), theirs.float(), atol=atol, rtol=0)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return load_file(PARITY / "inputs.safetensors")


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """One stored case: our model with its parameters, and its stored outputs."""
    directory = PARITY / request.param
    model = parity_model(request.param)
    outputs = load_file(directory / "outputs.safetensors")
    return SimpleNamespace(directory=directory, config=model.config, model=model, outputs=outputs)


def close_lora(weights, outputs: dict[str, torch.Tensor], prefix: str) -> None:
    for name in weights.lora_A:
        close(weights.lora_A[name], outputs[f"{prefix}.{name}.A"], 2e-6)
        close(weights.lora_B[name], outputs[f"{prefix}.{name}.B"], 2e-6)


@pytest.fixture(params=[False, True], ids=["plain", "folded"])
def folded(case, request):
    chosen = case.model.hypernetwork.perceiver.folded
    case.model.hypernetwork.perceiver.folded = request.param
    yield request.param
    case.model.hypernetwork.perceiver.folded = chosen


@torch.no_grad()
def test_intermediates(case, inputs, folded):
    if "intermediate.decoder" not in case.outputs:
        pytest.skip("no intermediates are stored for this case")
    hypernetwork, outputs = case.model.hypernetwork, case.outputs
    features, mask = inputs["ctx_features"], inputs["ctx_attn_mask"]
    batch, layers = features.shape[:2]

    def by_layer(tensor):  # stored rows are layer-major
        return tensor.unflatten(0, (layers, batch)).transpose(0, 1)

    projected = hypernetwork.perceiver.modality_projection(features)
    close(projected, by_layer(outputs["intermediate.modality_projection"]), 1e-5)
    padding = Padding.of(mask.repeat_interleave(layers, 0))
    embeddings = hypernetwork.embed(features.flatten(0, 1), padding).unflatten(0, (batch, layers))
    close(embeddings, by_layer(outputs["intermediate.decoder"]), 1e-5)
    for mlp in hypernetwork.residual_mlps:
        embeddings = mlp(embeddings)
    close(embeddings, outputs["intermediate.res_mlp"].flatten(2, 3), 1e-5)


@torch.no_grad()
def test_generated_and_combined_adapters(case, inputs, folded):
    hypernetwork, outputs = case.model.hypernetwork, case.outputs
    features, mask = inputs["ctx_features"], inputs["ctx_attn_mask"]
    one_each = hypernetwork(features, mask)
    rank = case.config.rank
    for name in one_each.lora_A:
        close(one_each.lora_A[name][:, :, :rank], outputs[f"generated.{name}.A"], 2e-6)
        close(one_each.lora_B[name][:, :, :rank], outputs[f"generated.{name}.B"], 2e-6)
    if "combined_1_1.down_proj.A" not in outputs:
        return  # stored for the other case only
    close_lora(one_each, outputs, "combined_1_1")
    close_lora(hypernetwork(features, mask, segments_per_adapter=[2]), outputs, "combined_2")
    mixed = hypernetwork(inputs["ctx_features_mixed"], inputs["ctx_attn_mask_mixed"], segments_per_adapter=[2, 1])
    close_lora(mixed, outputs, "combined_mixed_2_1")
    assert mixed.ranks == (3 * rank, 2 * rank)


def text(inputs, labels: bool = False) -> dict[str, torch.Tensor]:
    query = {"input_ids": inputs["text_input_ids"], "attention_mask": inputs["text_attention_mask"]}
    return query | ({"labels": inputs["text_labels"]} if labels else {})


@torch.no_grad()
def test_logits(case, inputs):
    model, outputs = case.model, case.outputs
    valid = inputs["text_attention_mask"].bool()
    one_each = model.hypernetwork(inputs["ctx_features"], inputs["ctx_attn_mask"])
    both = model.hypernetwork(inputs["ctx_features"], inputs["ctx_attn_mask"], segments_per_adapter=[2])
    mixed = model.hypernetwork(
        inputs["ctx_features_mixed"], inputs["ctx_attn_mask_mixed"], segments_per_adapter=[2, 1]
    )
    for adapters, stored in [(one_each, "logits_1_1"), (both, "logits_2_two_queries"), (mixed, "logits_mixed_2_1")]:
        if stored not in outputs:
            continue  # the mixed batch is stored for one case only
        logits = model(**text(inputs), adapters=adapters).logits
        close(logits[valid], outputs[stored][valid], 2e-5)
    base = load_file(PARITY / "vlm_outputs.safetensors")["text_logits"]
    close(model(**text(inputs)).logits[valid], base[valid], 2e-5)


@torch.no_grad()
def test_losses(case, inputs):
    adapters = case.model.hypernetwork(inputs["ctx_features"], inputs["ctx_attn_mask"])
    output = case.model(**text(inputs, labels=True), adapters=adapters)
    close(output.loss, case.outputs["ce_loss"], 1e-5)
    close(output.query_losses, case.outputs["ce_per_sample"], 1e-5)
    labelled = inputs["text_labels"][:, 1:] != -100
    assert labelled.sum(1).tolist() == case.outputs["ce_answer_tokens"].tolist()


def test_gradients(case, inputs, folded):
    model = case.model
    model.zero_grad()
    adapters = model.hypernetwork(inputs["ctx_features"], inputs["ctx_attn_mask"])
    model(**text(inputs, labels=True), adapters=adapters).loss.backward()
    check_gradients(case)


def test_gradients_with_checkpointing(case, inputs):
    model = case.model
    model.zero_grad()
    model.hypernetwork.gradient_checkpointing = True
    model.train()
    try:
        adapters = model.hypernetwork(inputs["ctx_features"], inputs["ctx_attn_mask"])
        model(**text(inputs, labels=True), adapters=adapters).loss.backward()
    finally:
        model.eval()
        model.hypernetwork.gradient_checkpointing = False
    check_gradients(case)


def check_gradients(case) -> None:
    """Every gradient's norm and its dot product with the parameter, and the small ones in full."""
    stored = load_file(case.directory / "grads.safetensors")
    names = json.loads((case.directory / "grad_names.json").read_text())["names"]
    grads = to_published({k: p.grad for k, p in case.model.hypernetwork.named_parameters()}, case)
    params = to_published({k: p.detach() for k, p in case.model.hypernetwork.named_parameters()}, case)
    assert set(names) == set(grads)
    for index, name in enumerate(names):
        grad, param = grads[name].double(), params[name].double()
        norm = stored["grad_l2_norm"][index]
        torch.testing.assert_close(grad.norm(), norm, rtol=1e-4, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        slack = 1e-4 * (grad.norm() * param.norm()).item()
        torch.testing.assert_close((grad * param).sum(), stored["grad_dot_param"][index], rtol=0, atol=slack)
        if f"grad.{name}" in stored:
            full = stored[f"grad.{name}"].double()
            assert (grad.view_as(full) - full).norm() <= 1e-4 * full.norm(), name
    assert not any(p.grad is not None for p in case.model.vlm.parameters())


def to_published(ours: dict[str, torch.Tensor], case) -> dict[str, torch.Tensor]:
    """Our tensors under the published names, found by converting a state dict of numbered tensors."""
    published = load_file(case.directory / "hypernet.safetensors")
    numbered = {name: torch.full(tensor.shape, float(index)) for index, (name, tensor) in enumerate(published.items())}
    converted = convert_state_dict(
        numbered,
        target_modules=case.config.target_modules,
        in_features=case.model.targets.in_features,
        out_features=case.model.targets.out_features,
    )
    names = list(published)
    return {names[int(converted[key].flatten()[0])]: tensor for key, tensor in ours.items()}


def video_inputs(inputs) -> dict[str, torch.Tensor]:
    return {
        "input_ids": inputs["e2e_input_ids"],
        "attention_mask": inputs["e2e_attention_mask"],
        "pixel_values": inputs["e2e_pixel_values"].float(),
        "pixel_attention_mask": inputs["e2e_pixel_attention_mask"],
    }


@torch.no_grad()
def test_end_to_end_from_pixels(case, inputs, folded):
    model, outputs = case.model, case.outputs
    if "e2e_text_logits_1_1" not in outputs:
        pytest.skip("no end-to-end values are stored for this case")
    adapters = model.internalize(**video_inputs(inputs))
    rank = case.config.rank
    for name in adapters.lora_A:
        close(adapters.lora_A[name][:, :, :rank], outputs[f"e2e_generated.{name}.A"], 2e-6)
        close(adapters.lora_B[name][:, :, :rank], outputs[f"e2e_generated.{name}.B"], 2e-6)
    valid = inputs["text_attention_mask"].bool()
    in_one_go = model(**text(inputs), video_inputs=video_inputs(inputs))
    close(in_one_go.logits[valid], outputs["e2e_text_logits_1_1"][valid], 2e-5)


@torch.no_grad()
def test_greedy_tokens(case, inputs):
    model, outputs = case.model, case.outputs
    if "e2e_greedy_ids" not in outputs:
        pytest.skip("no end-to-end values are stored for this case")
    prompt = inputs["text_input_ids"][:1]
    adapter = model.internalize(**video_inputs(inputs))[0]
    arguments = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    assert model.generate(prompt, adapters=adapter, **arguments).tolist() == outputs["e2e_greedy_ids"].tolist()
    assert model.generate(prompt, **arguments).tolist() == outputs["base_greedy_ids"].tolist()
    assert outputs["e2e_greedy_ids"].tolist() != outputs["base_greedy_ids"].tolist()
