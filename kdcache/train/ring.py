"""Batches ahead of the trainer, drawn by threads of this process into buffers that are used again and again.

Reading, decoding and rendering release the GIL for nearly all of their time, so threads draw as fast as processes, and
no batch has to cross from one process to another, which is what bounds `DataLoader`. A ring has `depth` buffers, pinned
when a GPU copies from them: one is the trainer's, the others are being filled for the steps to come.

What a batch holds follows from its step alone, whatever thread draws it and whenever.

Legend: B samples of a batch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kdcache.distill import Target
from kdcache.errors import KDCacheError
from kdcache.train.dataset import Sample

DEPTH = 4
"""Buffers: three batches ahead of the one in use."""


class Items(Protocol):
    """Draws by number, safe to call from several threads; an error of a sample is returned, not raised."""

    def __getitem__(self, draw: int) -> Sample | KDCacheError: ...


@dataclass
class _Buffer:
    """A batch, what is under way for it, and when a GPU has read what it held before."""

    batch: Sample
    drawn: list[Future[KDCacheError | None]] = field(default_factory=list)
    copied: Any = None


class Ring:
    """Iterates over the batches of the steps [first, last), in order.

    A batch is the caller's until it asks for the next one; then its memory is drawn into again, on a GPU after all that
    the current stream was given until then. The error of a sample comes in place of its batch.

    Args:
        threads: at least 1.
        pin_memory: for batches that a GPU copies.
    Memory: `depth` batches.
    """

    def __init__(
        self,
        draws: Items,
        *,
        first: int,
        last: int,
        batch_size: int,
        threads: int = 1,
        pin_memory: bool = False,
        depth: int = DEPTH,
    ) -> None:
        self._draws = draws
        self._steps = range(first, last)
        self._batch_size = batch_size
        self._threads = threads
        self._pin_memory = pin_memory
        self._depth = depth

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Sample | KDCacheError]:
        if not self._steps:
            return
        like = self._draws[self._steps[0] * self._batch_size]
        if isinstance(like, KDCacheError):
            yield like
            return
        with ThreadPoolExecutor(self._threads, thread_name_prefix="kdcache-loader") as pool:
            try:
                yield from self._batches(pool, like)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self, pool: ThreadPoolExecutor, like: Sample) -> Iterator[Sample | KDCacheError]:
        todo = iter(self._steps)
        count = min(self._depth, len(self._steps))
        ahead = deque(_Buffer(_empty_batch(like, self._batch_size, self._pin_memory)) for _ in range(count))
        for buffer in ahead:
            self._fill(pool, buffer, next(todo))
        while ahead:
            buffer = ahead.popleft()
            errors = [drawn.result() for drawn in buffer.drawn]
            yield next((error for error in errors if error is not None), buffer.batch)
            if self._pin_memory:
                buffer.copied = torch.cuda.current_stream().record_event()
            step = next(todo, None)
            if step is not None:
                self._fill(pool, buffer, step)
                ahead.append(buffer)

    def _fill(self, pool: ThreadPoolExecutor, buffer: _Buffer, step: int) -> None:
        first = step * self._batch_size
        buffer.drawn = [pool.submit(self._draw, buffer, first + row, row) for row in range(self._batch_size)]

    def _draw(self, buffer: _Buffer, draw: int, row: int) -> KDCacheError | None:
        item = self._draws[draw]
        if isinstance(item, KDCacheError):
            return item
        if buffer.copied is not None:
            buffer.copied.synchronize()
        for whole, part in zip(_tensors(buffer.batch), _tensors(item), strict=True):
            # numpy's copy: torch's would bring threads of its own, which take the cores from the step's.
            whole.numpy()[row] = part.numpy()
        return None


def _tensors(sample: Sample) -> Sequence[Tensor]:
    return (sample.pixels, sample.label, *sample.target)


def _empty_batch(like: Sample, batch_size: int, pin_memory: bool) -> Sample:
    parts = [torch.empty((batch_size, *part.shape), dtype=part.dtype, pin_memory=pin_memory) for part in _tensors(like)]
    return Sample(parts[0], parts[1], Target(*parts[2:]))
