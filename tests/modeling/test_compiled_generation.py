"""Static cache and compilation: with or without adapters graphs say what the modules say, and none is made twice."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import CompileConfig

from video2lora.modeling import Video2LoraModel, inject_lora, merge_lora, resolve_targets
from video2lora.testing import tiny_smolvlm

from .helpers import SMALL, awaken, merged, num_hooks, random_lora, text_batch

NEW = 5


@pytest.fixture
def vlm():
    """A fresh base of two layers (tracing takes seconds): generate() keeps its compiled call on the model."""
    torch._dynamo.reset()
    yield tiny_smolvlm(num_hidden_layers=2)[0].eval()
    torch._dynamo.reset()


@pytest.fixture
def targets(vlm):
    return resolve_targets(vlm, ["down_proj"])


def strong_lora(targets, batch: int, **kwargs):
    """Adapters whose answers differ from the base's within a few tokens."""
    return random_lora(targets, batch, scaling=15.0, **kwargs)


class Decoder:
    """Greedy tokens, eager or through graphs, which it counts."""

    def __init__(self, fullgraph: bool = True) -> None:
        self.graphs = 0

        def backend(graph, _inputs):
            self.graphs += 1
            return graph

        self.config = CompileConfig(backend=backend, mode=None, fullgraph=fullgraph)
        self.config._compile_all_devices = True

    def __call__(self, model, rows: int = 1, compiled: bool = True, **kwargs) -> list[list[int]]:
        kwargs |= {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 2, "do_sample": False}
        if compiled:
            kwargs |= {"cache_implementation": "static", "compile_config": self.config}
        return model.generate(input_ids=text_batch(rows), **kwargs)[:, -NEW:].tolist()

    def is_eager(self, model, rows: int = 1, **kwargs) -> bool:
        """Whether the graph says what the modules say."""
        return self(model, rows, **kwargs) == self(model, rows, compiled=False, **kwargs)


@pytest.mark.parametrize("base_first", [True, False])
def test_base_and_adapters_in_turn(vlm, targets, base_first):
    """Dynamo does not see hooks come and go; the answers must be right all the same, with a graph for each kind."""
    decode, adapters = Decoder(), strong_lora(targets, 3)
    base = decode(vlm, compiled=False)
    if base_first:
        assert decode(vlm) == base and decode.graphs == 1
    for adapter in adapters:
        expected = decode(merged(vlm, targets, adapter), compiled=False)
        assert expected != base
        with inject_lora(vlm, targets, adapter):
            assert decode(vlm) == expected and decode(vlm) == expected
        assert decode(vlm) == base and decode.graphs == 2
        with merge_lora(vlm, targets, adapter):
            assert decode(vlm) == expected
        assert decode(vlm) == base and decode.graphs == 2
    assert num_hooks(vlm) == 0


def test_under_a_disabled_autocast_cache(vlm, targets):
    """What tells graphs apart is a switch; its other position must do as well."""
    decode, adapter = Decoder(), strong_lora(targets, 1)
    base = decode(vlm, compiled=False)
    torch.set_autocast_cache_enabled(False)
    try:
        assert decode(vlm) == base
        with inject_lora(vlm, targets, adapter):
            assert decode.is_eager(vlm) and decode(vlm) != base
        assert decode(vlm) == base and not torch.is_autocast_cache_enabled()
    finally:
        torch.set_autocast_cache_enabled(True)


@pytest.mark.parametrize("counts, rows", [([1] * 4, 4), ([2] * 4, 8), ([1, 3, 2, 2], 8)])
def test_batches_of_other_adapters_need_no_new_graph(vlm, targets, counts, rows):
    decode = Decoder()
    for seed in (0, 1):
        with inject_lora(vlm, targets, strong_lora(targets, 4, seed=seed), counts):
            assert decode.is_eager(vlm, rows)
        assert decode.graphs == 1


