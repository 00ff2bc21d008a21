"""The hypernetwork written naively from the method: loops over samples, layers and heads; no padding, no batching.

An independent second opinion for the tests: it takes a hypernetwork's parameters by name and shares no code with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Params = Mapping[str, Tensor]


def below(params: Params, prefix: str) -> dict[str, Tensor]:
    """The parameters under `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in params.items() if name.startswith(prefix)}


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def layer_norm(x: Tensor, params: Params) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * params["weight"] + params["bias"]


def swiglu(x: Tensor, params: Params) -> Tensor:
    hidden = silu(x @ params["gate_proj.weight"].T) * (x @ params["up_proj.weight"].T)
    return hidden @ params["down_proj.weight"].T


def perceiver_layer(z: Tensor, x: Tensor | None, params: Params, num_heads: int, num_groups: int) -> Tensor:
    """Latents `z` [n, D] attend to the context `x` [tokens, D] and to themselves; without `x` to themselves alone."""
    normed = rms_norm(z, params["latent_norm.weight"])
    seen = normed if x is None else torch.cat([rms_norm(x, params["context_norm.weight"]), normed])
    queries = (normed @ params["q_proj.weight"].T).chunk(num_heads, dim=-1)
    keys = (seen @ params["k_proj.weight"].T).chunk(num_groups, dim=-1)
    values = (seen @ params["v_proj.weight"].T).chunk(num_groups, dim=-1)
    heads = []
    for head, query in enumerate(queries):
        group = head // (num_heads // num_groups)
        scores = query @ keys[group].T / math.sqrt(query.shape[-1])
        heads.append(torch.softmax(scores, dim=-1) @ values[group])
    attended = torch.cat(heads, dim=-1) @ params["o_proj.weight"].T
    z = z + rms_norm(attended, params["post_attention_norm.weight"])
    mlp = swiglu(rms_norm(z, params["pre_mlp_norm.weight"]), below(params, "mlp."))
    return z + rms_norm(mlp, params["post_mlp_norm.weight"])


def embed(tokens: Tensor, params: Params, config) -> Tensor:
    """One layer's valid tokens `[tokens, H]` to `[modules * rank, D]`."""
    heads = (config.perceiver_num_heads, config.perceiver_num_key_value_heads)
    x = swiglu(tokens, below(params, "perceiver.modality_projection."))
    z, place = params["perceiver.encoder.latents"], 0
    for _ in range(config.num_blocks):
        for context in [x] + [None] * config.num_self_attn_per_block:
            z = perceiver_layer(z, context, below(params, f"perceiver.encoder.layers.{place}."), *heads)
            place += 1
    z = rms_norm(z, params["perceiver.encoder.norm.weight"])
    e = perceiver_layer(params["perceiver.decoder.latents"], z, below(params, "perceiver.decoder.layers.0."), *heads)
    return rms_norm(e, params["perceiver.decoder.norm.weight"])


def generate(
    hidden_states: Tensor, mask: Tensor, params: Params, config, widths: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Adapters of rank 2r from `[batch, layers, tokens, H]`: for each module A `[batch, layers, 2r, d_in]` and B."""
    modules, rank = sorted(widths), config.rank
    rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in modules}
    for sample, valid in zip(hidden_states, mask, strict=True):
        for layer, tokens in enumerate(sample):
            e = embed(tokens[valid.bool()], params, config)
            for index in range(config.num_pre_head_layers):
                mlp = below(params, f"residual_mlps.{index}.")
                hidden = layer_norm(e, below(mlp, "norm_in.")) @ mlp["linear_in.weight"].T + mlp["linear_in.bias"]
                out = silu(hidden) @ mlp["linear_out.weight"].T + mlp["linear_out.bias"]
                e = e + layer_norm(out, below(mlp, "norm_out."))
            e = e / e.pow(2).sum(-1, keepdim=True).sqrt()
            for place, name in enumerate(modules):
                d_in, d_out = widths[name]
                w = e[place * rank : (place + 1) * rank] @ params[f"head.{name}"][layer]
                a = w[:, :d_in] * params[f"scaler_A.{name}"][layer][:, None]
                b = w[:, d_in : d_in + d_out] * params[f"scaler_B.{name}"][layer][:, None]
                rows[name][0].append(torch.cat([a, params[f"bias_A.{name}"][layer]]))
                rows[name][1].append(torch.cat([b, params[f"bias_B.{name}"][layer]]))
    shape = hidden_states.shape[:2]
    return {name: (_stack(a, shape), _stack(b, shape)) for name, (a, b) in rows.items()}


def _stack(rows: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    return torch.stack(list(rows)).unflatten(0, tuple(shape))
