"""The samples of a part of a cache."""

import numpy as np

from kdcache.errors import StoreError
from kdcache.store.reader import Cache

SAMPLE_RECORDS = 16
"""The number of evenly spread records on which a build or a copy measures the loss of storing."""


def evenly_spread(total: int, most: int) -> list[int]:
    """Return up to `most` different integers from 0 to `total` - 1, evenly spread and ascending.

    If `most` is at least 2, they include 0 and `total` - 1.
    """
    return sorted({int(number) for number in np.linspace(0, total - 1, min(most, total)).round()})


def spread_samples(source: Cache, count: int) -> list[int]:
    """Return the indices of `count` samples, evenly spread over the cache `source`.

    Raises: StoreError if `count` is below 1 or above the number of samples.
    """
    samples = source.manifest.dataset.samples
    if not 1 <= count <= samples:
        raise StoreError(
            f"Cannot copy {count} of {samples} samples of {source.place}", fix=f"Give a number from 1 to {samples}."
        )
    return evenly_spread(samples, count)
