"""Modeling: the perceiver that reads one decoder layer's hidden states into a few embeddings.

Two exact forms of its cross-attention are here: the plain one, with keys and values over all tokens, and the folded
one, which scores the few queries directly against the normalised tokens so that keys and values never exist.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu, softmax

RMS_NORM_EPS = 1e-6
TOKENS_PER_PART = 1024


def rms_normalize(x: Tensor) -> Tensor:
    """`x / sqrt(mean(x^2) + 1e-6)` over the last dimension, computed in float32 at least, in the dtype of `x`."""
    return rms_norm(x, x.shape[-1:], eps=RMS_NORM_EPS)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, eps 1e-6."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.weight, RMS_NORM_EPS)


class GatedMLP(nn.Module):
    """SwiGLU MLP `W_down(silu(W_gate x) * W_up x)` without biases."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.up_proj = nn.Linear(in_features, hidden_features, bias=False)
        self.down_proj = nn.Linear(hidden_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Computes in the dtype of `x`: the weights are cast to it, so that bfloat16 tokens meet float32 weights."""
        gate, up, down = (module.weight.to(x.dtype) for module in (self.gate_proj, self.up_proj, self.down_proj))
        return linear(silu(linear(x, gate)) * linear(x, up), down)


def weighted_sum(weights: Tensor, tokens: Tensor) -> Tensor:
    """`weights^T @ tokens` over very many tokens: `[batch, tokens, rows]` by `[batch, tokens, size]`.

    Done in parts of `TOKENS_PER_PART` that are then added up in float32: a matrix product with few rows and a sum over
    a hundred thousand tokens keeps a GPU nearly idle.
    """
    parts = tokens.shape[1] // TOKENS_PER_PART
    if parts < 2:
        return weights.transpose(1, 2) @ tokens
    even = parts * TOKENS_PER_PART
    left, right = (tensor[:, :even].unflatten(1, (parts, -1)) for tensor in (weights, tokens))
    total = (left.transpose(2, 3) @ right).sum(1, dtype=torch.promote_types(tokens.dtype, torch.float32))
    return total + weights[:, even:].transpose(1, 2) @ tokens[:, even:]


class LatentLayer(nn.Module):
    """One perceiver layer: latents attend to a context and to themselves (or to themselves alone), then an MLP.

    Grouped-query attention without positions or causal mask; sandwich norms. `cross=False` makes the self-attention
    layer, which has no context norm. (Section 2, Perceiver, of the method.)
    """

    def __init__(self, size: int, num_heads: int, num_key_value_heads: int, head_dim: int, cross: bool = True) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.latent_norm = RMSNorm(size)
        self.context_norm = RMSNorm(size) if cross else None
        self.q_proj = nn.Linear(size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, size, bias=False)
        self.post_attention_norm = RMSNorm(size)
        self.pre_mlp_norm = RMSNorm(size)
        self.mlp = GatedMLP(size, 4 * size, size)
        self.post_mlp_norm = RMSNorm(size)

    def forward(
        self, latents: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None, folded: bool = False
    ) -> Tensor:
        """Update the latents.

        Args:
            latents: `[batch, num_latents, size]`.
            context: `[batch, tokens, size]`; for a folded layer already RMS-normalised without a weight, in any dtype.
            context_mask: `[batch, tokens]`, true where a token counts; `None` means all.
            folded: which of the two equal forms to compute.

        Returns:
            `[batch, num_latents, size]`.
        """
        normed = self.latent_norm(latents)
        queries = self.q_proj(normed).unflatten(-1, (self.num_key_value_heads, -1, self.head_dim))
        if folded and context is not None:
            attended = self._attend_folded(queries, normed, context, context_mask)
        else:
            attended = self._attend_plain(queries, normed, context, context_mask)
        latents = latents + self.post_attention_norm(self.o_proj(attended.flatten(2)))
        return latents + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(latents)))

    def _attend_plain(
        self, queries: Tensor, normed: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> Tensor:
        # queries [b, n, g, h, d]: g key/value groups of h query heads each
        tokens = normed
        if context is not None and self.context_norm is not None:
            tokens = torch.cat([self.context_norm(context), normed], dim=1)
        keys = self.k_proj(tokens).unflatten(-1, (self.num_key_value_heads, self.head_dim))
        values = self.v_proj(tokens).unflatten(-1, (self.num_key_value_heads, self.head_dim))
        scores = torch.einsum("bnghd,btgd->bghnt", queries, keys) / math.sqrt(self.head_dim)
        if context_mask is not None:
            hidden = torch.cat([~context_mask, context_mask.new_zeros(normed.shape[:2])], dim=1)
            scores = scores.masked_fill(hidden[:, None, None, None, :], -math.inf)
        return torch.einsum("bghnt,btgd->bnghd", softmax(scores, dim=-1), values).flatten(2, 3)

    def _attend_folded(self, queries: Tensor, normed: Tensor, unit: Tensor, context_mask: Tensor | None) -> Tensor:
        key_weight = self.k_proj.weight.unflatten(0, (self.num_key_value_heads, self.head_dim))
        value_weight = self.v_proj.weight.unflatten(0, (self.num_key_value_heads, self.head_dim))
        # W_k moves from the tokens to the queries, the context norm's weight with it (it must not touch the latents)
        folded = torch.einsum("bnghd,gde->bnghe", queries, key_weight) / math.sqrt(self.head_dim)
        shape = folded.shape[1:4]
        folded = folded.flatten(1, 3)
        assert self.context_norm is not None
        weight = self.context_norm.weight
        # tokens before queries: whatever the number of tokens, rows of these matrices stay aligned for tensor cores
        token_scores = (unit @ (weight * folded).to(unit.dtype).transpose(1, 2)).to(folded.dtype)
        if context_mask is not None:
            token_scores = token_scores.masked_fill(~context_mask[:, :, None], -math.inf)
        latent_scores = normed @ folded.transpose(1, 2)
        # one softmax over both, by hand: torch's own over a long first dimension leaves a GPU idle
        top = torch.maximum(token_scores.amax(1, keepdim=True), latent_scores.amax(1, keepdim=True)).detach()
        token_parts, latent_parts = (token_scores - top).exp(), (latent_scores - top).exp()
        total = (token_parts.sum(1) + latent_parts.sum(1))[..., None]
        mixed = weight * weighted_sum(token_parts.to(unit.dtype), unit).to(folded.dtype)
        mixed = (mixed + latent_parts.transpose(1, 2) @ normed) / total
        # W_v comes after the weighted sum
        return torch.einsum("bnghe,gde->bnghd", mixed.unflatten(1, shape), value_weight).flatten(2, 3)


class LatentStack(nn.Module):
    """Learned latents refined by layers, and a final norm."""

    def __init__(self, num_latents: int, size: int, layers: list[LatentLayer]) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(num_latents, size))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.latents)

    def forward(self, context: Tensor, context_mask: Tensor | None = None, folded: bool = False) -> Tensor:
        """Read `context` `[batch, tokens, size]` into `[batch, num_latents, size]`; see [`LatentLayer`]."""
        latents = self.latents.expand(context.shape[0], -1, -1)
        for layer in self.layers:
            if layer.context_norm is None:
                latents = layer(latents)
            else:
                latents = layer(latents, context, context_mask, folded=folded)
        return self.norm(latents)


class Perceiver(nn.Module):
    """Reads hidden states of one decoder layer into `num_queries` embeddings; the same weights serve every layer.

    The work falls into two parts: [`project`] is per token and carries nearly all of the cost; [`read`] is of latent
    size. `folded` attention is used where it is cheaper.

    Args:
        hidden_size: width H of the hidden states.
        size: latent width D.
        num_latents, num_blocks, num_self_attn_per_block: the encoder.
        num_queries: embeddings to produce (target modules times rank).
        num_heads, num_key_value_heads, head_dim: of every attention.
    """

    def __init__(
        self,
        hidden_size: int,
        size: int,
        num_latents: int,
        num_blocks: int,
        num_queries: int,
        num_self_attn_per_block: int = 0,
        num_heads: int = 16,
        num_key_value_heads: int = 4,
        head_dim: int = 128,
    ) -> None:
        super().__init__()
        heads = (num_heads, num_key_value_heads, head_dim)
        self.modality_projection = GatedMLP(hidden_size, 4 * hidden_size, size)
        kinds = ([True] + [False] * num_self_attn_per_block) * num_blocks
        self.encoder = LatentStack(num_latents, size, [LatentLayer(size, *heads, cross=cross) for cross in kinds])
        self.decoder = LatentStack(num_queries, size, [LatentLayer(size, *heads)])
        # multiplications a token and block: 2 heads n D folded, 2 D d_kv + 2 heads n d plain
        self.folded = num_latents * num_heads * (size - head_dim) < size * num_key_value_heads * head_dim

    def project(self, hidden_states: Tensor) -> Tensor:
        """Project tokens `[..., hidden_size]` to `[..., size]` in their own dtype; normalised to RMS 1 if folded."""
        projected = self.modality_projection(hidden_states)
        return rms_normalize(projected) if self.folded else projected

    def read(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read projected tokens `[batch, tokens, size]` (mask `[batch, tokens]`) into `[batch, num_queries, size]`.

        Everything of latent size is computed in the weights' dtype (float32), whatever the tokens' dtype is.
        """
        if not self.folded:
            tokens = tokens.to(self.encoder.latents.dtype)
        latents = self.encoder(tokens, mask, folded=self.folded)
        return self.decoder(latents)
