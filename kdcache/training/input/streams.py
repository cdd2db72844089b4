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
    """The draws of a stream.

    Attributes:
        name: the stream's name, or "" in a training without streams.
        draws: its numbered draws.
        rows: the number of its samples in every batch, over all processes.
    """

    name: str
    draws: Draws
    rows: int

    def sample_ids(self, step: int) -> list[str]:
        """Return the ids of the samples of one step, for messages: `kitti:0001`, or `0001` without a stream's name."""
        ids = self.draws.sample_ids(step, self.rows)
        return [f"{self.name}:{sample}" for sample in ids] if self.name else ids


def stream_seed(seed: int, number: int) -> int:
    """Return the seed of a stream's order and augmentation. `seed` is the run's, and `number` is the stream's, from 0.

    Stream 0 has the run's seed.
    """
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
    """Yield the batches of each step, one for each stream, on `device`. They are valid until the next step's are taken.

    If a sample cannot be read, the error is yielded (not raised) in place of the step's batches, as a KDCacheError.

    Args:
        streams: the draws of each stream.
        device: where the batches go.
        first: the first step.
        last: the step after the last one.
        workers: number of threads or processes that draw ahead, for all streams together, but at least one for each. 0
            draws between steps.
        rank: which of the `world` equal parts of each batch this process takes.
        world: the number of processes.
    """
    total_rows = sum(stream.rows for stream in streams)
    feeds = [
        feed(
            make_loader(
                stream.draws,
                first=first,
                last=last,
                batch_size=stream.rows,
                workers=max(1, workers * stream.rows // total_rows) if workers else 0,
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
