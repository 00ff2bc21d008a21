"""Modeling: the hypernetwork, from the hidden states of every decoder layer to LoRA weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from .configuration import Video2LoraConfig
from .lora import LoraWeights
from .perceiver import Perceiver
from .targets import LoraTargets

TOKENS_PER_CHUNK = 8192
"""Tokens projected at a time: bounds the peak (4H wide activations) without costing speed."""

TRAINING_TOKENS_PER_CHUNK = 65536
"""The same in training, where each chunk also costs a pass over the weights' float32 gradients."""

MIN_NORM = 1e-12
"""Floor of an embedding's norm before the head: a zero embedding gives zero, not NaN."""


@dataclass(frozen=True)
class Padding:
    """Which tokens of a padded batch count, found once for all layers (finding out waits for the device).

    Attributes:
        mask: `[batch, tokens]` bool, true where a token counts.
        index: `[valid tokens]`, their positions in the flattened batch.
    """

    mask: Tensor
    index: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor) -> Padding | None:
        """The padding of `attention_mask` `[batch, tokens]`, or `None` when every token counts."""
        mask = attention_mask.bool()
        index = mask.flatten().nonzero().squeeze(1)
        return None if len(index) == mask.numel() else cls(mask, index)

    def repeat(self, times: int) -> Padding:
        """The padding of this batch stacked `times` times, `[times * batch, tokens]`."""
        shifts = torch.arange(times, device=self.index.device)[:, None] * self.mask.numel()
        return Padding(self.mask.repeat(times, 1), (shifts + self.index).flatten())


