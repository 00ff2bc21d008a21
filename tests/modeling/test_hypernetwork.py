"""The hypernetwork's initial values, sizes, guards, and how segments are combined."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from video2lora.modeling import Hypernetwork, LoraTargets, Video2LoraConfig, Video2LoraModel, stack_lora

from .helpers import SMALL, assert_same_lora, awaken, text_batch

TARGETS = LoraTargets(
    (0, 1, 2),
    {"down_proj": ("a", "b", "c"), "q_proj": ("d", "e", "f")},
    {"down_proj": 300, "q_proj": 90},
    {"down_proj": 100, "q_proj": 310},
)
STATES, MASK = torch.randn(3, 3, 6, 40, generator=torch.Generator().manual_seed(0)), torch.ones(3, 6)
MASK[1, 4:] = 0


def fresh(seed: int = 0, **fields) -> Hypernetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Hypernetwork(
            Video2LoraConfig(**SMALL | {"target_modules": ["down_proj", "q_proj"]} | fields), TARGETS, 40
        )


@pytest.mark.parametrize(
    "hidden, width, layers, expected",
    [(960, 2560, 32, 128_626_176), (2048, 8192, 24, 227_323_136)],
    ids=["500M", "2.2B"],
)
def test_released_sizes(hidden, width, layers, expected):
    paths = {"down_proj": tuple(f"layers.{i}.mlp.down_proj" for i in range(layers))}
    targets = LoraTargets(tuple(range(layers)), paths, {"down_proj": width}, {"down_proj": hidden})
    with torch.device("meta"):
        hypernetwork = Hypernetwork(Video2LoraConfig(), targets, hidden)
    assert sum(p.numel() for p in hypernetwork.parameters()) == expected
    assert hypernetwork.scaling == 128.0 and hypernetwork.perceiver.folded


def check_initial_values(hypernetwork: Hypernetwork) -> None:
    """Every parameter has the documented distribution (10 % on standard deviations, exact for constants)."""
    size, rank = SMALL["latent_size"], SMALL["rank"]
    d_lora = max(TARGETS.in_features[n] + TARGETS.out_features[n] for n in TARGETS.paths)
    checked = set()

    def normal(name: str, std: float) -> None:
        parameter = hypernetwork.get_parameter(name)
        slack = max(0.1, 4 / math.sqrt(2 * parameter.numel()))
        assert abs(parameter.std().item() / std - 1) < slack, name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
        # a normal one has values beyond the bound of a uniform one of the same deviation
        assert parameter.abs().max() > math.sqrt(3) * std, name
        checked.add(name)

    def constant(name: str, value: float) -> None:
        assert (hypernetwork.get_parameter(name) == value).all(), name
        checked.add(name)

    for stack in ("encoder", "decoder"):
        normal(f"perceiver.{stack}.latents", 1.0)
    for module in TARGETS.paths:
        normal(f"head.{module}", 0.5 / math.sqrt(size + d_lora * rank))
        normal(f"bias_A.{module}", 0.2 / math.sqrt(TARGETS.in_features[module] * rank))
        for name, value in (("scaler_A", 1), ("scaler_B", 0), ("bias_B", 0)):
            constant(f"{name}.{module}", value)
    for name, module in hypernetwork.named_modules():
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            for kind, parameter in module.named_parameters():
                assert parameter.abs().max() <= bound, name
                if parameter.numel() > 100:
                    assert abs(parameter.std().item() / (bound / math.sqrt(3)) - 1) < 0.15, name
                checked.add(f"{name}.{kind}")
        elif "norm" in name.rpartition(".")[2]:
            for kind, _ in module.named_parameters():
                constant(f"{name}.{kind}", 1 if kind == "weight" else 0)
    assert checked == {name for name, _ in hypernetwork.named_parameters()}


def test_initial_values():
    check_initial_values(fresh(num_self_attn_per_block=1))


def test_initialisation_follows_the_seed(smolvlm):
    def states(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return Video2LoraModel.from_vlm(smolvlm.vlm, **SMALL).hypernetwork.state_dict()

    first, again, other = states(3), states(3), states(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.down_proj"], other["head.down_proj"])


def test_a_fresh_hypernetworks_adapters_change_nothing(make_model, smolvlm):
    model = make_model(smolvlm.vlm, asleep=True)
    hidden = torch.randn(2, 4, 6, 64)
    adapters = model.hypernetwork(hidden).detach()
    assert all(a.abs().min(dim=-1).values.max() > 0 for a in adapters.lora_A.values())
    assert all((b == 0).all() for b in adapters.lora_B.values())
    queries = text_batch(2)
    assert torch.equal(model(queries, adapters=adapters).logits, model(queries).logits)


def test_zero_embeddings_give_zeros():
    hypernetwork = awaken(fresh(num_pre_head_layers=0))
    embeddings = torch.zeros(2, 3, 6, SMALL["latent_size"], requires_grad=True)
    weights = hypernetwork.generate_weights(embeddings)
    assert all((t == 0).all() for t in (*weights.lora_A.values(), *weights.lora_B.values()))
    sum(t.sum() for t in weights.lora_A.values()).backward()
    assert embeddings.grad.isfinite().all()


def test_without_a_static_part():
    hypernetwork = awaken(fresh(use_static_lora=False))
    assert not any(name.startswith("bias") for name, _ in hypernetwork.named_parameters())
    weights = hypernetwork(STATES, MASK, segments_per_adapter=[2, 1])
    assert weights.ranks == (6, 3) and weights.static_rank == 0


def delta(weights, row: int, name: str, layer: int) -> torch.Tensor:
    return weights.scaling * weights.lora_B[name][row, layer].T @ weights.lora_A[name][row, layer]


@torch.no_grad()
def test_segments_add_up_with_the_static_part_once():
    hypernetwork = awaken(fresh())
    embeddings = hypernetwork.embed(STATES.flatten(0, 1)).unflatten(0, (3, 3))
    generated = hypernetwork.generate_weights(embeddings)
    assert generated.static_rank == 0 and generated.ranks == (3, 3, 3)
    joined = hypernetwork.combine(generated, [2, 1])
    assert joined.ranks == (9, 6) and joined.static_rank == 3 and len(joined) == 2
    assert_same_lora(joined, hypernetwork(STATES, None, [2, 1]), atol=1e-6)
    # in several batches, which need not end where an adapter does
    batches = [stack_lora([generated[0]]), stack_lora([generated[1], generated[2]])]
    assert_same_lora(hypernetwork.combine(batches, [2, 1]), joined, atol=0)
    with pytest.raises(ValueError, match="add up to the 3 segments"):
        hypernetwork.combine(batches, [2, 2])
    with pytest.raises(ValueError, match="add up to the 0 segments"):
        hypernetwork.combine([])
    for name in TARGETS.paths:
        assert (joined.lora_A[name][1, :, 6:] == 0).all() and (joined.lora_B[name][1, :, 6:] == 0).all()
        for layer in range(3):
            static = joined.scaling * hypernetwork.bias_B[name][layer].T @ hypernetwork.bias_A[name][layer]
            parts = [delta(generated, row, name, layer) for row in range(3)]
            torch.testing.assert_close(
                delta(joined, 0, name, layer), parts[0] + parts[1] + static, atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(delta(joined, 1, name, layer), parts[2] + static, atol=1e-5, rtol=1e-5)
    # stacking adapters of different ranks brings back the batch
    assert_same_lora(stack_lora([joined[0], joined[1]]), joined)
    assert joined[1].lora_A["down_proj"].shape[2] == 6 and joined[-1].ranks == (6,)
    folded = joined.fold()
    assert folded.scaling == 1.0
    torch.testing.assert_close(delta(folded, 0, "q_proj", 1), delta(joined, 0, "q_proj", 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generated_parts_are_combined_in_their_own_dtype():
    hypernetwork = awaken(fresh())
    generated = hypernetwork.generate_weights(torch.randn(3, 3, 6, SMALL["latent_size"]))
    joined = hypernetwork.combine(generated.to(dtype=torch.bfloat16), [1, 2])
    expected = hypernetwork.combine(generated, [1, 2]).to(dtype=torch.bfloat16)
    assert_same_lora(joined, expected, atol=0)


@torch.no_grad()
def test_batches_of_other_kinds_are_not_combined():
    hypernetwork = awaken(fresh())
    good = hypernetwork.generate_weights(torch.randn(1, 3, 6, SMALL["latent_size"]))
    one_rank = {name: tensor[:, :, :1] for name, tensor in good.lora_A.items()}
    for other, told in (
        (replace(good, scaling=good.scaling / 2), "batch 1 .*and scaling"),
        (good.fold(), "batch 1 .*scaling 1.0"),
        (replace(good, lora_A=one_rank), "batch 1 .*rank, width"),
        (
            replace(good, lora_A={"up_proj": good.lora_A["q_proj"]}, lora_B={"up_proj": good.lora_B["q_proj"]}),
            "up_proj",
        ),
        (good.to(dtype=torch.bfloat16), "torch.bfloat16 on cpu and torch.float32 on cpu: bring them together"),
    ):
        with pytest.raises(ValueError, match=told):
            hypernetwork.combine([good, other])


def test_gradients_of_combined_segments_reach_each_once():
    hypernetwork = awaken(fresh())
    generated = hypernetwork.generate_weights(torch.randn(3, 3, 6, SMALL["latent_size"]))
    joined = hypernetwork.combine(generated, [2, 1])
    parts = list(generated.lora_A.values()) + list(generated.lora_B.values())
    whole = [*joined.lora_A.values(), *joined.lora_B.values()]
    for part, grad in zip(
        parts, torch.autograd.grad(sum(w.sum() for w in whole), parts, retain_graph=True), strict=True
    ):
        assert torch.equal(grad, torch.ones_like(part))
    statics = [*hypernetwork.bias_A.values(), *hypernetwork.bias_B.values()]
    for static, grad in zip(statics, torch.autograd.grad(sum(w.sum() for w in whole), statics), strict=True):
        assert torch.equal(grad, torch.full_like(static, 2.0)), "one of each adapter"


@pytest.mark.parametrize("counts", [[1, 1], [2, 2], [3, 0], [-1, 4], []])
def test_segment_counts_that_do_not_add_up(counts):
    with pytest.raises(ValueError, match="add up to the 3 segments"):
        fresh()(STATES, MASK, counts)


def test_stacking_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one"):
        stack_lora([])
    weights = fresh()(STATES, MASK)
    one_layer = type(weights)(
        {n: a[:, :1] for n, a in weights.lora_A.items()},
        {n: b[:, :1] for n, b in weights.lora_B.items()},
        1.0,
        (6,) * 3,
    )
    with pytest.raises(ValueError, match="cannot be stacked"):
        stack_lora([weights, one_layer])


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
def test_a_hypernetwork_cast_to_bfloat16_runs(folded):
    """`model.to(torch.bfloat16)` and FSDP's mixed precision do this; it costs digits, not a crash."""
    hypernetwork = awaken(fresh())
    hypernetwork.perceiver.folded = folded
    exact, ours = hypernetwork(STATES, MASK), hypernetwork.bfloat16()(STATES.bfloat16(), MASK)
    for name in exact.lora_A:
        assert (ours.lora_A[name].float() - exact.lora_A[name]).norm() < 0.1 * exact.lora_A[name].norm()
