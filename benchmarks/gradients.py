"""Benchmark: are the gradients of a fast training step those of the plain mathematics, to bfloat16's noise?

Three ways to the same loss: as training does it (folded attention, projection in chunks and checkpointed, packed
tokens, under bf16 autocast); plain (keys and values over all tokens, nothing recomputed) under bf16 autocast, which is
the noise that is to be expected; and plain in float32, the truth. Errors are relative to the truth's norm, for each
group of parameters. Two truths: with the same bfloat16 base (the difference is the hypernetwork's) and with the base
in float32 too. Then what torch.compile of the perceiver does for the time of a step.

    python benchmarks/gradients.py [--sizes 500M 2.2B] [--no-compile]
    python benchmarks/gradients.py --sizes tiny --device cpu        (checks the script)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from sizes import SIZES, build, table, video_inputs
from torch import Tensor

from video2lora.modeling import Video2LoraModel
from video2lora.modeling.hypernetwork import Padding

SIZES.setdefault(
    "tiny",
    {
        "text_config": {
            "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": 49280,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "pad_token_id": 2,
        },
        "vision_config": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
                          "num_hidden_layers": 2, "patch_size": 8, "image_size": 64},
        "scale_factor": 2,
    },
)  # fmt: skip
VIDEOS = {"2.2B": 1}
GROUPS: dict[str, Callable[[str], bool]] = {
    "modality projection": lambda n: "modality_projection" in n,
    "encoder latents": lambda n: n == "perceiver.encoder.latents",
    "encoder attention": lambda n: "perceiver.encoder" in n and "_proj" in n and "mlp" not in n,
    "encoder norms": lambda n: "perceiver.encoder" in n and "norm" in n,
    "encoder MLPs": lambda n: "perceiver.encoder" in n and "mlp." in n,
    "decoder": lambda n: "perceiver.decoder" in n,
    "residual MLP": lambda n: "residual_mlps" in n,
    "head": lambda n: n.startswith("head."),
    "scaler A": lambda n: n.startswith("scaler_A."),
    "scaler B": lambda n: n.startswith("scaler_B."),
    "static A": lambda n: n.startswith("bias_A."),
    "static B": lambda n: n.startswith("bias_B."),
}


def plain_embed(model: Video2LoraModel, dtype: torch.dtype) -> Callable[[Tensor, Padding | None], Tensor]:
    """The perceiver without anything that makes it fast: in float32, or in bf16 under autocast."""
    perceiver = model.hypernetwork.perceiver

    def embed(hidden_states: Tensor, padding: Padding | None = None) -> Tensor:
        mask = None if padding is None else padding.mask
        with torch.autocast(hidden_states.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            tokens = perceiver.modality_projection(hidden_states.to(dtype)).float()
            return perceiver.decoder(perceiver.encoder(tokens, mask, folded=False))

    return embed


def make_batch(size: str, videos: int, device: str) -> dict[str, Any]:
    """`videos` of 12 frames, the last one with padding; two queries of 96 tokens each, 64 of them labelled."""
    inputs = video_inputs(size, 12, videos, device)
    inputs["attention_mask"][-1, -8:] = 0
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 49000, (2 * videos, 96), generator=generator).to(device)
    labels = input_ids.clone()
    labels[:, :32] = -100
    return {"input_ids": input_ids, "labels": labels, "video_inputs": inputs, "queries_per_video": 2}


def gradients(model: Video2LoraModel, batch: dict[str, Any], autocast: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss and every parameter's gradient, in float64 on the CPU."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.double().cpu() for n, p in model.hypernetwork.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def compare(size: str, device: str) -> tuple[str, list[list[str]]]:
    """Losses in words, and a row for each group of parameters."""
    model = prepared(size, device)
    assert model.hypernetwork.perceiver.folded
    batch = make_batch(size, VIDEOS.get(size, 2), device)
    results = {"ours": gradients(model, batch, autocast=True)}
    for name, dtype in (("plain bf16", torch.bfloat16), ("truth", torch.float32)):
        model.hypernetwork.embed = plain_embed(model, dtype)  # type: ignore[method-assign]
        results[name] = gradients(model, batch, autocast=name != "truth")
    model.vlm.float()
    results["all float32"] = gradients(model, batch, autocast=False)
    said = ", ".join(f"{name} {loss:.6f}" for name, (loss, _) in results.items())
    rows = []
    parameters = list(results["truth"][1])
    for group, belongs in [*GROUPS.items(), ("all", lambda n: True)]:
        names = [name for name in parameters if belongs(name)]
        parts = {name: torch.cat([found[n].flatten() for n in names]) for name, (_, found) in results.items()}
        ours, plain = parts["ours"], parts["plain bf16"]
        row = [size, group]
        for truth in (parts["truth"], parts["all float32"]):
            errors = [((part - truth).norm() / truth.norm()).item() for part in (ours, plain)]
            cosine = (ours @ truth / (ours.norm() * truth.norm())).item()
            row += [f"{errors[0]:.2e}", f"{errors[1]:.2e}", f"{errors[0] / errors[1]:.2f}", f"{cosine:.6f}"]
        rows.append(row)
    seen = {n for belongs in GROUPS.values() for n in parameters if belongs(n)}
    assert seen == set(parameters), f"in no group: {sorted(set(parameters) - seen)}"
    return said, rows


def prepared(size: str, device: str) -> Video2LoraModel:
    """A model in training whose static part changes something too, so that no gradient is zero."""
    model = build(size, device)
    for static in model.hypernetwork.bias_B.values():
        torch.nn.init.normal_(static, std=0.02)
    return model.train()


def compiled_step(size: str, device: str, videos: int) -> list[list[str]]:
    """Time of a whole training step, eager and with the parts of the hypernetwork compiled."""
    rows = []
    for compiled in (False, True):
        model = prepared(size, device)
        optimizer = torch.optim.AdamW(model.hypernetwork.parameters(), lr=1e-5, fused=True)
        batch = make_batch(size, videos, device)
        if compiled:
            perceiver = model.hypernetwork.perceiver
            for module in (perceiver.modality_projection, perceiver.encoder, perceiver.decoder):
                module.compile()

        def step(model=model, optimizer=optimizer, batch=batch) -> None:
            with torch.autocast(device, torch.bfloat16):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        start = time.perf_counter()
        step()
        wait(device)
        first = time.perf_counter() - start
        step()
        wait(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(4):
            step()
        wait(device)
        took = (time.perf_counter() - start) / 4
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device == "cuda" else ""
        rows.append(
            [size, str(videos), "compiled" if compiled else "eager", f"{took * 1e3:.0f}", f"{first:.1f}", peak]
        )
    return rows


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["500M", "2.2B"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--videos", type=int, default=16, help="in the step that is timed")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False  # the truth is float32
    rows = []
    for size in arguments.sizes:
        said, more = compare(size, arguments.device)
        rows += more
        print(f"{size}: loss {said}", flush=True)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    truths = [
        f"{what}, {against}"
        for against in ("same base", "all float32")
        for what in ("ours", "plain bf16", "ratio", "cosine")
    ]
    print(table(["size", "parameters", *truths], rows), flush=True)
    if not arguments.no_compile:
        header = ["size", "videos", "hypernetwork", "step ms", "first step s", "peak GB"]
        print(table(header, compiled_step(arguments.sizes[0], arguments.device, arguments.videos)))


if __name__ == "__main__":
    main()
