"""The rows of each stream in every batch, on the way to the device.

A stream has its own loader and order: draw n of stream i is a pure function of the seed, i and n, the same for any
number of processes. Step s takes draws s*R to (s+1)*R of a stream with R rows, so a resumed run needs no history, and a
stream's order does not depend on the others.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.distill import Batch, Streams
from kdcache.errors import KDCacheError
from kdcache.training.input.device_prefetch import feed
from kdcache.training.input.loader import Draws, make_loader

Drawn = Streams | KDCacheError


@dataclass(frozen=True)
class StreamDraws:
    """A stream: its draws, and its rows of every batch over all processes.

    Attributes:
        name: "" for the only one.
    """

    name: str
    draws: Draws
    rows: int

    def sample_ids(self, step: int) -> list[str]:
        """Return the ids of one step's samples, each after the stream's name, for messages."""
        ids = self.draws.sample_ids(step, self.rows)
        return [f"{self.name}:{sample}" for sample in ids] if self.name else ids


def stream_seed(seed: int, number: int) -> int:
    """Return the seed of a stream's order and augmentation. The first stream has the run's seed."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def feed_streams(
    streams: Sequence[StreamDraws],
    device: torch.device,
    *,
    first: int,
    last: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
) -> Generator[Drawn, None, None]:
    """Yield the batches of the steps [first, last) on `device`, each valid until the next is taken.

    `workers` is as in `make_loader`, for all streams together. If it is not 0, each stream has at least one. This
    process takes the `rank`-th of `world` equal parts of each stream's rows.
    """
    whole = sum(stream.rows for stream in streams)
    feeds = [
        feed(
            make_loader(
                stream.draws,
                first=first,
                last=last,
                batch_size=stream.rows,
                workers=max(1, workers * stream.rows // whole) if workers else 0,
                pin_memory=device.type == "cuda",
                rank=rank,
                world=world,
            ),
            device,
            stream.draws.dataset.on_device,
        )
        for stream in streams
    ]
    return _joined(feeds)


def _joined(feeds: Sequence[Generator[Batch | KDCacheError, None, None]]) -> Generator[Drawn, None, None]:
    """Yield the batches of all streams as one, or the first error among them."""
    try:
        for parts in zip(*feeds, strict=True):
            error = next((part for part in parts if isinstance(part, KDCacheError)), None)
            yield tuple(part for part in parts if isinstance(part, Batch)) if error is None else error
    finally:
        for of_stream in feeds:
            of_stream.close()