class ResidualMLP(nn.Module):
    """`x + LayerNorm(W2 silu(W1 LayerNorm(x) + b1) + b2)`, width 4D."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(size)
        self.linear_in = nn.Linear(size, 4 * size)
        self.linear_out = nn.Linear(4 * size, size)
        self.norm_out = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm_out(self.linear_out(silu(self.linear_in(self.norm_in(x)))))


class Hypernetwork(nn.Module):
    """Turns the hidden states entering each decoder layer into a LoRA adapter for those layers.

    Section 2 of the method: a perceiver shared by all layers, residual MLPs, and a head, scalers and a static part of
    each layer's own. A new hypernetwork's adapters change nothing (`scaler_B` and `bias_B` start at zero).

    Args:
        config: sizes.
        targets: the modules to adapt, with their widths.
        hidden_size: width H of the hidden states.
    """

    def __init__(self, config: Video2LoraConfig, targets: LoraTargets, hidden_size: int) -> None:
        super().__init__()
        self.rank, self.scaling = config.rank, float(config.lora_scaling or 0.0)
        self.module_names = targets.module_names
        self.in_features, self.out_features = targets.in_features, targets.out_features
        self.num_layers = num_layers = len(targets.layer_indices)
        size, rank = config.latent_size, config.rank
        self.gradient_checkpointing = False
        self.perceiver = Perceiver(
            hidden_size,
            size,
            config.num_latents,
            config.num_blocks,
            num_queries=len(self.module_names) * rank,
            num_self_attn_per_block=config.num_self_attn_per_block,
            num_heads=config.perceiver_num_heads,
            num_key_value_heads=config.perceiver_num_key_value_heads,
            head_dim=config.perceiver_head_dim,
        )
        self.residual_mlps = nn.ModuleList(ResidualMLP(size) for _ in range(config.num_pre_head_layers))

        def per_module(shape_of: Callable[[str], tuple[int, ...]]) -> nn.ParameterDict:
            return nn.ParameterDict({n: nn.Parameter(torch.empty(shape_of(n))) for n in self.module_names})

        d_in, d_out = self.in_features, self.out_features
        self.head = per_module(lambda n: (num_layers, size, d_in[n] + d_out[n]))
        self.scaler_A = per_module(lambda n: (num_layers, rank))
        self.scaler_B = per_module(lambda n: (num_layers, rank))
        self.use_static_lora = config.use_static_lora
        if self.use_static_lora:
            self.bias_A = per_module(lambda n: (num_layers, rank, d_in[n]))
            self.bias_B = per_module(lambda n: (num_layers, rank, d_out[n]))
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        return self.perceiver.encoder.latents.device

    def reset_parameters(self) -> None:
        """Set the head, scalers and static part to their initial values; the submodules set their own."""
        d_lora = max(self.in_features[n] + self.out_features[n] for n in self.module_names)
        for name in self.module_names:
            size = self.head[name].shape[1]
            nn.init.normal_(self.head[name], std=0.5 / (size + d_lora * self.rank) ** 0.5)
            nn.init.ones_(self.scaler_A[name])
            nn.init.zeros_(self.scaler_B[name])
            if self.use_static_lora:
                nn.init.normal_(self.bias_A[name], std=0.2 / (self.in_features[name] * self.rank) ** 0.5)
                nn.init.zeros_(self.bias_B[name])

    def project(self, hidden_states: Tensor) -> Tensor:
        """Project tokens `[tokens, hidden_size]` to latent width, a chunk at a time; returns `[tokens, latent_size]`.

        The dtype is autocast's where it is on, else that of `hidden_states`.
        """
        device_type = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        with torch.autocast(device_type, enabled=False):
            hidden_states = hidden_states.to(dtype or hidden_states.dtype)
            if not torch.is_grad_enabled():
                return torch.cat([self.perceiver.project(chunk) for chunk in hidden_states.split(TOKENS_PER_CHUNK)])
            # what is 4H wide is most of a step's memory, and cheap to compute again
            chunks = hidden_states.split(TRAINING_TOKENS_PER_CHUNK)
            return torch.cat([checkpoint(self.perceiver.project, chunk, use_reentrant=False) for chunk in chunks])

    def read(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read projected tokens `[batch, tokens, latent_size]` into `[batch, modules * rank, latent_size]`."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.perceiver.read(tokens, mask)

    def embed(self, hidden_states: Tensor, padding: Padding | None = None) -> Tensor:
        """Read hidden states of any layers, each as a batch item of its own.

        Args:
            hidden_states: `[batch, tokens, hidden_size]`.
            padding: which tokens count; padding is dropped, not computed.

        Returns:
            `[batch, modules * rank, latent_size]`, in the weights' dtype (float32).
        """
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self._embed, hidden_states, padding, use_reentrant=False)
        return self._embed(hidden_states, padding)

    def _embed(self, hidden_states: Tensor, padding: Padding | None) -> Tensor:
        flat = hidden_states.flatten(0, 1)
        if padding is None:
            return self.read(self.project(flat).unflatten(0, hidden_states.shape[:2]))
        packed = self.project(flat.index_select(0, padding.index))
        tokens = packed.new_zeros(len(flat), packed.shape[-1]).index_copy(0, padding.index, packed)
        return self.read(tokens.unflatten(0, hidden_states.shape[:2]), padding.mask)

    def generate_weights(self, embeddings: Tensor) -> LoraWeights:
        """Turn the embeddings of every layer into the generated part of an adapter.

        Args:
            embeddings: `[batch, layers, modules * rank, latent_size]`.

        Returns:
            Adapters of `rank` rows, without the static part.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            # float32, unless somebody cast the weights (FSDP's mixed precision does)
            embeddings = embeddings.to(self.head[self.module_names[0]].dtype)
            for mlp in self.residual_mlps:
                embeddings = mlp(embeddings)
            norm = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
            unit = embeddings / norm.clamp_min(MIN_NORM)
            lora_A, lora_B = {}, {}
            for name, rows in zip(self.module_names, unit.split(self.rank, dim=2), strict=True):
                weights = torch.einsum("blrd,ldf->blrf", rows, self.head[name])
                a, b = weights.split([self.in_features[name], self.out_features[name]], dim=-1)
                lora_A[name] = a * self.scaler_A[name][..., None]
                lora_B[name] = b * self.scaler_B[name][..., None]
        return LoraWeights(lora_A, lora_B, self.scaling, (self.rank,) * embeddings.shape[0])

    def combine(
        self, generated: LoraWeights | Sequence[LoraWeights], segments_per_adapter: Sequence[int] | None = None
    ) -> LoraWeights:
        """Concatenate consecutive generated adapters along the rank and append the static part once.

        Args:
            generated: the generated part of `sum(segments_per_adapter)` segments, in one batch or, in the same order,
                several: an hour's chunks need not be copied into one first.
            segments_per_adapter: how many consecutive segments make one adapter; one each by default.

        Returns:
            Adapters of rank `(segments + 1) * rank` (without a static part `segments * rank`), the shorter ones of the
            batch filled with zero rows at the end.

        Raises:
            ValueError: the counts do not add up to the number of segments, or a batch is not what
                [`generate_weights`] returns, or has another dtype or device than the first.
        """
        parts = [generated] if isinstance(generated, LoraWeights) else list(generated)
        self._check_generated(parts)
        ends = [0, *accumulate(map(len, parts))]
        counts = [1] * ends[-1] if segments_per_adapter is None else [int(n) for n in segments_per_adapter]
        if sum(counts) != ends[-1] or min(counts, default=0) < 1:
            raise ValueError(
                f"segments_per_adapter {counts} must be positive and add up to the {ends[-1]} segments given."
            )
        first = parts[0]
        static_rank = self.rank if self.use_static_lora else 0

        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        places = [place for count in counts for place in range(count)]
        # one copy for all adapters: a hundred small ones a step are launches and little else
        row, place, end = (
            torch.tensor(numbers).to(first.device, non_blocking=True) for numbers in (rows, places, counts)
        )

        def join(tensors: list[Tensor], static: Tensor | None) -> Tensor:
            _, layers, rank, width = tensors[0].shape
            blocks = max(counts) + (static is not None)
            joined = tensors[0].new_zeros(len(counts), layers, blocks, rank, width)
            for tensor, start, stop in zip(tensors, ends, ends[1:], strict=False):
                joined[row[start:stop], :, place[start:stop]] = tensor
            if static is not None:
                joined[torch.arange(len(counts), device=end.device), :, end] = static.to(joined)
            return joined.flatten(2, 3)

        static = self.use_static_lora
        return LoraWeights(
            {n: join([part.lora_A[n] for part in parts], self.bias_A[n] if static else None) for n in first.lora_A},
            {n: join([part.lora_B[n] for part in parts], self.bias_B[n] if static else None) for n in first.lora_B},
            first.scaling,
            tuple(count * self.rank + static_rank for count in counts),
            static_rank,
        )

    def _check_generated(self, parts: Sequence[LoraWeights]) -> None:
        """Raise `ValueError` for a batch of other modules, sizes or scaling than this hypernetwork generates."""
        sizes = (self.num_layers, self.rank)
        expected = {n: ((*sizes, self.in_features[n]), (*sizes, self.out_features[n])) for n in self.module_names}
        places = []
        for number, part in enumerate(parts):
            shapes = {n: (tuple(a.shape[1:]), tuple(part.lora_B[n].shape[1:])) for n, a in part.lora_A.items()}
            if shapes != expected or part.scaling != self.scaling:
                raise ValueError(
                    f"batch {number} of generated adapters has (layers, rank, width) {shapes} and scaling "
                    f"{part.scaling}; this hypernetwork's have {expected} and {self.scaling}."
                )
            places += [f"{tensor.dtype} on {tensor.device}" for tensor in part.lora_A.values()]
        if len(set(places)) > 1:
            raise ValueError(f"generated adapters are {' and '.join(sorted(set(places)))}: bring them together first.")

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, segments_per_adapter: Sequence[int] | None = None
    ) -> LoraWeights:
        """Generate adapters from stacked hidden states.

        Args:
            hidden_states: `[batch, layers, tokens, hidden_size]`, the tensors entering each adapted decoder layer.
            mask: `[batch, tokens]`, nonzero where a token counts.
            segments_per_adapter: see [`combine`].
        """
        batch, layers = hidden_states.shape[:2]
        padding = None if mask is None else Padding.of(mask.repeat_interleave(layers, dim=0))
        embeddings = self.embed(hidden_states.flatten(0, 1), padding).unflatten(0, (batch, layers))
        return self.combine(self.generate_weights(embeddings), segments_per_adapter)
