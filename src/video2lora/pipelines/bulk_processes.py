"""Pipelines: the processes of a bulk run: who takes which part of the work, and what all have to know."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

_calls = itertools.count()


def distributed_state(cpu: bool) -> PartialState:
    """This process's place among those of the launch; one may wait long for another at the end of the work."""
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


class Turns:
    """Numbers of units, each given to one process of the launch, the one that asks first.

    One process counts by itself; several count in the key-value store that they found each other by.
    """

    def __init__(self, num_units: int, state: PartialState) -> None:
        self._num_units, self._counts = num_units, Counter[str]()
        self._store: Any = None
        prefix = f"video2lora-bulk-{next(_calls)}"  # every process calls as often
        if state.num_processes > 1:
            from torch.distributed import PrefixStore
            from torch.distributed.distributed_c10d import _get_default_store

            self._store = PrefixStore(prefix, _get_default_store())

    def __iter__(self) -> Iterator[int]:
        while (number := self.add("taken", 1) - 1) < self._num_units:
            yield number

    def add(self, name: str, more: int) -> int:
        """Count, in all processes together; return the sum."""
        if self._store is not None:
            return self._store.add(name, more)
        self._counts[name] += more
        return self._counts[name]


def share(state: PartialState, make: Any) -> Any:
    """What the main process makes, in every process; its error, too, so that none waits for ever."""
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [make()]
        except Exception as error:
            if state.num_processes == 1:
                raise
            outcome = [error]
    (outcome,) = broadcast_object_list(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
