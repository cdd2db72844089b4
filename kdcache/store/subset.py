"""The samples of a part of a store, and the digest of their ids."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from kdcache.errors import StoreError
from kdcache.store.reader import Cache

SAMPLE_RECORDS = 16
"""Records, evenly spread, on which a build or a copy measures what storing loses."""


def evenly_spread(total: int, most: int) -> list[int]:
    """Return at most `most` different numbers below `total`, ascending, including the first and the last."""
    return sorted({int(number) for number in np.linspace(0, total - 1, min(most, total)).round()})


def spread_samples(source: Cache, count: int) -> list[int]:
    """Return `count` sample numbers, evenly spread over a store. Raises StoreError if it has fewer."""
    samples = source.manifest.dataset.samples
    if not 1 <= count <= samples:
        raise StoreError(
            f"Cannot copy {count} of {samples} samples of {source.place}", fix=f"Give a number from 1 to {samples}."
        )
    return evenly_spread(samples, count)


def ids_digest(class_names: Sequence[str], ids: Sequence[str]) -> str:
    """Return the SHA-256 of class names and ids, which is the manifest's digest and `Split.digest`."""
    text = json.dumps([list(class_names), list(ids)], ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
