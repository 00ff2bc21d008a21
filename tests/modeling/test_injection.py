"""Injection: each row gets what merging its adapter into a copy of the base gives, and nothing is left behind."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from video2lora.modeling import inject_lora, injection, merge_lora, resolve_targets
from video2lora.testing import tiny_smolvlm

from .helpers import assert_unchanged, merged, num_hooks, random_lora, snapshot, text_batch

MODULES = ["down_proj", "o_proj", "q_proj"]


@pytest.fixture(scope="module")
def targets(smolvlm):
    return resolve_targets(smolvlm.vlm, MODULES)


@pytest.fixture(scope="module")
def adapters(targets):
    return random_lora(targets, 3)


@pytest.fixture(scope="module")
def merged_bases(smolvlm, targets, adapters):
    return [merged(smolvlm.vlm, targets, adapter) for adapter in adapters]


@torch.no_grad()
def logits(vlm, input_ids):
    return vlm(input_ids=input_ids).logits


def assert_rows(ours, bases, owners, queries):
    """Row i of `ours` is what base `owners[i]` says to query i, and not what the others say."""
    for row, owner in enumerate(owners):
        torch.testing.assert_close(
            ours[row : row + 1], logits(bases[owner], queries[row : row + 1]), atol=2e-5, rtol=0
        )
        for other in set(range(len(bases))) - {owner}:
            assert (ours[row] - logits(bases[other], queries[row : row + 1])[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "counts, owners",
    [
        (1, [0, 1, 2]),
        ([1, 1, 1], [0, 1, 2]),
        (2, [0, 0, 1, 1, 2, 2]),
        ([2, 2, 2], [0, 0, 1, 1, 2, 2]),
        ([1, 3, 2], [0, 1, 1, 1, 2, 2]),
    ],
)
def test_every_row_gets_its_own_adapter(smolvlm, targets, adapters, merged_bases, counts, owners):
    queries = text_batch(len(owners))
    with inject_lora(smolvlm.vlm, targets, adapters, counts):
        ours = logits(smolvlm.vlm, queries)
    assert_rows(ours, merged_bases, owners, queries)
    assert num_hooks(smolvlm.vlm) == 0


def test_one_adapter_answers_every_row(smolvlm, targets, adapters, merged_bases):
    queries = text_batch(4)
    with inject_lora(smolvlm.vlm, targets, adapters[1]):
        assert_rows(logits(smolvlm.vlm, queries), merged_bases, [1] * 4, queries)
        assert_rows(logits(smolvlm.vlm, queries[:1]), merged_bases, [1], queries)


def test_every_family(family):
    targets = resolve_targets(family.vlm, ["down_proj"])
    assert len(targets.all_paths()) == 4 and not any("vis" in path for path in targets.all_paths())
    adapters, queries = random_lora(targets, 2), text_batch(3)
    with inject_lora(family.vlm, targets, adapters, [1, 2]):
        ours = logits(family.vlm, queries)
    assert_rows(ours, [merged(family.vlm, targets, adapter) for adapter in adapters], [0, 1, 1], queries)


@pytest.mark.parametrize("counts, owners", [([1, 1], [0, 1]), ([2, 1], [0, 0, 1])])
@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 4, "num_return_sequences": 2}],
)
def test_generation_multiplies_rows(smolvlm, targets, adapters, merged_bases, counts, owners, arguments):
    queries = text_batch(len(owners))
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 2} | arguments
    pair = type(adapters)(
        {n: a[:2] for n, a in adapters.lora_A.items()},
        {n: b[:2] for n, b in adapters.lora_B.items()},
        adapters.scaling,
        (4, 4),
    )
    if arguments.get("do_sample"):
        # what is drawn depends on the batch: score the draws with the merged bases instead
        arguments |= {"output_scores": True, "return_dict_in_generate": True, "top_k": 0}
        with inject_lora(smolvlm.vlm, targets, pair, counts):
            drawn = smolvlm.vlm.generate(input_ids=queries, **arguments)
        for row, sequence in enumerate(drawn.sequences):
            expected = logits(merged_bases[owners[row // 2]], sequence[None])[0, -2].log_softmax(-1)
            given = drawn.scores[-1][row].log_softmax(-1)
            allowed = given.isfinite()  # min_new_tokens forbids the end
            torch.testing.assert_close(given[allowed], expected[allowed].log_softmax(-1), atol=1e-4, rtol=0)
        return
    with inject_lora(smolvlm.vlm, targets, pair, counts):
        ours = smolvlm.vlm.generate(input_ids=queries, **arguments)
    alone = [
        merged_bases[owner].generate(input_ids=queries[row : row + 1], **arguments) for row, owner in enumerate(owners)
    ]
    assert ours.tolist() == torch.cat(alone).tolist()


def test_an_exception_leaves_nothing(smolvlm, targets, adapters):
    vlm, queries = smolvlm.vlm, text_batch(3)
    weights, before = snapshot(vlm), logits(vlm, queries)
    with pytest.raises(KeyError), inject_lora(vlm, targets, adapters):
        logits(vlm, queries)
        raise KeyError
    with pytest.raises(ValueError, match="4 rows.*3 rows"), inject_lora(vlm, targets, adapters):
        logits(vlm, text_batch(4))
    assert num_hooks(vlm) == 0
    assert_unchanged(vlm, weights)
    assert torch.equal(logits(vlm, queries), before)


def test_nested_blocks_add_up(smolvlm, targets, adapters):
    queries, other = text_batch(1), random_lora(targets, 1, rank=2, seed=5, scaling=1.5)
    one, both = merged(smolvlm.vlm, targets, adapters[0]), merged(smolvlm.vlm, targets, adapters[0], other)
    with inject_lora(smolvlm.vlm, targets, adapters[0]):
        with inject_lora(smolvlm.vlm, targets, other):
            torch.testing.assert_close(logits(smolvlm.vlm, queries), logits(both, queries), atol=2e-5, rtol=0)
        torch.testing.assert_close(logits(smolvlm.vlm, queries), logits(one, queries), atol=2e-5, rtol=0)


def test_threads_answer_with_their_own_adapters(smolvlm, targets, adapters):
    queries, rounds = text_batch(2), 20
    alone = []
    for adapter in adapters:
        with inject_lora(smolvlm.vlm, targets, adapter):
            alone.append(logits(smolvlm.vlm, queries))
    base = logits(smolvlm.vlm, queries)
    barrier, wrong = threading.Barrier(4), []

    def answer(index: int) -> None:
        barrier.wait()
        for _ in range(rounds):
            if index == 3:
                wrong.extend([] if torch.equal(logits(smolvlm.vlm, queries), base) else [index])
                continue
            with inject_lora(smolvlm.vlm, targets, adapters[index]):
                wrong.extend([] if torch.equal(logits(smolvlm.vlm, queries), alone[index]) else [index])

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and num_hooks(smolvlm.vlm) == 0


def test_gradients_reach_every_tensor_and_no_weight(smolvlm, targets, make_model):
    """Against autograd through weights that were merged by hand."""
    adapters, queries = random_lora(targets, 2, rank=2), text_batch(3)
    tensors = [*adapters.lora_A.values(), *adapters.lora_B.values()]
    for tensor in tensors:
        tensor.requires_grad_()
    base = copy.deepcopy(smolvlm.vlm).requires_grad_(False)
    with inject_lora(base, targets, adapters, [1, 2]):
        loss = base(input_ids=queries).logits.square().mean(dim=(1, 2)).sum()
    ours = torch.autograd.grad(loss, tensors)
    assert not any(parameter.requires_grad for parameter in base.parameters())

    expected = 0
    for rows, index in ((queries[:1], 0), (queries[1:], 1)):
        weights = {}
        for name, paths in targets.paths.items():
            for place, path in enumerate(paths):
                a, b = adapters.lora_A[name][index, place], adapters.lora_B[name][index, place]
                weights[f"{path}.weight"] = base.get_submodule(path).weight + adapters.scaling * b.T @ a
        output = torch.func.functional_call(base, weights, kwargs={"input_ids": rows})
        expected = expected + output.logits.square().mean(dim=(1, 2)).sum()
    for mine, wanted in zip(ours, torch.autograd.grad(expected, tensors), strict=True):
        assert wanted.abs().flatten(1).max(1).values.min() > 0
        assert (mine - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(smolvlm, targets, adapters, merged_bases, dtype):
    """The base's dtype is that of its answers; float32 adapters follow it."""
    base, queries = copy.deepcopy(smolvlm.vlm).to(dtype), text_batch(3)
    with inject_lora(base, targets, adapters):
        ours = logits(base, queries)
    assert ours.dtype == dtype
    exact = torch.cat([logits(merged_bases[row], queries[row : row + 1]) for row in range(3)])
    assert (ours - exact).norm() < (0.05 if dtype is torch.bfloat16 else 1e-5) * exact.norm()


