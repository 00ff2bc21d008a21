"""Benchmark: what a question costs with an adapter merged, attached or one a row, eagerly and with CUDA graphs.

python benchmarks/queries.py [--size 500M] [--parts single batch graph static static_batch static_peft] [--seconds 145]

`single`: one question at a time; `batch`: many, each with its own adapter; `graph`: one decode step as a CUDA graph
made by hand (the bound: no compiler, no generate around it); `static`: generate's static cache and compilation;
`static_batch`, `static_peft`: the same with an adapter a row, and through PEFT. What no time is left for says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from sizes import table
from torch import Tensor
from transformers import CompileConfig, StaticCache

from video2lora.adapters import VideoAdapter
from video2lora.evaluation.efficiency_models import build_random
from video2lora.modeling import LoraWeights, Video2LoraModel, inject_lora, merge_lora

PROMPT_TOKENS = 23
PARTS = ("single", "batch", "graph", "static", "static_batch", "static_peft")
COMPILE_SECONDS = {"500M": 35, "2.2B": 30}
"""What it is thought to take to make a graph; with less time left it is not begun."""
HEADER = ["part", "condition", "batch", "rank", "first token ms", "ms a token", "tokens/s", "ratio", "remark"]


class Bench:
    """The model, its adapters, the clock, and the rows found so far.

    Args:
        model: the model on its device.
        new_tokens: decoded after the first.
        seconds: the run takes about so long.
        compile_seconds: see `COMPILE_SECONDS`.
    """

    def __init__(self, model: Video2LoraModel, new_tokens: int, seconds: float, compile_seconds: float) -> None:
        self.model, self.vlm, self.targets = model, model.vlm, model.targets
        self.new_tokens, self.compile_seconds = new_tokens, compile_seconds
        self.end = time.perf_counter() + seconds
        self.rows: list[dict[str, Any]] = []

    def adapters(self, count: int, rank: int, seed: int = 0) -> LoraWeights:
        """Random adapters as a server keeps them: on the device, in the base's dtype."""
        generator = torch.Generator(self.vlm.device).manual_seed(seed)

        def draw(sizes: dict[str, int]) -> dict[str, Tensor]:
            layers = len(self.targets.layer_indices)
            return {
                n: torch.randn(count, layers, rank, sizes[n], generator=generator, device=self.vlm.device)
                .mul(sizes[n] ** -0.5)
                .to(self.vlm.dtype)
                for n in self.targets.paths
            }

        return LoraWeights(draw(self.targets.in_features), draw(self.targets.out_features), 0.5, (rank,) * count)

    def inputs(self, batch: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (batch, PROMPT_TOKENS)
        input_ids = torch.randint(1000, 40000, shape, generator=generator) % self.vlm.config.text_config.vocab_size
        input_ids = input_ids.to(self.vlm.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def generate(self, batch: int, new_tokens: int, **kwargs: Any) -> Tensor:
        """Greedy answers `[batch, new_tokens]`, never ended early."""
        exactly = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        return self.model.generate(**self.inputs(batch), **exactly, **kwargs)[:, PROMPT_TOKENS:]

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Median of the time until the device has done `run`."""
        found = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def synchronize(self) -> None:
        if self.vlm.device.type == "cuda":
            torch.cuda.synchronize()

    def times(self, batch: int, repeats: int = 3, new_tokens: int | None = None, **kwargs: Any) -> tuple[float, float]:
        """Seconds to the first token and of each one behind it, after a warm-up."""
        new_tokens = new_tokens or self.new_tokens
        self.generate(batch, 3, **kwargs)
        first = self.seconds(lambda: self.generate(batch, 1, **kwargs), 3 * repeats)
        whole = self.seconds(lambda: self.generate(batch, 1 + new_tokens, **kwargs), repeats)
        return first, (whole - first) / new_tokens

    def add(self, part: str, condition: str, batch: int, rank: int | None, **values: Any) -> dict[str, Any]:
        """Keep and print a row."""
        row = {"part": part, "condition": condition, "batch": batch, "rank": rank, **values}
        if "token_s" in row:
            row["tokens_per_s"] = batch / row["token_s"]
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return row

    def has_time(self, seconds: float) -> bool:
        return time.perf_counter() + seconds < self.end


@contextmanager
def through_peft(bench: Bench, lora: LoraWeights) -> Iterator[tuple[Any, list[str]]]:
    """A PeftModel with these adapters in the base's dtype, and their names; taken off afterwards."""
    names = [f"video{index}" for index in range(len(lora))]
    adapters = [VideoAdapter.from_weights(weights, vlm=bench.vlm, targets=bench.targets) for weights in lora]
    model: Any = bench.vlm
    try:
        for name, adapter in zip(names, adapters, strict=True):
            model = adapter.attach(model, name)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(bench.vlm.dtype)  # PEFT made it float32
        model.set_adapter(names[0], inference_mode=True)
        yield model, names
    finally:
        if model is not bench.vlm:
            model.unload()
        gc.collect()


# --- eager -----------------------------------------------------------------------------------------------------------


def single(bench: Bench) -> None:
    """One question at a time, in turn with the base by itself: the host's speed drifts by more than two per cent."""
    for condition, rank in (("merged", 32), ("attached", 32), ("attached, PEFT", 32), ("attached", 48)):
        lora = bench.adapters(1, rank)
        pairs = []
        for _ in range(3):
            base = bench.times(1, 1)
            context: AbstractContextManager[Any] = nullcontext()
            if condition == "merged":
                context = merge_lora(bench.vlm, bench.targets, lora)
            elif "PEFT" in condition:
                context = through_peft(bench, lora)
            with context:
                pairs.append((base, bench.times(1, 1, **({"adapters": lora} if condition == "attached" else {}))))
        (first, token), ratios = (
            [statistics.median(pair[1][place] for pair in pairs) for place in (0, 1)],
            [statistics.median(pair[1][place] / pair[0][place] for pair in pairs) for place in (0, 1)],
        )
        bench.add("single", condition, 1, rank, first_s=first, token_s=token, first_ratio=ratios[0], ratio=ratios[1])
        if condition == "merged":
            first, token = (statistics.median(pair[0][place] for pair in pairs) for place in (0, 1))
            bench.add("single", "text only", 1, None, first_s=first, token_s=token, ratio=1.0)
    lora = bench.adapters(1, 32)

    def merge() -> None:
        with merge_lora(bench.vlm, bench.targets, lora):
            pass

    merge()
    bench.add("single", "merging and giving back", 1, 32, first_s=bench.seconds(merge, 5))


def batch(bench: Bench, sizes: list[int]) -> None:
    """Many questions at once; the ratio is the throughput against the merged adapter's."""
    few = max(bench.new_tokens // 2, 2)
    for size in sizes:
        if size == 1:
            continue
        with merge_lora(bench.vlm, bench.targets, bench.adapters(1, 32)):
            _, merged = bench.times(size, 2, few)
        bench.add("batch", "merged, one adapter", size, 32, token_s=merged, ratio=1.0)
        cases = [(f"{size} adapters", size, 32)]
        if size == sizes[-1]:
            cases += [(f"{size} adapters", size, 48), (f"{size} adapters", size, 128), ("one adapter", 1, 32)]
            cases += [(f"{size // 4} adapters, 4 questions each", size // 4, 32)]
        own = {}
        for condition, count, rank in cases:
            kwargs = {"adapters": bench.adapters(count, rank), "queries_per_adapter": size // count}
            first, own[condition, rank] = bench.times(size, 2, few, **kwargs)
            token = own[condition, rank]
            bench.add("batch", condition, size, rank, first_s=first, token_s=token, ratio=merged / token)
        with through_peft(bench, bench.adapters(size, 32)) as (model, names), _mixed(model, names):
            first, token = bench.times(size, 1, max(few // 4, 2))
        values = {"first_s": first, "token_s": token, "ratio": merged / token}
        remark = f"{token / own[f'{size} adapters', 32]:.1f} times as long as ours"
        bench.add("batch", f"{size} adapters, PEFT's adapter_names", size, 32, **values, remark=remark)


def _mixed(model: Any, names: list[str]) -> AbstractContextManager[Any]:
    # what PeftModelForCausalLM.generate does with adapter_names; a plain PeftModel's generate does not take them
    return model._enable_peft_forward_hooks(adapter_names=names)


# --- static cache and compilation by generate ------------------------------------------------------------------------


class Compiled:
    """generate() with a static cache and compilation, its graphs counted."""

    def __init__(self, bench: Bench, part: str) -> None:
        self.bench, self.part = bench, part
        config = CompileConfig(dynamic=False)  # CUDA graphs, by its default mode
        if bench.vlm.device.type != "cuda":
            config = CompileConfig(dynamic=False, backend="eager", mode=None)
            config._compile_all_devices = True
        # one length for all: a longer cache would be another graph
        length = PROMPT_TOKENS + bench.new_tokens + 9
        self.kwargs: dict[str, Any] = {
            "cache_implementation": "static",
            "compile_config": config,
            "max_cache_len": length,
        }

    @staticmethod
    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def measure(self, condition: str, batch: int, rank: int | None, new: bool = True, **kwargs: Any) -> float:
        """Seconds a token; nan where there was no time to compile. `new`: a graph has to be made."""
        bench = self.bench
        if not bench.has_time(bench.compile_seconds if new else 5):
            bench.add(self.part, condition, batch, rank, remark="left out: no time")
            return float("nan")
        eager = bench.generate(batch, 9, **kwargs)
        before = self.graphs()
        made = bench.seconds(lambda: bench.generate(batch, 6, **kwargs, **self.kwargs), 1)
        same = (bench.generate(batch, 9, **kwargs, **self.kwargs) == eager).float().mean().item()
        first, token = bench.times(batch, 3, **kwargs, **self.kwargs)
        remark = f"{self.graphs() - before} graphs made, first call {made:.1f} s, {same:.0%} of 9 tokens as eager"
        bench.add(self.part, condition, batch, rank, first_s=first, token_s=token, remark=remark)
        return token


def static(bench: Bench) -> None:
    compiled = Compiled(bench, "static")
    compiled.measure("text only", 1, None)
    with merge_lora(bench.vlm, bench.targets, bench.adapters(1, 32)):
        compiled.measure("merged", 1, 32, new=False)
    compiled.measure("attached", 1, 32, adapters=bench.adapters(1, 32))
    compiled.measure("attached, another adapter", 1, 32, new=False, adapters=bench.adapters(1, 32, seed=1))
    compiled.measure("text only again", 1, None, new=False)


def static_batch(bench: Bench, size: int) -> None:
    torch._dynamo.reset()
    compiled = Compiled(bench, "static_batch")
    with merge_lora(bench.vlm, bench.targets, bench.adapters(1, 32)):
        merged = compiled.measure("merged, one adapter", size, 32)
    own = compiled.measure(f"{size} adapters", size, 32, adapters=bench.adapters(size, 32))
    bench.rows[-1]["ratio"] = merged / own
    compiled.measure(f"{size} others", size, 32, new=False, adapters=bench.adapters(size, 32, seed=1))


def static_peft(bench: Bench) -> None:
    torch._dynamo.reset()
    compiled = Compiled(bench, "static_peft")
    with through_peft(bench, bench.adapters(2, 32)) as (model, names):
        compiled.measure("attached, PEFT", 1, 32)
        model.set_adapter(names[1], inference_mode=True)
        compiled.measure("attached, PEFT, another adapter", 1, 32)


# --- a CUDA graph by hand --------------------------------------------------------------------------------------------


class DecodeGraph:
    """One greedy decode step over a static cache: captured once, replayed for every token.

    The smallest thing that decodes without a launch from Python: only for comparison, no sampling, no end of turn.
    """

    def __init__(self, bench: Bench, batch: int, length: int) -> None:
        self.vlm, self.inputs = bench.vlm, bench.inputs(batch)["input_ids"]
        device = self.inputs.device
        self.cache = StaticCache(config=self.vlm.config.get_text_config(decoder=True), max_cache_len=length)
        self.mask = torch.zeros(batch, 1, 1, length, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.prefill()
        self.replay: Callable[[], None] = self.step
        if device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            self.replay = graph.replay
        self.prefill()

    def prefill(self) -> None:
        """Start over with the prompt."""
        batch, tokens = self.inputs.shape
        self.cache.reset()
        self.mask.zero_()[..., :tokens] = True
        causal = torch.ones(tokens, self.mask.shape[-1], dtype=torch.bool, device=self.mask.device).tril()
        positions = torch.arange(tokens, device=self.mask.device)
        logits = self._forward(self.inputs, causal.expand(batch, 1, -1, -1), positions)
        self.tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.fill_(tokens)

    def step(self) -> None:
        self.mask.index_fill_(3, self.position, True)
        logits = self._forward(self.tokens, self.mask, self.position)
        self.tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)

    def _forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return self.vlm(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions.expand(len(input_ids), -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits

    def answer(self, new_tokens: int) -> Tensor:
        self.prefill()
        found = [self.tokens.clone()]
        for _ in range(new_tokens - 1):
            self.replay()
            found.append(self.tokens.clone())
        return torch.cat(found, 1)


def graph(bench: Bench, sizes: list[int]) -> None:
    for size in sizes:
        merged = float("nan")
        cases: list[tuple[str, LoraWeights | None, list[int]]] = [("merged or text only", None, [])]
        cases += [("one adapter", bench.adapters(1, 32), [size])]
        ranks = () if size == 1 else (32, 48, 128) if size == sizes[-1] else (32,)
        cases += [(f"{size} adapters", bench.adapters(size, rank), [1] * size) for rank in ranks]
        for condition, lora, counts in cases:
            rank = None if lora is None else lora.ranks[0]
            if not bench.has_time(5):
                bench.add("graph", condition, size, rank, remark="left out: no time")
                continue
            attached = nullcontext() if lora is None else inject_lora(bench.vlm, bench.targets, lora, counts)
            eager = bench.generate(size, 9, adapters=lora, queries_per_adapter=counts or None)
            with attached:
                decode = DecodeGraph(bench, size, PROMPT_TOKENS + bench.new_tokens + 9)
                same = (decode.answer(9) == eager).float().mean().item()
                decode.prefill()

                def run(decode=decode) -> None:
                    for _ in range(bench.new_tokens):
                        decode.replay()

                token = bench.seconds(run, 1) / bench.new_tokens
            merged = token if lora is None else merged
            remark = f"{same:.0%} of 9 tokens as eager"
            bench.add("graph", condition, size, rank, token_s=token, ratio=merged / token, remark=remark)
            del decode
            gc.collect()
    if bench.vlm.device.type == "cuda":
        products(bench, sizes[-1])


def products(bench: Bench, size: int) -> None:
    """One module's update for one token a row: how its factors should lie in memory."""
    name = bench.targets.module_names[0]
    lora = bench.adapters(size, 32)
    x = torch.randn(size, 1, bench.targets.in_features[name], device="cuda", dtype=bench.vlm.dtype)
    output = torch.randn(size, 1, bench.targets.out_features[name], device="cuda", dtype=bench.vlm.dtype)
    a, b = (each[name].transpose(0, 1).contiguous() for each in (lora.lora_A, lora.lora_B))
    turned_a, turned_b = a.mT.contiguous(), b.mT.contiguous()

    def sums(layer: int) -> Tensor:
        hidden = (x * a[layer]).sum(-1, keepdim=True)
        return output + (hidden * b[layer]).sum(1, keepdim=True)

    ways: dict[str, Callable[[int], Tensor]] = {
        "as it is: A [rank, d_in], B [rank, d_out]": lambda n: torch.baddbmm(output, x @ a[n].mT, b[n]),
        "A [d_in, rank]": lambda n: torch.baddbmm(output, x @ turned_a[n], b[n]),
        "B [d_out, rank]": lambda n: torch.baddbmm(output, x @ a[n].mT, turned_b[n].mT),
        "added behind": lambda n: output + (x @ a[n].mT) @ b[n],
        "products and sums": sums,
    }
    for condition, way in ways.items():
        layers = range(len(a))  # each layer's own, or it would be in the cache
        for layer in layers:
            way(layer)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for layer in layers:
                way(layer)
        captured.replay()
        seconds = bench.seconds(captured.replay, 20) / len(layers)
        bench.add("products", condition, size, 32, module_us=seconds * 1e6, remark=f"{seconds * 1e6:.1f} us a module")


def run(model: Video2LoraModel, parts: list[str], batches: list[int], **settings: Any) -> Bench:
    """Measure the parts, one after the other; one that fails does not keep the others from running."""
    bench = Bench(model, **settings)
    work: dict[str, Callable[[], None]] = {
        "single": lambda: single(bench),
        "batch": lambda: batch(bench, batches),
        "graph": lambda: graph(bench, batches),
        "static": lambda: static(bench),
        "static_batch": lambda: static_batch(bench, batches[-1]),
        "static_peft": lambda: static_peft(bench),
    }
    for part in parts:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                work[part]()
        except Exception as error:  # what was found so far is worth more than this part
            bench.add(part, "failed", 0, None, remark=f"{type(error).__name__}: {error}"[:300].replace("\n", " "))
        print(f"# {part}: {time.perf_counter() - start:.0f} s", flush=True)
    return bench


def line(row: dict[str, Any]) -> list[str]:
    """A row of the table."""

    def number(key: str, factor: float = 1.0, digits: int = 2) -> str:
        return f"{row[key] * factor:.{digits}f}" if row.get(key) is not None else ""

    ratio = number("ratio", digits=3) + (f" (first {row['first_ratio']:.3f})" if "first_ratio" in row else "")
    values = [number("first_s", 1e3, 1), number("token_s", 1e3), number("tokens_per_s", digits=0), ratio]
    return [row["part"], row["condition"], str(row["batch"]), str(row["rank"] or ""), *values, row.get("remark", "")]


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="500M", choices=list(COMPILE_SECONDS))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=145, help="begin nothing that would take longer")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = build_random(arguments.size, "cuda")
    seconds = arguments.seconds - (time.perf_counter() - began)
    bench = run(
        model,
        arguments.parts,
        arguments.batches,
        new_tokens=arguments.new_tokens,
        seconds=seconds,
        compile_seconds=COMPILE_SECONDS[arguments.size],
    )
    versions = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, "
    versions += f"peft {peft.__version__}, {arguments.size}"
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "queries.json").write_text(json.dumps({"versions": versions, "rows": bench.rows}, indent=1))
    print(versions)
    print(table(HEADER, [line(row) for row in bench.rows]))


if __name__ == "__main__":
    main()
