"""Statistics of the numbers in a store: of its heads of a regression, and of its labels of depth."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kdcache.store.reader import Cache
from kdcache.store.subset import evenly_spread

RECORDS = 16
"""Records that are read at most, evenly spread: a remote store is not fetched for them."""
BINS = 8


@dataclass(frozen=True)
class ValueStatistics:
    """The finite values of an array in some records.

    Attributes:
        path: the array. unit: of its values.
        records: those that were read; of labels, those that have one.
        valid: share of the cells whose value is finite (of depth also above 0), 0..1.
        least, most, mean, median: of valid cells; None where no cell is.
        edges, histogram: ends of BINS bins of equal width, one more than bins, and the valid cells in each.
    """

    path: str
    unit: str
    records: int
    valid: float
    least: float | None
    most: float | None
    mean: float | None
    median: float | None
    edges: tuple[float, ...]
    histogram: tuple[int, ...]

    @classmethod
    def of(cls, path: str, unit: str, rows: Sequence[np.ndarray[Any, Any]], *, positive: bool) -> "ValueStatistics":
        """Statistics of rows of any one shape and type.

        Args:
            positive: whether only values above 0 are valid, as depth is.
        """
        values = np.concatenate([np.asarray(row, np.float64).reshape(-1) for row in rows]) if rows else np.empty(0)
        valid = values[np.isfinite(values) & ((values > 0) | (not positive))]
        if not valid.size:
            return cls(path, unit, len(rows), 0.0, None, None, None, None, (), ())
        counts, edges = np.histogram(valid, BINS)
        numbers = (valid.min(), valid.max(), math.fsum(valid) / valid.size, np.median(valid))
        least, most, mean, median = map(float, numbers)
        share = valid.size / values.size
        return cls(
            path, unit, len(rows), share, least, most, mean, median, tuple(edges.tolist()), tuple(counts.tolist())
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def value_statistics(cache: Cache) -> tuple[ValueStatistics, ...]:
    """Statistics of every regression and of stored labels of depth, over at most RECORDS records of each.

    Raises: CorruptError as `Cache.read`.
    """
    every = evenly_spread(len(cache), RECORDS)
    arrays = [
        (f"targets/{name}/values", head.unit, every, head.parameterisation != "identity")
        for name, head in cache.manifest.regressions.items()
    ]
    if "labels/depth" in cache.specs:
        views = cache.manifest.view.views_per_sample
        labelled = np.flatnonzero(np.repeat(cache.has_depth, views))
        records = labelled[evenly_spread(len(labelled), RECORDS)].tolist()
        arrays.append(("labels/depth", "m", records, True))
    return tuple(
        ValueStatistics.of(path, unit, [cache.read(record, [path])[path] for record in records], positive=positive)
        for path, unit, records, positive in arrays
    )
