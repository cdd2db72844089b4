"""Labels of numeric tasks, such as depth: whether they fit the range of a head."""

import math
from collections.abc import Iterator

import numpy as np

from kdcache.data import Split
from kdcache.distill.terms.depth import MIN_DEPTH
from kdcache.errors import DataError
from kdcache.heads import RegressionHead
from kdcache.training.input.batch import Array
from kdcache.training.input.dataset import DrawnDataset


def check_labels(dataset: DrawnDataset, task: str, head: RegressionHead) -> None:
    """Check that labels of a task have pixels within its head's range, without which nothing would be learnt.

    Labels are read until one has such a pixel, which is normally the first.
    Raises: DataError, also for a label that cannot be read.
    """
    top, low, high, count = head.max_depth or math.inf, math.inf, -math.inf, 0
    for metres_HW in _labels(dataset, task):
        known = metres_HW[np.isfinite(metres_HW)]
        if ((known >= MIN_DEPTH) & (known <= top)).any():
            return
        count += 1
        low, high = min([low, *known.tolist()]), max([high, *known.tolist()])
    seen = f"they are {low:g} to {high:g} m" if low <= high else "no pixel of them is known"
    raise DataError(
        f"No label of {task} lies in the head's range, {MIN_DEPTH:g} to {top:g} m: none in {count} labels ({seen})",
        fix="See the range with kdcache data check, and correct the unit in depth.toml. Or give the head another "
        "maximum, for example kdcache:hydra,max=200",
    )


def _labels(dataset: DrawnDataset, task: str) -> Iterator[Array]:
    """Yield the labels of a task of the samples, as their data set or the first view in their store has them."""
    split, cache, path = dataset.split, dataset.cache, f"labels/{task}"
    for number in dataset.indices:
        if split is not None and (label := split.label(number, task)) is not None:
            yield label
        elif split is None and cache is not None and cache.labelled[task][number]:
            yield cache.read(cache.manifest.record(number), [path])[path]


def check_first(split: Split, task: str) -> None:
    """Read the first label of a task, because a wrong unit is wrong in all of them. Raises: DataError."""
    first = next((index for index in range(len(split)) if split.has_label(index, task)), None)
    if first is not None:
        split.label(first, task)
