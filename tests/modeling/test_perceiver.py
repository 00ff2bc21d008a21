"""The perceiver and head against a naive float64 reference: both attentions, padding, chunks, gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from video2lora.modeling import Hypernetwork, LoraTargets, Video2LoraConfig, hypernetwork, perceiver
from video2lora.modeling.hypernetwork import Padding

from . import reference
from .helpers import SMALL, awaken

HIDDEN, LAYERS = 20, 3
WIDTHS = {"down_proj": (17, 11), "q_proj": (9, 13), "gate_proj": (8, 30), "o_proj": (12, 12)}

# modules, batch, fields: together every number of modules 1..4, of samples 1..5, of residual MLPs 0, 1, 3
CASES = {
    "one_module": (["down_proj"], 1, {}),
    "two_modules_no_mlp": (["q_proj", "down_proj"], 2, {"num_pre_head_layers": 0}),
    "three_modules_self_attention": (["o_proj", "gate_proj", "q_proj"], 3, {"num_self_attn_per_block": 2}),
    "four_modules_three_mlps": (sorted(WIDTHS, reverse=True), 4, {"num_pre_head_layers": 3}),
    "five_samples_one_group": (["down_proj"], 5, {"perceiver_num_key_value_heads": 1, "num_self_attn_per_block": 1}),
    "no_grouping_many_latents": (["gate_proj"], 2, {"perceiver_num_key_value_heads": 4, "num_latents": 40}),
}


def build(modules: list[str], fields: dict, dtype: torch.dtype = torch.float64) -> Hypernetwork:
    config = Video2LoraConfig(**SMALL | {"target_modules": modules} | fields)
    paths = {name: tuple(f"layers.{i}.{name}" for i in range(LAYERS)) for name in sorted(modules)}
    d_in, d_out = ({name: WIDTHS[name][kind] for name in paths} for kind in (0, 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = Hypernetwork(config, LoraTargets(tuple(range(LAYERS)), paths, d_in, d_out), HIDDEN)
    built.config = config
    return awaken(built.to(torch.float64)).to(dtype)


def states(batch: int, tokens: int = 7, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[batch, layers, tokens, H]` of samples of different lengths, padding somewhere in each."""
    generator = torch.Generator().manual_seed(1)
    hidden = 3 * torch.randn(batch, LAYERS, tokens, HIDDEN, generator=generator, dtype=torch.float64)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for row in range(1, batch):
        mask[row, -row:] = 0  # on the right
    if batch > 2:
        mask[2], mask[2, :2] = 1, 0  # and on the left
    hidden[mask.bool().logical_not()[:, None].expand(-1, LAYERS, -1)] = 1e4  # padding is never looked at
    return hidden.to(dtype), mask


def expected(built: Hypernetwork, hidden: torch.Tensor, mask: torch.Tensor):
    widths = {name: WIDTHS[name] for name in built.module_names}
    return reference.generate(hidden, mask, dict(built.named_parameters()), built.config, widths)


@pytest.fixture(params=CASES, ids=str)
def case(request):
    modules, batch, fields = CASES[request.param]
    return build(modules, fields), *states(batch)


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
def test_adapters_and_gradients_are_those_of_the_reference(case, folded):
    built, hidden, mask = case
    built.perceiver.folded = folded
    ours, theirs = built(hidden, mask), expected(built, hidden, mask)
    assert set(theirs) == set(ours.lora_A)
    weigh, losses = torch.Generator().manual_seed(2), [torch.zeros((), dtype=torch.float64)] * 2
    for name, (a, b) in theirs.items():
        for mine, wanted in ((ours.lora_A[name], a), (ours.lora_B[name], b)):
            torch.testing.assert_close(mine, wanted, atol=1e-12, rtol=1e-12)
            weight = torch.randn(mine.shape, generator=weigh, dtype=mine.dtype)
            losses = [loss + (weight * x).sum() for loss, x in zip(losses, (mine, wanted), strict=True)]
    names, parameters = zip(*built.named_parameters(), strict=True)
    grads = [torch.autograd.grad(loss, parameters) for loss in losses]
    for name, mine, wanted in zip(names, *grads, strict=True):
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(mine, wanted, atol=1e-11 * float(wanted.abs().max()), rtol=1e-9, msg=name)


