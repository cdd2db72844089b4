"""Order, exceptions, bounds and the end of `prefetch`."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from kdcache.data import prefetch


def working_threads() -> int:
    return sum(thread.name.startswith("kdcache-prefetch") for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert working_threads() == 0


def uneven(item: int) -> int:
    """Later items of a group finish first."""
    time.sleep(0.002 * (3 - item % 4))
    return item * item


@pytest.mark.parametrize(("threads", "ahead"), [(0, 1), (1, 1), (3, 1), (3, 8), (2, 100)])
def test_results_come_in_order(threads, ahead) -> None:
    assert list(prefetch(uneven, range(30), threads=threads, ahead=ahead)) == [i * i for i in range(30)]


@pytest.mark.parametrize("threads", [0, 2])
def test_no_items(threads) -> None:
    assert list(prefetch(uneven, [], threads=threads, ahead=4)) == []


@pytest.mark.parametrize("threads", [0, 3])
def test_an_exception_surfaces_at_its_item(threads) -> None:
    def fail_at_five(item: int) -> int:
        if item == 5:
            raise RuntimeError("five")
        return uneven(item)

    results = []
    with pytest.raises(RuntimeError, match="five"):
        results.extend(prefetch(fail_at_five, range(1000), threads=threads, ahead=10))
    assert results == [i * i for i in range(5)]
    assert working_threads() == 0


@pytest.mark.parametrize("threads", [0, 2])
def test_an_exception_of_the_items_comes_after_those_before_it(threads) -> None:
    def items():
        yield from range(3)
        raise RuntimeError("no more")

    results = prefetch(uneven, items(), threads=threads, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(RuntimeError, match="no more"):
        next(results)


def test_items_are_taken_no_further_ahead_than_asked() -> None:
    taken = 0

    def items():
        nonlocal taken
        for item in range(100):
            taken += 1
            yield item

    results = prefetch(uneven, items(), threads=2, ahead=5)
    assert taken == 0
    for got in range(1, 20):
        next(results)
        assert taken <= got - 1 + 5
    results.close()


def test_threads_are_as_many_as_asked() -> None:
    barrier = threading.Barrier(3, timeout=10)
    results = prefetch(lambda _: barrier.wait(), range(3), threads=3, ahead=3)
    next(results)
    assert working_threads() == 3
    assert len(list(results)) == 2


def test_closing_early_starts_nothing_more() -> None:
    started = []

    def note(item: int) -> int:
        started.append(item)
        time.sleep(0.005)
        return item

    results = prefetch(note, range(1000), threads=2, ahead=50)
    assert next(results) == 0
    results.close()
    count = len(started)
    assert working_threads() == 0
    assert count < 20
    time.sleep(0.02)
    assert len(started) == count


def test_a_break_ends_the_threads() -> None:
    for result in prefetch(uneven, range(1000), threads=2, ahead=50):
        if result == 9:
            break
    assert working_threads() == 0


def test_an_interrupt_in_the_loop_ends_the_threads() -> None:
    def run() -> None:
        for _ in prefetch(uneven, range(1000), threads=2, ahead=50):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    del caught  # its traceback holds the frame of the loop, and with it the iterator
    gc.collect()
    assert working_threads() == 0


@pytest.mark.parametrize(("threads", "ahead"), [(-1, 1), (1, 0)])
def test_wrong_bounds_are_refused_at_the_call(threads, ahead) -> None:
    with pytest.raises(ValueError, match="prefetch needs"):
        prefetch(uneven, [], threads=threads, ahead=ahead)
