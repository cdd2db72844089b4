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
    """Yield `function(item)` for each item, in order, computed up to `ahead` items in advance.

    `items` is consumed in the calling thread, lazily. An exception of `function` (or of `items`) is raised at its place
    in the order, and no further item is started then. However the iteration ends (exhaustion, an exception, `close()`,
    a `break` that drops the iterator, Ctrl-C), waiting items are cancelled and the threads have ended when control
    returns. 0 `threads` compute in the calling thread, on demand. `ahead`, at least 1, bounds items in flight or not
    yet taken.

    Raises: ValueError for a negative `threads` or an `ahead` below 1.
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
