"""Modeling: several turns in one row of a batch, each seeing only itself; and where the labels of a batch stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Labelled:
    """Where the labels of a batch stand, found once (finding out waits for the device).

    Attributes:
        rows, columns: `[labelled tokens]`, places of the tokens that predict them, in row order.
        queries: `[labelled tokens]`, the query each belongs to.
        num_queries: queries of the batch.
    """

    rows: Tensor
    columns: Tensor
    queries: Tensor
    num_queries: int

    @classmethod
    def of(cls, labels: Tensor, turns: Tensor | None = None) -> Labelled:
        """Find them.

        Args:
            labels: `[rows, tokens]`, -100 where there is none; nothing predicts the first token of a row or a turn.
            turns: `[rows, tokens]`, which of its row's turns a token belongs to, from 1; 0 is padding. A row is one
                query without.
        """
        labelled = labels[:, 1:] != -100
        if turns is None:
            rows, columns = labelled.nonzero().unbind(1)
            return cls(rows, columns, rows, len(labels))
        inside = (turns[:, 1:] == turns[:, :-1]) & (turns[:, 1:] > 0)
        rows, columns = (labelled & inside).nonzero().unbind(1)
        counts = turns.amax(1)
        queries = (counts.cumsum(0) - counts)[rows] + turns[rows, columns] - 1
        return cls(rows, columns, queries, int(counts.sum()))

    def mean_per_query(self, token_losses: Tensor) -> Tensor:
        """Each query's mean of `token_losses` `[labelled tokens]`: `[queries]`, 0 for a query without labels."""
        sums = token_losses.new_zeros(self.num_queries).index_add(0, self.queries, token_losses)
        counts = self.queries.new_zeros(self.num_queries).index_add(0, self.queries, torch.ones_like(self.queries))
        return sums / counts.clamp_min(1)


def check_turns_fit(vlm: nn.Module) -> None:
    """Refuse bases for which several turns in one row would not be what they are in rows of their own.

    Raises:
        ValueError: the attention takes no mask of four dimensions, positions are not one number a token, or layers
            carry a state from token to token.
    """
    config: Any = vlm.config.get_text_config()  # type: ignore[operator, union-attr]
    otherwise = "leave them in rows of their own (pack_queries=False)"
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attention {implementation!r} takes no mask that keeps the turns of one row apart: load the base with "
            f'attn_implementation="sdpa", or {otherwise}.'
        )
    if any(hasattr(module, "rope_deltas") for module in vlm.modules()):
        raise ValueError(
            f"{type(vlm).__name__} has several positions a token (time, height, width), which turns that share a row "
            f"do not get: {otherwise}."
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ValueError(
            f"{type(vlm).__name__} has layers ({', '.join(sorted(kinds))}) that no mask keeps the turns of one row "
            f"apart in: {otherwise}."
        )


def turn_inputs(vlm: nn.Module, turns: Tensor) -> dict[str, Tensor]:
    """What tells the base that the turns of a row know nothing of each other.

    Args:
        vlm: the base.
        turns: `[rows, tokens]`, see [`Labelled.of`].

    Returns:
        `attention_mask` `[rows, 1, tokens, tokens]`, causal within each turn, boolean or for eager attention added to
        the scores, and `position_ids` `[rows, tokens]`, from 0 in every turn.

    Raises:
        ValueError: see [`check_turns_fit`]; or a row is longer than the base's attention window.
    """
    check_turns_fit(vlm)
    config: Any = vlm.config.get_text_config()  # type: ignore[operator, union-attr]
    tokens, window = turns.shape[1], getattr(config, "sliding_window", None)
    if window and tokens > window:
        raise ValueError(
            f"rows of {tokens} tokens are longer than the attention window of {window} of {type(vlm).__name__}: leave "
            "turns in rows of their own (pack_queries=False)."
        )
    places = torch.arange(tokens, device=turns.device)
    begins = torch.ones_like(turns, dtype=torch.bool)
    begins[:, 1:] = turns[:, 1:] != turns[:, :-1]
    position_ids = places - torch.where(begins, places, 0).cummax(1).values
    # padding sees padding: a row of a softmax with nothing in it would be NaN
    mask = (turns[:, :, None] == turns[:, None]) & (places[:, None] >= places)
    mask = mask[:, None]
    if config._attn_implementation == "eager":
        dtype: torch.dtype = vlm.dtype  # type: ignore[assignment]
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return {"attention_mask": mask, "position_ids": position_ids}


def rows_per_video(turns_in_rows: Sequence[int], queries: Sequence[int]) -> list[int]:
    """How many consecutive rows the turns of each video take.

    Args:
        turns_in_rows: number of turns in each row.
        queries: number of turns of each video.

    Raises:
        ValueError: a row holds none, or turns of two videos.
    """
    rows, left = [], list(turns_in_rows)[::-1]
    for count in queries:
        taken = found = 0
        while found < count and left and left[-1] > 0:
            found, taken = found + left.pop(), taken + 1
        if found != count or not taken:
            break
        rows.append(taken)
    if left or len(rows) != len(queries):
        raise ValueError(
            f"rows with {list(turns_in_rows)} turns do not fit videos with {list(queries)} queries: every row must "
            "hold turns, all of one video."
        )
    return rows