def test_graphs_take_adapters_where_they_lie(vlm, targets):
    """Inputs marked as staying in their place are not copied before a CUDA graph is replayed."""
    marked, products = [], []

    def backend(graph, _inputs):
        products.append([node for node in graph.graph.nodes if "bmm" in str(node.target)])
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        kinds = [node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") for node in places]
        shapes = [tuple(node.meta["example_value"].shape) for node in places]
        marked.append([shape for kind, shape in zip(kinds, shapes, strict=True) if kind and shape[:2] == (3, 4)])
        return graph

    decode = Decoder()
    decode.config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    decode.config._compile_all_devices = True
    with torch.no_grad(), inject_lora(vlm, targets, strong_lora(targets, 3)):
        assert decode.is_eager(vlm, 3)
    assert not products[-1]  # sums, for one token
    widths = targets.in_features["down_proj"], targets.out_features["down_proj"]
    assert sorted(marked[-1]) == sorted([(3, 4, width) for width in widths] * 2)


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 2, 2], [1, 3, 2], [6]])
def test_one_token_in_half_precision(targets, counts):
    """Sums in float32 of what is stored in bfloat16: as near to the truth as the products, or nearer."""
    generator = torch.Generator().manual_seed(0)
    base = tiny_smolvlm(num_hidden_layers=2)[0].eval()
    linear = base.get_submodule(targets.paths["down_proj"][0])
    x = torch.randn(6, 1, linear.in_features, generator=generator)
    lora = strong_lora(targets, len(counts))
    with torch.no_grad(), inject_lora(base, targets, lora, counts):
        truth = linear(x)
    with torch.no_grad(), inject_lora(base.to(torch.bfloat16), targets, lora, counts):
        eager = linear(x.bfloat16())
        compiled = torch.compile(lambda x: linear(x), backend="eager", fullgraph=True)(x.bfloat16())
    assert compiled.dtype == torch.bfloat16 and compiled.shape == truth.shape
    scale = truth.abs().max()
    assert (compiled - truth).abs().max() / scale < 0.02 and (eager - truth).abs().max() / scale < 0.03


def test_the_models_own_generate(vlm):
    """Each call opens a block of its own; adapters of any dtype and memory layout fit the same graph."""
    model = Video2LoraModel.from_vlm(vlm, **SMALL)
    awaken(model.hypernetwork)
    decode, adapters = Decoder(), strong_lora(model.targets, 3)
    base = decode(model)
    assert decode.graphs == 1
    for adapter in (*adapters, adapters[0].to(dtype=torch.float64), adapters[1].fold()):
        assert decode.is_eager(model, adapters=adapter) and decode(model, adapters=adapter) != base
    assert decode(model) == base
    assert decode.graphs == 2


def test_nested_blocks(vlm, targets):
    decode, adapters = Decoder(), strong_lora(targets, 3)
    for first, second in ((0, 1), (1, 2)):
        with inject_lora(vlm, targets, adapters[first]):
            one = decode(vlm)
            with inject_lora(vlm, targets, adapters[second]):
                assert decode.is_eager(vlm) and decode(vlm) != one
            assert decode.is_eager(vlm) and decode(vlm) == one
        assert decode.graphs == 2


def in_a_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    (result,) = results
    return result


def test_other_threads(vlm, targets):
    """Another thread gets the plain base, whichever graphs there are; and its own adapter is its alone."""
    decode, adapters = Decoder(fullgraph=False), strong_lora(targets, 2)
    base = decode(vlm, compiled=False)

    def theirs():
        with inject_lora(vlm, targets, adapters[1]):
            return decode(vlm), decode(vlm, compiled=False)

    with inject_lora(vlm, targets, adapters[0]):
        mine = decode(vlm)
        assert mine != base and in_a_thread(lambda: decode(vlm)) == base
        compiled, eager = in_a_thread(theirs)  # two threads with adapters at once
        assert compiled == eager and eager not in (mine, base)
        assert decode(vlm) == mine == decode(vlm, compiled=False)
    assert in_a_thread(theirs) == (eager, eager)  # alone
    assert decode(vlm) == base == in_a_thread(lambda: decode(vlm))


def test_modules_the_user_compiled(vlm, targets):
    """Not only generate()'s graphs: layers compiled in place before any adapter was on."""
    adapter, queries = strong_lora(targets, 1), text_batch(1)
    expected = merged(vlm, targets, adapter)(input_ids=queries).logits
    for layer in vlm.get_decoder().layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        base = vlm(input_ids=queries).logits
        with inject_lora(vlm, targets, adapter):
            torch.testing.assert_close(vlm(input_ids=queries).logits, expected, atol=2e-5, rtol=0)
        assert torch.equal(vlm(input_ids=queries).logits, base)


def test_gradients_through_a_graph(vlm, targets):
    adapters, queries = strong_lora(targets, 2), text_batch(3)
    tensors = [tensor.requires_grad_() for tensor in (*adapters.lora_A.values(), *adapters.lora_B.values())]
    vlm.requires_grad_(False)
    compiled = torch.compile(vlm, backend="aot_eager", fullgraph=True)
    found = []
    for model in (vlm, compiled):
        with inject_lora(vlm, targets, adapters, [1, 2]):
            found.append(torch.autograd.grad(model(input_ids=queries).logits.square().mean(), tensors))
    for eager, traced in zip(*found, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(traced, eager, atol=1e-6, rtol=1e-4)
