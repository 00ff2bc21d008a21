"""Modeling: the hidden states entering each decoder layer, handed over while the model runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .targets import decoder_layers
from .vision import embed_frames


class _LastLayerReached(Exception):
    """Leaves the forward pass once the last wanted hidden state is known."""


def stream_hidden_states(
    vlm: nn.Module,
    inputs: dict[str, Any],
    layer_indices: Sequence[int],
    consume: Callable[[int, Tensor], None],
    stop_early: bool = True,
) -> None:
    """Run `vlm` over `inputs` without gradients and hand over what enters each decoder layer as it runs.

    No stack of all layers' hidden states ever exists, nor logits or a cache. Only this thread's forward pass is read
    and left early: others may use the same base meanwhile.

    Args:
        vlm: the frozen base.
        inputs: its own keyword arguments, such as `input_ids`, `attention_mask`, `pixel_values`.
        layer_indices: the decoder layers wanted, ascending.
        consume: called with a layer's place in `layer_indices` and its input `[batch, tokens, hidden_size]`, with
            gradients enabled if they were enabled around this call.
        stop_early: leave the forward pass at the last wanted layer instead of running that layer and those behind it.
            A sharded model (FSDP) must run to its end.
    """
    layers = decoder_layers(vlm)
    grad_enabled, thread = torch.is_grad_enabled(), threading.get_ident()
    with ExitStack() as hooks:
        for position, index in enumerate(layer_indices):
            last = stop_early and position == len(layer_indices) - 1

            def hand_over(module, args, kwargs, position=position, last=last):
                if threading.get_ident() != thread:
                    return
                hidden_states = args[0] if args else kwargs["hidden_states"]
                with torch.set_grad_enabled(grad_enabled):
                    consume(position, hidden_states.detach())
                if last:
                    raise _LastLayerReached

            handle = layers[index].register_forward_pre_hook(hand_over, with_kwargs=True)
            hooks.callback(handle.remove)
        with torch.no_grad(), keep_rope_deltas(vlm):
            try:
                # the base model has no lm_head, which would otherwise run over every video token
                getattr(vlm, "base_model", vlm)(**embed_frames(vlm, inputs), use_cache=False)
            except _LastLayerReached:
                pass


@contextmanager
def keep_rope_deltas(vlm: nn.Module) -> Iterator[None]:
    """Restore the position offset that models with multimodal rotary positions (Qwen2-VL's family) keep of a video."""
    kept = [(module, module.rope_deltas) for module in vlm.modules() if hasattr(module, "rope_deltas")]
    try:
        yield
    finally:
        for module, rope_deltas in kept:
            module.rope_deltas = rope_deltas
