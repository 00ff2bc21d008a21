"""Modeling: videos of unequal length in one batch, in a few groups that are padded little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .hypernetwork import Padding

MOST_GROUPS = 4
MOST_PADDING = 0.25
TOKENS_WORTH_A_PASS = 4096
"""Tokens of padding that another pass through the base has to spare: it costs launches of its own."""


@dataclass(frozen=True)
class LengthGroup:
    """Prompts of a batch that are read together.

    Attributes:
        rows: their places in the batch.
        start, end: the columns in which any of them has a token.
        padding: which of those tokens count.
    """

    rows: Tensor
    start: int
    end: int
    padding: Padding | None

    def of(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """This group's part of inputs `[batch, tokens, ...]`."""
        return {
            name: value[:, self.start : self.end].index_select(0, self.rows.to(value.device))
            for name, value in inputs.items()
        }


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Places of the rows of each group: as few groups as keep padding below a quarter, four at most.

    Edges are in geometric progression from the shortest to the longest, so lengths that differ by factors are parted
    evenly, whatever there are few or many of.
    """
    least, most = max(1, min(lengths)), max(lengths)
    best, real = [list(range(len(lengths)))], sum(lengths)
    size = most * len(lengths)
    for count in range(2, MOST_GROUPS + 1):
        if size - real <= MOST_PADDING * size:
            break
        edges = [least * (most / least) ** (part / count) for part in range(1, count)]
        places = [sum(length > edge for edge in edges) for length in lengths]
        groups = [[row for row, place in enumerate(places) if place == part] for part in range(count)]
        groups = [group for group in groups if group]
        taken = sum(max(lengths[row] for row in group) * len(group) for group in groups)
        if taken < size and size - taken >= TOKENS_WORTH_A_PASS * (len(groups) - len(best)):
            best, size = groups, taken
    return best


def length_groups(attention_mask: Tensor) -> list[LengthGroup] | None:
    """The groups of a batch, found before there is work on the device; None if it is best read in one piece.

    Args:
        attention_mask: `[batch, tokens]`, padded on either side.
    """
    mask = attention_mask.bool().cpu()
    lengths = mask.sum(1).tolist()
    grouped = group_by_length(lengths)
    if len(grouped) == 1 or not all(lengths):  # a row without tokens has no columns of its own
        return None
    found = []
    for rows in grouped:
        columns = mask[rows].any(0).nonzero()
        start, end = int(columns[0]), int(columns[-1]) + 1
        index = mask.new_tensor(rows, dtype=columns.dtype)
        found.append(LengthGroup(index, start, end, Padding.of(mask[rows, start:end])))
    return found
