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
    """Check that at least one pixel of the labels lies in the range of the student's head.

    Labels are read until one has such a pixel. That is normally the first.

    Args:
        dataset: the training's samples.
        task: a task with numbers, such as `depth`.
        head: the student's head of the task.
    Raises: DataError if no pixel lies in the range, or a label cannot be read.
    """
    top, low, high, count = head.max_depth or math.inf, math.inf, -math.inf, 0
    for metres_HW in _labels(dataset, task):
        known = metres_HW[np.isfinite(metres_HW)]
        if ((known >= MIN_DEPTH) & (known <= top)).any():
            return
        count += 1
        low, high = min([low, *known.tolist()]), max([high, *known.tolist()])
    found = f"they are {low:g} to {high:g} m" if low <= high else "no pixel of them is known"
    raise DataError(
        f"No label of {task} lies in the head's range, {MIN_DEPTH:g} to {top:g} m: none in {count} labels ({found})",
        fix="See the range with kdcache data check, and correct the unit in depth.toml. Or give the head another "
        "maximum, for example kdcache:hydra,max=200",
    )


def _labels(dataset: DrawnDataset, task: str) -> Iterator[Array]:
    """Yield the labels of a task, from the data set, or from the first view of each sample in the cache."""
    split, cache, path = dataset.split, dataset.cache, f"labels/{task}"
    for number in dataset.indices:
        if split is not None and (label := split.label(number, task)) is not None:
            yield label
        elif split is None and cache is not None and cache.labelled[task][number]:
            yield cache.read(cache.manifest.record(number), [path])[path]


def check_first(split: Split, task: str) -> None:
    """Read the first label of a task, to find a wrong unit early. Raises: DataError for a wrong label."""
    if labelled := split.labelled(task):
        split.label(labelled[0], task)
