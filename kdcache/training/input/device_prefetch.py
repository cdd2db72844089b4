"""Copy a loader's batches to the device while the step before still computes.

On a GPU a batch crosses the bus on a side stream, into one of two slots:

    loader's buffer --side stream--> slot --compute stream--> step

- The compute stream waits for the copy before the step that is queued next.
- A slot is copied into again when the compute stream has finished the step that read it, two batches ago.
- The loader's batches are taken while the side stream is current. A ring then waits for the copy out of a pinned
  buffer, not for the step, before it draws into that buffer again.

The host queues the copy of batch n+1 right after the launches of step n, so copy and step overlap without reading
ahead of the trainer. The host waits only for the loader.

Targets that stay on the device (`--resident gpu`) are gathered there by the record numbers that the batch brings.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle

import torch

from kdcache.distill import Batch
from kdcache.errors import KDCacheError
from kdcache.training.input.resident_records import DeviceTargets

SLOTS = 2
Drawn = Batch | KDCacheError


def feed(
    loader: Iterable[Drawn], device: torch.device, targets: DeviceTargets | None = None
) -> Generator[Drawn, None, None]:
    """Yield the batches of a loader on `device`. Each is valid until the next one is taken.

    On a GPU, a batch is copied while the step before it computes. A CPU's batches are yielded without a copy.

    Args:
        loader: gives the batches. If it gives a KDCacheError in place of a batch, the error is yielded unchanged.
        device: where the batches go.
        targets: the targets of all records, if the device keeps them, or None. The loader's batches then have record
            numbers, which are replaced by targets.
    """
    batches = iter(loader)  # here, not at the first batch: a DataLoader takes a number from torch's generator
    if device.type == "cuda":
        return feed_over_side_stream(batches, device, targets)
    return _as_they_come(batches, device, targets)


def _as_they_come(
    batches: Iterator[Drawn], device: torch.device, targets: DeviceTargets | None
) -> Generator[Drawn, None, None]:
    slot: _Slot | None = None
    with _closing(batches):
        for batch in batches:
            if targets is None or isinstance(batch, KDCacheError):
                yield batch
            else:
                slot = slot or _Slot(batch, device, targets)
                slot.fill(batch)
                yield slot.batch


def feed_over_side_stream(
    batches: Iterator[Drawn], device: torch.device, targets: DeviceTargets | None
) -> Generator[Drawn, None, None]:
    """Yield batches on a CUDA device. Each is copied on a side stream while the step before it computes.

    Args:
        batches: the batches of a loader. A KDCacheError in place of a batch is yielded unchanged.
        device: the CUDA device.
        targets: the targets of all records, if the device keeps them, or None. The batches then have record numbers,
            which are replaced by targets.
    """
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    slots: Iterator[_Slot] | None = None
    with _closing(batches):
        while True:
            with torch.cuda.stream(side):
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, KDCacheError):
                yield batch
                continue
            compute = torch.cuda.current_stream(device)
            if slots is None:
                slots = cycle([_Slot(batch, device, targets) for _ in range(SLOTS)])
                side.wait_stream(compute)  # which may still use the memory that the slots got, and fills the targets
            slot = next(slots)
            with torch.cuda.stream(side):
                if slot.free is not None:
                    side.wait_event(slot.free)
                slot.fill(batch)
            compute.wait_stream(side)
            yield slot.batch
            slot.free = compute.record_event()


class _Slot:
    """Memory for one batch on the device.

    Attributes:
        batch: the batch that the step gets.
        free: an event that comes after the step has read the batch. None before the first step.
    """

    def __init__(self, like: Batch, device: torch.device, targets: DeviceTargets | None) -> None:
        self._targets = targets
        self._arrived = like.empty_like(device)
        gathered = self._arrived.targets if targets is None else targets.empty(len(like))
        self.batch = replace(self._arrived, targets=gathered)
        self.free: torch.cuda.Event | None = None

    def fill(self, batch: Batch) -> None:
        """Queue the copies on the current stream, and gather the targets that the device keeps."""
        self._arrived.copy_from(batch)
        if self._targets is not None and self.batch.record is not None:
            self._targets.gather_into(self.batch.record, self.batch.targets or {})


@contextmanager
def _closing(batches: Iterator[Drawn]) -> Iterator[None]:
    """End the threads that draw ahead when the with block ends, also after an error."""
    try:
        yield
    finally:
        if isinstance(batches, Generator):
            batches.close()
