"""Whole images of a cache: the teacher's prediction at view size, with pixels and label.

In a cache with only crops, the first crop of each image represents it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kdcache.data import inside_rectangle
from kdcache.errors import CorruptError
from kdcache.store import Cache, Records
from kdcache.tasks import SEGMENTATION
from kdcache.teacher.audit.verify import packed_target
from kdcache.teacher.build.render import Array
from kdcache_kernels import PackedTarget, target_argmax_confidence

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class Whole:
    """The teacher's prediction for one whole image at view size.

    If a cache has only crops, the prediction is for the image's first crop.

    Attributes:
        record: number of the record.
        sample: the sample's id.
        target: the stored target.
        argmax: (H, W), the most likely class of every pixel.
        confidence: float16 (H, W), the probability of the class in `argmax` at temperature 1.
        inside: bool (H, W), False where the view shows grey outside its image. None if there is no such grey.
        label: uint8 (H, W) with 255 for void, or None if it is missing or was not read.
    """

    record: int
    sample: str
    target: PackedTarget
    argmax: Tensor
    confidence: Tensor
    inside: Array | None
    label: Array | None

    def of_image(self, array_HW: Array) -> Array:
        """Return the part of an array (H, W) or (H, W, 3) that shows the image, without the view's grey around it."""
        if self.inside is None or not self.inside.any():
            return array_HW
        rows, columns = np.flatnonzero(self.inside.any(1)), np.flatnonzero(self.inside.any(0))
        return np.ascontiguousarray(array_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def whole_records(cache: Cache) -> list[int]:
    """Return the record number of each sample's first view.

    The first view shows the whole image, unless the cache has only crops.
    """
    return [cache.manifest.record(sample) for sample in range(cache.manifest.dataset.samples)]


def read_whole(records: Records, record: int, *, labelled: bool) -> Whole:
    """Read the teacher's prediction for one record, and its label if there is one.

    Args:
        records: the cache, with its data set if it stores no labels.
        record: number of the record.
        labelled: whether the sample has a label. It is read if pixels and labels are available.
    Raises: MismatchError for an image that no longer renders to the pixels that the teacher saw; CorruptError for a
        damaged cache.
    """
    cache = records.cache
    target = packed_target(records, [record])
    argmax_1HW, confidence_1HW = target_argmax_confidence(target, cache.view_size)
    if not bool((confidence_1HW <= 1).all()):
        raise CorruptError(
            f"NaN or infinity in the target of record {record} of {cache.place}", fix="Build the cache again."
        )
    label = records.label(record) if labelled and records.complete else None
    sample, inside = records.sample(record), inside_view(cache, record)
    return Whole(record, sample, target, argmax_1HW[0], confidence_1HW[0], inside, label)


def read_wholes(records: Records, *, labels: bool = True) -> Iterator[Whole]:
    """Yield the stored prediction of the teacher for each whole image of a cache, in the order of the samples.

    `records` is the cache, with its data set if it stores no labels. `labels` says whether labels are also read.

    Raises: MismatchError for a changed data set; CorruptError for a damaged cache.
    """
    labelled, views = records.cache.labelled[SEGMENTATION], records.cache.manifest.view.views_per_sample
    for record in whole_records(records.cache):
        yield read_whole(records, record, labelled=labels and bool(labelled[record // views]))


def inside_view(cache: Cache, record: int) -> Array | None:
    """Return which pixels of record number `record` show its image, bool (H, W). The others are grey.

    Returns None if all pixels show the image.
    """
    if not cache.manifest.view.reaches_beyond:
        return None
    paths = ["records/window", "records/flip", "records/source_size"]
    window, flip, source_size = cache.read(record, paths).values()
    height, width = cache.view_size
    y0, x0, y1, x1 = inside_rectangle(window, flip, source_size, cache.view_size)
    y_H, x_W = np.arange(height) + 0.5, np.arange(width) + 0.5
    inside: Array = ((y0 <= y_H) & (y_H < y1))[:, None] & ((x0 <= x_W) & (x_W < x1))
    return inside
