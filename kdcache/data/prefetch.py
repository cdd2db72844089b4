"""Compute results in order, a bounded number of items ahead, with threads.

Threads suffice: decoding and resizing (Pillow) release the GIL, and results need no copy between address spaces.
`ahead` bounds the memory: at most that many results wait at any time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(function: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int) -> Iterator[R]:
    """Yield `function(item)` for each item, in order. Threads compute up to `ahead` results in advance.

    If the call for an item raises an exception, the iterator raises it after the results of earlier items. It then
    starts no further calls. When the iteration ends for any reason, waiting calls are cancelled and all threads end.

    Args:
        function: called with each item.
        items: the items, which the calling thread consumes lazily.
        threads: the number of threads. 0 computes in the calling thread, on demand.
        ahead: the most results that are in progress or waiting, at least 1.

    Raises: ValueError for negative `threads`, or `ahead` below 1.
    """
    if threads < 0 or ahead < 1:
        raise ValueError(f"prefetch needs threads >= 0 and ahead >= 1, got threads={threads}, ahead={ahead}")
    if threads == 0:
        return map(function, items)
    return _prefetch(function, items, threads, ahead)


def _prefetch(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="kdcache-prefetch")
    try:
        source = iter(items)
        pending: Exception | None = None
        exhausted = False
        while True:
            while not exhausted and len(waiting) < ahead:
                try:
                    item = next(source)
                except StopIteration:
                    exhausted = True
                except Exception as error:  # the items before it come first
                    pending, exhausted = error, True
                else:
                    waiting.append(pool.submit(function, item))
            if not waiting:
                break
            yield waiting.popleft().result()
        if pending is not None:
            raise pending
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