def test_autocast(smolvlm, targets, adapters, merged_bases):
    queries = text_batch(3)
    with torch.autocast("cpu", dtype=torch.bfloat16), inject_lora(smolvlm.vlm, targets, adapters):
        ours = logits(smolvlm.vlm, queries)
    exact = torch.cat([logits(merged_bases[row], queries[row : row + 1]) for row in range(3)])
    assert ours.dtype == torch.bfloat16 and (ours - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_gives_every_bit_back(smolvlm, targets, adapters, merged_bases, dtype):
    base, queries = copy.deepcopy(smolvlm.vlm).to(dtype), text_batch(2)
    weights, places = snapshot(base), [parameter.data_ptr() for parameter in base.parameters()]
    with pytest.raises(KeyError), merge_lora(base, targets, adapters[1]):
        ours, exact = logits(base, queries), logits(merged_bases[1], queries)
        assert (ours - exact).norm() < (0.02 if dtype is torch.bfloat16 else 1e-5) * exact.norm()
        assert places == [parameter.data_ptr() for parameter in base.parameters()]  # CUDA graphs stay valid
        raise KeyError
    assert_unchanged(base, weights)
    assert places == [parameter.data_ptr() for parameter in base.parameters()]


def test_merging_that_cannot_be(smolvlm, targets, adapters):
    base = copy.deepcopy(smolvlm.vlm)
    weights = snapshot(base)
    with pytest.raises(ValueError, match="one adapter to merge, got 3"), merge_lora(base, targets, adapters):
        raise AssertionError("entered")
    last = base.get_submodule(targets.paths["q_proj"][-1])
    last.weight = torch.nn.Parameter(last.weight.to(torch.float8_e4m3fn))  # what comes before it is merged by then
    with pytest.raises(ValueError, match="q_proj is quantised"), merge_lora(base, targets, adapters[0]):
        raise AssertionError("entered")
    last.weight = torch.nn.Parameter(weights[f"{targets.paths['q_proj'][-1]}.weight"])
    assert_unchanged(base, weights)


def test_one_adapter_is_merged_at_a_time(smolvlm, targets, adapters):
    """Two threads that leave in the order they came would give back each other's weights, for good."""
    base = copy.deepcopy(smolvlm.vlm)
    weights = snapshot(base)
    first, second = merge_lora(base, targets, adapters[0]), merge_lora(base, targets, adapters[1])
    with first:
        inside = snapshot(base)
        with pytest.raises(RuntimeError, match="merged into this base already"), second:
            raise AssertionError("entered")
        assert_unchanged(base, inside)
        with merge_lora(copy.deepcopy(smolvlm.vlm), targets, adapters[1]):  # another base is nobody else's matter
            pass
    assert_unchanged(base, weights)
    with merge_lora(base, targets, adapters[1]):
        assert not torch.equal(logits(base, text_batch(1)), logits(smolvlm.vlm, text_batch(1)))
    assert_unchanged(base, weights)


def test_a_weight_that_two_layers_share_is_given_back(smolvlm, targets, adapters):
    base = copy.deepcopy(smolvlm.vlm)
    first, last = (base.get_submodule(targets.paths["q_proj"][layer]) for layer in (0, -1))
    last.weight = first.weight
    weights = snapshot(base)
    with merge_lora(base, targets, adapters[0]):
        pass
    assert_unchanged(base, weights)


def test_two_backward_passes_in_one_block(smolvlm, targets):
    """A batch in two halves: gradients add up to those of the whole."""
    adapters, queries = random_lora(targets, 1, rank=2), text_batch(4)
    tensors = [tensor.requires_grad_() for tensor in (*adapters.lora_A.values(), *adapters.lora_B.values())]
    base = copy.deepcopy(smolvlm.vlm).requires_grad_(False)
    with inject_lora(base, targets, adapters):
        loss = [base(input_ids=rows).logits.square().mean() for rows in (queries, queries[:2], queries[2:])]
    whole = torch.autograd.grad(loss[0], tensors, retain_graph=True)
    halves = [torch.autograd.grad(part / 2, tensors, retain_graph=True) for part in loss[1:]]
    for total, first, second in zip(whole, *halves, strict=True):
        torch.testing.assert_close(first + second, total, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("counts", [[1, 1], [1, 1, 0], [1, 1, 1, 1], 0])
def test_counts_that_do_not_fit(smolvlm, targets, adapters, counts):
    with pytest.raises(ValueError, match="positive number for each of 3 adapters"):
        with inject_lora(smolvlm.vlm, targets, adapters, counts):
            raise AssertionError("entered")


def test_adapters_of_another_base(smolvlm, targets, adapters):
    from video2lora.testing import tiny_smolvlm

    wider = resolve_targets(tiny_smolvlm(intermediate_size=96)[0], MODULES)
    for wrong in (random_lora(wider, 3), random_lora(resolve_targets(smolvlm.vlm, ["down_proj"]), 3)):
        with pytest.raises(ValueError, match=r"expected \(layers, d_in, d_out\).*\(4, 128, 64\).*got.*another base"):
            with inject_lora(smolvlm.vlm, targets, wrong):
                raise AssertionError("entered")
    assert num_hooks(smolvlm.vlm) == 0


@pytest.mark.parametrize(
    "modules, layers, words",
    [
        (["mlp"], None, "0 Linear modules called 'mlp'.*down_proj"),
        (["qkv"], None, "0 Linear modules called 'qkv'"),
        (["down_proj"], [0, 4], r"\[0, 4\] must lie in 0..3"),
    ],
)
def test_targets_that_do_not_exist(qwen, modules, layers, words):
    with pytest.raises(ValueError, match=words):
        resolve_targets(qwen.vlm, modules, layers)


def test_a_model_without_decoder_layers():
    with pytest.raises(ValueError, match="Linear has no decoder layers"):
        resolve_targets(torch.nn.Linear(2, 2), ["down_proj"])


def test_an_abandoned_block_may_be_collected_while_another_opens(monkeypatch):
    """Garbage collection comes at any time, in the middle of opening a block too."""
    base, targets = fresh_base()
    first, second = random_lora(targets, 2)
    expected = logits(merged(base, targets, second), text_batch(1))

    def abandoned():
        with inject_lora(base, targets, first):
            yield

    block = abandoned()
    next(block)
    cycle = [block]
    cycle.append(cycle)
    del block, cycle
    setting = injection._Open._set

    def collecting(self, injections):
        gc.collect()
        setting(self, injections)

    monkeypatch.setattr(injection._Open, "_set", collecting)
    with torch.no_grad(), inject_lora(base, targets, second):
        assert len(injection._open.injections) == 1
        torch.testing.assert_close(base(text_batch(1)).logits, expected, atol=2e-5, rtol=0)
    assert not injection._open.injections and num_hooks(base) == 0


# --- memory of adapters ----------------------------------------------------------------------------------------------


def addresses():
    """Where the adapters of the open blocks lie."""
    return [
        {tensor.data_ptr() for delta in one.deltas.values() for tensor in (delta.lora_A, delta.lora_B)}
        for one in injection._open.injections
    ]


def fresh_base():
    base = tiny_smolvlm()[0].eval().requires_grad_(False)
    return base, resolve_targets(base, ["down_proj"])


def test_the_next_adapters_lie_where_the_last_ones_lay():
    """Graphs of the base keep addresses; and what lay there before is not seen again."""
    base, targets = fresh_base()
    adapters, queries, seen = random_lora(targets, 3), text_batch(1), []
    for adapter in [*adapters, adapters[0]]:
        expected = logits(merged(base, targets, adapter), queries)
        with torch.no_grad(), inject_lora(base, targets, adapter):
            seen.append(addresses()[0])
            torch.testing.assert_close(base(queries).logits, expected, atol=2e-5, rtol=0)
    assert seen[0] == seen[1] == seen[2] == seen[3] and len(seen[0]) == 2 * len(targets.layer_indices)


def test_an_open_block_keeps_its_memory_to_itself():
    base, targets = fresh_base()
    first, second = random_lora(targets, 2)
    with torch.no_grad():
        with inject_lora(base, targets, first):
            with inject_lora(base, targets, second):
                one, other = addresses()
                assert not one & other
            with inject_lora(base, targets, second):
                assert addresses() == [one, other]
        with inject_lora(base, targets, second), pytest.raises(ZeroDivisionError):
            with inject_lora(base, targets, first):
                raise ZeroDivisionError
        for _ in range(3):  # whatever was open at once: a graph made for the first place is good for all
            with inject_lora(base, targets, first):
                assert addresses() == [one]


def test_a_block_that_does_not_open_gives_its_memory_back(monkeypatch):
    base, targets = fresh_base()
    lora = random_lora(targets, 1)

    def fail(*_arguments):
        raise MemoryError

    with torch.no_grad():
        with inject_lora(base, targets, lora):
            place = addresses()[0]
        for name in ("_Delta", "_seen_by_compiled_code"):
            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                patch.setattr(injection, name, fail)
                with inject_lora(base, targets, lora):
                    pass
            assert not injection._open.injections and num_hooks(base) == 0
            with inject_lora(base, targets, lora):
                assert addresses()[0] == place


@pytest.mark.parametrize("trained", ["lora_A", "lora_B", "both", "prompt"])
def test_with_gradients_adapters_have_memory_of_their_own(trained):
    """What autograd has kept of a step must be there in the backward pass, whatever was adapted since."""
    base, targets = fresh_base()
    lora = random_lora(targets, 1)
    prompt = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    kinds = {"lora_A": [lora.lora_A], "lora_B": [lora.lora_B], "both": [lora.lora_A, lora.lora_B], "prompt": []}
    tensors = [tensor.requires_grad_() for kind in kinds[trained] for tensor in kind.values()]
    tensors += [prompt.requires_grad_()] if trained == "prompt" else []
    with inject_lora(base, targets, lora):
        loss = base(inputs_embeds=prompt).logits.square().mean()
    wanted = torch.autograd.grad(loss, tensors, retain_graph=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), inject_lora(base, targets, random_lora(targets, 1, seed=5)):
            base(text_batch(1))
    for gradient, other in zip(wanted, torch.autograd.grad(loss, tensors), strict=True):
        assert gradient.abs().max() > 0 and torch.equal(gradient, other)


def test_a_block_opened_without_gradients_may_be_run_with_them():
    base, targets = fresh_base()
    first, second = random_lora(targets, 2)
    prompt = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with inject_lora(base, targets, first):
        (wanted,) = torch.autograd.grad(base(inputs_embeds=prompt).logits.square().mean(), prompt)
    with torch.no_grad(), inject_lora(base, targets, first), torch.enable_grad():
        loss = base(inputs_embeds=prompt).logits.square().mean()
    with torch.no_grad(), inject_lora(base, targets, second):
        base(text_batch(1))
    torch.testing.assert_close(torch.autograd.grad(loss, prompt)[0], wanted)


def test_forward_gradients_and_tracing_have_memory_of_their_own():
    base, targets = fresh_base()
    base.set_attn_implementation("eager")  # the other has no forward gradient on a CPU
    lora, queries = random_lora(targets, 1), text_batch(1)
    expected = logits(merged(base, targets, lora), queries)
    (name,) = lora.lora_B
    tangents = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            dual = forward_ad.make_dual(lora.lora_B[name], lora.lora_B[name])
            with inject_lora(base, targets, replace(lora, lora_B={name: dual})):
                tangents.append(forward_ad.unpack_dual(base(queries).logits).tangent)
    assert tangents[0].abs().max() > 1e-2
    torch.testing.assert_close(*tangents)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), inject_lora(base, targets, lora):
        pass
    with torch.no_grad(), inject_lora(base, targets, lora):
        torch.testing.assert_close(base(queries).logits, expected, atol=2e-5, rtol=0)


def test_memory_is_kept_for_a_few_sizes_and_goes_with_the_base(monkeypatch):
    base, targets = fresh_base()
    with torch.no_grad():
        for rank in (1, 2, 3, 4, 5, 6, 7, 8, 2, 9, 1):  # the last is back where others had to go
            with inject_lora(base, targets, random_lora(targets, 1, rank=rank)):
                pass
    module = base.get_submodule(targets.paths["down_proj"][0])
    kept = injection._kept._memories[module]

    def ranks(role, kept=kept):
        return {memory.whole.shape[2] for key, memory in kept if key[0] == role}

    assert ranks("A") == ranks("B") == {1, 2, 4, 5, 6, 7, 8, 9} and len(kept) == 2 * injection._Kept.SIZES
    # twice as wide, lora_A has room for 36 ranks there, lora_B for 72
    most = 4 * max(memory.whole.nbytes for _, memory in kept)
    monkeypatch.setattr(injection._Kept, "BYTES", most)
    with torch.no_grad(), inject_lora(base, targets, random_lora(targets, 1, rank=3)):
        assert ranks("A") == {1, 2, 3, 6, 7, 8, 9} and ranks("B") == {1, 2, 3, 5, 6, 7, 8, 9}
    whole = weakref.ref(kept[0][1].whole)
    del base, module, kept, ranks
    gc.collect()
    assert whole() is None


def test_memory_made_in_inference_mode_can_be_written_outside_it():
    base, targets = fresh_base()
    one, other = random_lora(targets, 2)
    with torch.inference_mode(), inject_lora(base, targets, one):
        base(text_batch(1))
    with torch.no_grad(), inject_lora(base, targets, other):
        found = base(text_batch(1)).logits
    torch.testing.assert_close(found, logits(merged(base, targets, other), text_batch(1)), atol=2e-5, rtol=0)