def test_plain_and_folded_agree_in_float32(case):
    built, hidden, mask = case
    exact = built(hidden, mask)
    built, hidden = built.float(), hidden.float()
    for folded in (False, True):
        built.perceiver.folded = folded
        ours = built(hidden, mask)
        for name in ours.lora_A:
            for mine, wanted in ((ours.lora_A[name], exact.lora_A[name]), (ours.lora_B[name], exact.lora_B[name])):
                assert mine.dtype == torch.float32
                assert (mine - wanted).norm() <= 5e-6 * wanted.norm()


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
def test_chunks_change_nothing(monkeypatch, folded):
    built = build(["down_proj", "q_proj"], {})
    built.perceiver.folded = folded
    hidden, mask = states(3)
    whole = built(hidden, mask)
    for size in (1, 5):
        monkeypatch.setattr(hypernetwork, "TOKENS_PER_CHUNK", size)
        chunked = built(hidden, mask)
        torch.testing.assert_close(chunked.lora_A, whole.lora_A, atol=1e-12, rtol=0)
        torch.testing.assert_close(chunked.lora_B, whole.lora_B, atol=1e-12, rtol=0)


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
def test_a_sample_gets_in_a_batch_what_it_gets_alone(folded):
    built = build(["down_proj"], {})
    built.perceiver.folded = folded
    hidden, mask = states(4)
    together = built(hidden, mask)
    for row in range(4):
        alone = built(hidden[row : row + 1, :, mask[row].bool()])  # no mask at all
        torch.testing.assert_close(alone.lora_A, together[row].lora_A, atol=1e-12, rtol=0)
        torch.testing.assert_close(alone.lora_B, together[row].lora_B, atol=1e-12, rtol=0)


def test_gradient_checkpointing_changes_no_gradient():
    built, (hidden, mask) = build(["down_proj"], {}), states(3)
    grads = []
    for enabled in (False, True):
        built.gradient_checkpointing = enabled
        built.train()
        ours = built(hidden, mask)
        grads.append(torch.autograd.grad(ours.lora_B["down_proj"].square().sum(), list(built.perceiver.parameters())))
    torch.testing.assert_close(grads[1], grads[0], atol=1e-13, rtol=1e-12)


def test_folding_is_chosen_where_it_is_cheaper():
    """At the released size (D 512, 16 heads of 128, 4 groups) it pays while there are fewer than 43 latents."""

    def folded(num_latents: int) -> bool:
        config = Video2LoraConfig(num_latents=num_latents, num_blocks=1)
        with torch.device("meta"):
            built = Hypernetwork(config, LoraTargets((0,), {"m": ("m",)}, {"m": 4}, {"m": 4}), 8)
        return built.perceiver.folded

    assert folded(8) and folded(42) and not folded(43)


def test_padding_repeats_as_a_stacked_batch_would():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert Padding.of(torch.ones(2, 3)) is None
    repeated, stacked = Padding.of(mask).repeat(3), Padding.of(mask.repeat(3, 1))
    assert torch.equal(repeated.mask, stacked.mask) and torch.equal(repeated.index, stacked.index)


def test_bfloat16_tokens_meet_float32_latents():
    """Only the projection and the two products with tokens run in bfloat16: the error stays near its own rounding."""
    built, (hidden, mask) = build(["down_proj"], {}), states(3)
    exact = built(hidden, mask)
    single = copy.deepcopy(built).float()
    for folded, bound in ((True, 2e-2), (False, 2e-2)):
        single.perceiver.folded = folded
        half = single(hidden.bfloat16(), mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            auto = single(hidden.float(), mask)
        for ours in (half, auto):
            for mine, wanted in ((ours.lora_A, exact.lora_A), (ours.lora_B, exact.lora_B)):
                assert mine["down_proj"].dtype == torch.float32
                assert (mine["down_proj"] - wanted["down_proj"]).norm() <= bound * wanted["down_proj"].norm()


@pytest.mark.parametrize("tokens", [3, 8, 9, 31, 64])
def test_a_sum_over_many_tokens_in_parts(tokens, monkeypatch):
    monkeypatch.setattr(perceiver, "TOKENS_PER_PART", 4)
    weights = torch.rand(2, tokens, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, tokens, 6, dtype=torch.float64, requires_grad=True)
    ours, plain = perceiver.weighted_sum(weights, values), weights.transpose(1, 2) @ values
    torch.testing.assert_close(ours, plain, atol=1e-13, rtol=0)
    gradient = torch.randn_like(plain)
    for mine, wanted in zip(
        torch.autograd.grad(ours, (weights, values), gradient),
        torch.autograd.grad(plain, (weights, values), gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted, atol=1e-13, rtol=0)
