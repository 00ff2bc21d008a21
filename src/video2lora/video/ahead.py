"""Video in: work done ahead in threads, in order and with bounded memory.

Threads, since decoding lets go of Python's lock, and what is decoded need not be sent between processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def prepare_ahead(
    prepare: Callable[[Any], Any], items: Iterable[Any], threads: int, ahead: int | None = None
) -> Generator[Any, None, None]:
    """`map(prepare, items)`, in order, with some of it done before it is asked for.

    Args:
        prepare: called in any of the threads.
        items: taken one by one, as the results are.
        threads: how many work; 0 for none, and then nothing is done ahead.
        ahead: results that may wait; as many as there are threads by default.
    """
    if threads < 1:
        yield from map(prepare, items)
        return
    pool, waiting = ThreadPoolExecutor(threads), deque[Any]()
    try:
        for item in items:
            waiting.append(pool.submit(prepare, item))
            if len(waiting) > (threads if ahead is None else ahead):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def one_ahead(items: Iterator[Any]) -> Generator[Any, None, None]:
    """The same items, the next one being made in a thread while one is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, items, end)
            yield item
