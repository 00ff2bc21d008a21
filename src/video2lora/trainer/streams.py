"""Trainer: evaluation on streams, whose length nobody knows, by several processes: every row once, and none waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset

Row = Mapping[str, Any]


class EvenStream(IterableDataset):
    """The rows of a stream, and then as many `None` as make a multiple of `multiple`.

    accelerate deals a stream out in batches for all processes; it would fill up the last one with rows that were there
    already, or deal out shards of unequal length, so that one process waits for another for ever. Every process reads
    all rows, and decodes its own.
    """

    def __init__(self, rows: Iterable[Row], multiple: int) -> None:
        self.rows, self.multiple = rows, multiple

    def __iter__(self) -> Iterator[Row | None]:
        count = 0
        for row in self.rows:
            count += 1
            yield row
        for _ in range(-count % self.multiple):
            yield None


class SkipFillers:
    """Collates rows of an `EvenStream`: `None` takes a place in the batch (`num_videos`) but brings no query.

    Args:
        collator: a [`Video2LoraCollator`].
    """

    def __init__(self, collator: Callable[[Sequence[Row]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Row | None]) -> dict[str, Any]:
        return self.collator([row for row in rows if row is not None]) | {"num_videos": len(rows)}
