"""Batches drawn by threads ahead of the trainer, into buffers that are used again and again.

Reading, decoding and rendering release the GIL for nearly all of their time. So threads draw as fast as processes, and
no batch has to cross between processes, which is the bottleneck of `DataLoader`. A ring has `depth` buffers, pinned if
a GPU copies from them. The trainer holds one, and the others are filled for later steps. Without threads the caller
draws each batch when it takes it.

The content of a batch depends only on its step, not on the thread or the time.

Legend: B samples of a batch.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import Any, Protocol

import torch

from kdcache.distill import Batch
from kdcache.errors import KDCacheError
from kdcache.training.input.batch import Row, row_of
from kdcache.training.input.sampler import Steps

DEPTH = 4
"""Buffers: three batches ahead of the one in use."""

Drawn = Future[KDCacheError | None]


class Items(Protocol):
    """The interface of a source of augmented samples, numbered from 0. Several threads may use it at once."""

    def empty(self, *leading: int, pin_memory: bool) -> Batch:
        """Allocate memory for samples. `empty()` is for one sample, `empty(B)` for a batch of B samples.

        `pin_memory` is True for page-locked memory, from which copies to a GPU are fast.
        """

    def draw_into(self, draw: int, out: Row) -> KDCacheError | None:
        """Write the augmented sample of a draw into the arrays of `out`.

        Return the error of a sample that cannot be read, or None. It is not raised.
        """


class Ring:
    """An iterable over the batches of some steps, drawn ahead by threads into buffers that are used again.

    A batch is valid until the caller takes the next one. Then new samples are drawn into its memory. With pinned
    memory, drawing first waits for the GPU work that was queued until then. If a sample cannot be read, the iterator
    yields its KDCacheError instead of the batch.

    Args:
        draws: the numbered draws.
        steps: the draw numbers of each step.
        threads: number of threads. 0 draws in the caller's thread.
        pin_memory: True uses pinned memory, for copies to a GPU.
        depth: number of buffers.
    Memory: `depth` batches. Without threads one batch, or two that are pinned.
    """

    def __init__(
        self, draws: Items, steps: Steps, *, threads: int = 1, pin_memory: bool = False, depth: int = DEPTH
    ) -> None:
        self._draws = draws
        self._steps = steps
        self._threads = threads
        self._pin_memory = pin_memory
        self._depth = depth if threads else 1 + pin_memory

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch | KDCacheError]:
        count = min(self._depth, len(self._steps))
        buffers = [_Buffer(self._draws, self._steps.rows, self._pin_memory) for _ in range(count)]
        if not self._threads:
            yield from self._on_demand(buffers)
            return
        with ThreadPoolExecutor(self._threads, thread_name_prefix="kdcache-loader") as pool:
            try:
                yield from self._ahead(pool, buffers)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _on_demand(self, buffers: "list[_Buffer]") -> Iterator[Batch | KDCacheError]:
        for draws, buffer in zip(self._steps, cycle(buffers), strict=False):
            yield buffer.draw(draws) or buffer.batch
            buffer.release()

    def _ahead(self, pool: ThreadPoolExecutor, buffers: "list[_Buffer]") -> Iterator[Batch | KDCacheError]:
        todo = iter(self._steps)
        under_way = deque((buffer, self._start(pool, buffer, next(todo))) for buffer in buffers)
        while under_way:
            buffer, drawn = under_way.popleft()
            errors = [part.result() for part in drawn]
            yield next((error for error in errors if error is not None), buffer.batch)
            buffer.release()
            draws = next(todo, None)
            if draws is not None:
                under_way.append((buffer, self._start(pool, buffer, draws)))

    def _start(self, pool: ThreadPoolExecutor, buffer: "_Buffer", draws: range) -> list[Drawn]:
        """Submit one task per thread, not per sample, because handing over takes the trainer's own time."""
        parts = min(self._threads, len(draws))
        return [pool.submit(buffer.draw, draws, part, parts) for part in range(parts)]


class _Buffer:
    """Memory for a batch, and the event after which a GPU has read its last content."""

    def __init__(self, draws: Items, rows: int, pin_memory: bool) -> None:
        self._draws = draws
        self._pinned = pin_memory
        self._copied: Any = None
        self.batch = draws.empty(rows, pin_memory=pin_memory)
        # numpy's rows: torch's copies would bring threads of their own, which take the cores from the step's.
        self._rows = [row_of(self.batch, row) for row in range(rows)]

    def draw(self, draws: range, part: int = 0, parts: int = 1) -> KDCacheError | None:
        """Draw every `parts`-th row, from `part` on. Stop at the first error and return it."""
        if self._copied is not None:
            self._copied.synchronize()
        for draw, row in zip(draws[part::parts], self._rows[part::parts], strict=True):
            error = self._draws.draw_into(draw, row)
            if error is not None:
                return error
        return None

    def release(self) -> None:
        """Allow the buffer to be used again, once the work that is queued on the current CUDA stream is done."""
        if self._pinned:
            self._copied = torch.cuda.current_stream().record_event()
