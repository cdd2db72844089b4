"""Depth labels in a training: whether they fit the head's range, and metrics against them."""

import math
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch

from kdcache.data import Split
from kdcache.distill.terms.depth import MIN_DEPTH
from kdcache.errors import DataError
from kdcache.heads import RegressionHead
from kdcache.metrics.depth import DepthErrors, DepthRange
from kdcache.metrics.predictions import predictions
from kdcache.metrics.sliding import Framing
from kdcache.models import SegmentationModel
from kdcache.tasks import DEPTH
from kdcache.training.input.batch import Array
from kdcache.training.input.dataset import DrawnDataset


def check_depth_labels(dataset: DrawnDataset, head: RegressionHead) -> None:
    """Check that depth labels have pixels within a head's range, without which nothing would be learnt.

    Labels are read until one has such a pixel, which is normally the first.
    Raises: DataError, also for a label that cannot be read.
    """
    top, low, high, count = head.max_depth or math.inf, math.inf, -math.inf, 0
    for metres_HW in _depth_labels(dataset):
        known = metres_HW[np.isfinite(metres_HW)]
        if ((known >= MIN_DEPTH) & (known <= top)).any():
            return
        count += 1
        low, high = min([low, *known.tolist()]), max([high, *known.tolist()])
    seen = f"they are {low:g} to {high:g} m" if low <= high else "no pixel of them is known"
    raise DataError(
        f"No label of depth lies in the head's range, {MIN_DEPTH:g} to {top:g} m: none in {count} labels ({seen})",
        fix="See the range with kdcache data check, and correct the unit in depth.toml. Or give the head another "
        "maximum, for example kdcache:hydra,max=200",
    )


def _depth_labels(dataset: DrawnDataset) -> Iterator[Array]:
    """Yield the labels of depth of the samples, as their data set or the first view in their store has them."""
    split, cache = dataset.split, dataset.cache
    for number in dataset.indices:
        if split is not None and (label := split.label(number, DEPTH)) is not None:
            yield label
        elif split is None and cache is not None and cache.has_depth[number]:
            yield cache.read(cache.manifest.record(number), ["labels/depth"])["labels/depth"]


def check_first_depth(split: Split) -> None:
    """Read the first depth label, because a wrong unit is wrong in all of them. Raises: DataError."""
    first = next((index for index in range(len(split)) if split.has_label(index, DEPTH)), None)
    if first is not None:
        split.label(first, DEPTH)


def depth_errors(
    model: SegmentationModel,
    split: Split,
    size: tuple[int, int],
    *,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    framing: Framing | None = None,
) -> DepthErrors:
    """Return errors of a model's depth at the labels' size. Raw outputs are resized first, then converted to metres.

    The model sees images of `size` (H, W). `part` (i, n) takes every n-th labelled sample from the i-th on. `framing`
    sets how it sees an image (default: squashed to `size`).

    Raises: DataError for an image or label that cannot be read.
    """
    errors = DepthErrors(DepthRange.of(model.regressions[DEPTH]))
    labelled = [index for index in range(len(split)) if split.has_label(index, DEPTH)]
    batches = predictions(
        model,
        split,
        labelled[part[0] :: part[1]],
        size,
        tasks=(DEPTH,),
        device=device,
        batch_size=1,
        threads=0,
        framing=framing,
    )
    with closing(batches):
        for prediction in (one for batch in batches for one in batch):
            errors.update(prediction.answers[DEPTH], prediction.labels[DEPTH], split.ids[prediction.number])
    return errors
