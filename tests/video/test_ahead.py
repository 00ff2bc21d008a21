"""Work done ahead: in order, bounded, and over when its reader is."""

from __future__ import annotations

import threading

import pytest

from video2lora.video.ahead import one_ahead, prepare_ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order(threads):
    assert list(prepare_ahead(lambda n: n * n, range(20), threads)) == [n * n for n in range(20)]


@pytest.mark.parametrize(("threads", "ahead", "bound"), [(0, None, 1), (2, None, 3), (2, 5, 6)])
def test_items_are_taken_as_results_are(threads, ahead, bound):
    taken = []

    def items():
        for n in range(50):
            taken.append(n)
            yield n

    results = prepare_ahead(lambda n: n, items(), threads, ahead)
    for n in range(10):
        assert next(results) == n
        assert len(taken) <= n + bound
    results.close()
    assert len(taken) <= 9 + bound


def test_an_error_comes_where_its_item_is():
    results = prepare_ahead(lambda n: 1 // (n - 2), range(5), 2)
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_one_ahead_is_made_meanwhile():
    made = threading.Event()

    def items():
        yield 0
        made.set()
        yield 1
        raise OSError("the third")

    results = one_ahead(items())
    assert next(results) == 0
    assert made.wait(10)  # before it was asked for
    assert next(results) == 1
    with pytest.raises(OSError, match="the third"):
        next(results)
