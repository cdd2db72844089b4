"""Audit a cache's numeric heads: depth against its labels, on whole images at view size.

A stored map is resized to the view as in the training terms: its values become the raw output that they came from,
which is resized and becomes values again (`kdcache.heads`). Metres are judged by KITTI's convention
(`kdcache.metrics.depth`), up to the head's range. A map in another unit is only known up to a scale, and is not
compared with labels. Memory: counts of fixed size, and one image.
"""

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.data.checks.depth_report import EDGES
from kdcache.heads import raw_of, values_of
from kdcache.metrics.confusion import without_nan
from kdcache.metrics.depth import MAX_DEPTH, DepthErrors, DepthMetrics, DepthRange
from kdcache.store import Records
from kdcache.store.format.manifest_models import Regression
from kdcache.tasks import DEPTH, TASKS
from kdcache.teacher.audit.first_views import Progress, inside_view, whole_records
from kdcache.teacher.build.render import Array

JOINT_BINS = 64
"""Bins of equal width, from 0 to the end of the range, of the counts of predictions by labels."""
_LEAST = 1e-3


@dataclass(frozen=True)
class RangeError:
    """The errors of the teacher's depth on pixels in one range of labelled depths. This is a result, not an exception.

    Attributes:
        low: smallest labelled depth of the range in metres.
        high: largest labelled depth of the range in metres, infinite for the last range.
        pixels: number of pixels whose label is in the range.
        rmse: root mean squared error in metres.
        abs_rel: mean of |error| / true depth.
    """

    low: float
    high: float
    pixels: int
    rmse: float
    abs_rel: float


@dataclass(frozen=True)
class DepthScored:
    """The teacher's depth error on one image.

    Attributes:
        record: number of the record.
        sample: the sample's id.
        rmse: root mean squared error in metres.
    """

    record: int
    sample: str
    rmse: float


@dataclass(frozen=True, eq=False)
class RegressionAudit:
    """The quality of a numeric head, such as depth, measured from the cache.

    Errors are measured if there are depth labels and the head is in metres.

    Attributes:
        name: name of the head.
        unit: the values' unit, `m` for metres.
        images: number of images.
        labelled: number of images with a depth label.
        high: end of the last bin. Bins have equal widths from 0. Larger values count in the last bin.
        predicted: int64 (JOINT_BINS,), number of pixels in each bin of the teacher's value.
        labels: int64 (JOINT_BINS,), number of pixels in each bin of the label.
        joint: int64 (JOINT_BINS, JOINT_BINS), number of pixels by bin of the label (rows) and of the teacher's value.
        depth_range: the range of labelled depths that count, or None if errors cannot be measured.
        metrics: the errors over all images, or None if they cannot be measured.
        ranges: the errors by distance. Empty if they cannot be measured.
        worst: the images with the largest rmse, the largest first. Empty if errors cannot be measured.
    """

    name: str
    unit: str
    images: int
    labelled: int
    high: float
    predicted: Array
    labels: Array
    joint: Array
    depth_range: DepthRange | None
    metrics: DepthMetrics | None
    ranges: tuple[RangeError, ...]
    worst: tuple[DepthScored, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the audit as JSON values, with null for NaN."""
        return without_nan(
            {
                "unit": self.unit,
                "images": self.images,
                "labelled": self.labelled,
                "range": None if self.depth_range is None else str(self.depth_range),
                "teacher": None if self.metrics is None else self.metrics.to_json(),
                "by_distance": [vars(part) for part in self.ranges],
                "bins_end": self.high,
                "pixels_by_prediction": self.predicted.tolist(),
                "pixels_by_label": self.labels.tolist(),
                "worst": [vars(scored) for scored in self.worst],
            }
        )


def audit_regression(
    records: Records, name: str, *, worst: int = 10, progress: Progress | None = None
) -> RegressionAudit:
    """Compare the stored outputs of the numeric head `name` with labels, on whole images at view size.

    If there is no label in the head's unit, only the stored values are counted.

    Args:
        records: the cache with its pixels and labels.
        name: name of the head, such as `depth`.
        worst: number of images with the largest error to list.
        progress: called with (images done, total images).
    Raises: MismatchError for a missing or changed data set; CorruptError for a damaged cache.
    """
    records.check_complete()
    cache = records.cache
    head, numbers = cache.manifest.regressions[name], whole_records(cache)
    compared = name in TASKS and TASKS[name].unit == head.unit
    counts = _Counts(_bins_end(records, head, name, numbers))
    errors = (
        DepthErrors(DepthRange(max_depth=counts.high if head.range is None else head.range[1])) if compared else None
    )
    heap: list[tuple[float, int, DepthScored]] = []  # a heap whose smallest is the best of the worst
    labelled = 0
    for done, number in enumerate(numbers, 1):
        values = map_at_view(records, number, name).numpy()
        inside = inside_view(cache, number)
        counts.predicted += counts.of(values if inside is None else values[inside])
        if errors is not None and (label := depth_label(records, number)) is not None:
            labelled += 1
            label = np.where(np.isfinite(values), label, np.nan)
            counts.compare(values, label, errors.range)
            if (rmse := _rmse(errors.range, values, label)) is not None:
                errors.update(torch.from_numpy(values), torch.from_numpy(label), sample := records.sample(number))
                heapq.heappush(heap, (rmse, -number, DepthScored(number, sample, rmse)))
                if len(heap) > worst:
                    heapq.heappop(heap)
        if progress is not None:
            progress(done, len(numbers))
    judged = errors is not None and labelled > 0
    return RegressionAudit(
        name=name,
        unit=head.unit,
        images=len(numbers),
        labelled=labelled,
        high=counts.high,
        predicted=counts.predicted,
        labels=counts.labels,
        joint=counts.joint,
        depth_range=errors.range if errors is not None and judged else None,
        metrics=errors.metrics() if errors is not None and judged else None,
        ranges=counts.ranges() if judged else (),
        worst=tuple(scored for *_, scored in sorted(heap, reverse=True)),
    )


def map_at_view(records: Records, record: int, name: str) -> Tensor:
    """Return the first channel of the numeric head `name` for record number `record`, resized to the view.

    Returns: float32 (H, W) in the head's unit.
    """
    head = records.cache.manifest.regressions[name]
    values_chw = torch.from_numpy(records.target(record, name)["values"]).float()
    if head.parameterisation != "identity":
        values_chw = values_chw.clamp(min=_LEAST)
    raw_chw = raw_of(values_chw[:1], head.parameterisation)
    raw_HW = F.interpolate(raw_chw[None], records.cache.view_size, mode="bilinear", align_corners=head.align_corners)[
        0, 0
    ]
    return values_of(raw_HW, head.parameterisation, None if head.range is None else head.range[1])


def depth_label(records: Records, record: int) -> Array | None:
    """Return the depth label of record number `record`, or None if its sample does not have one.

    Returns: float32 (H, W) in metres, with NaN for unknown depth.
    """
    labelled = records.cache.labelled[DEPTH][record // records.cache.manifest.view.views_per_sample]
    return records.label(record, DEPTH) if labelled else None


class _Counts:
    """Counts of pixels by bin of their value, clipped to the range from 0 to `high`."""

    def __init__(self, high: float) -> None:
        self.high = high
        self.predicted, self.labels = np.zeros(JOINT_BINS, np.int64), np.zeros(JOINT_BINS, np.int64)
        self.joint = np.zeros((JOINT_BINS, JOINT_BINS), np.int64)
        self._sums = np.zeros((3, len(EDGES)))  # pixels, squares, relative errors by the label's distance

    def bins(self, values: Array) -> Array:
        """Return the bin of every value."""
        bins: Array = np.clip(values * (JOINT_BINS / self.high), 0, JOINT_BINS - 1).astype(np.int64)
        return bins

    def of(self, values: Array) -> Array:
        return np.bincount(self.bins(values[np.isfinite(values)]), minlength=JOINT_BINS)

    def compare(self, values: Array, label: Array, depth_range: DepthRange) -> None:
        valid = depth_range.valid(label)
        d, p = label[valid].astype(np.float64), values[valid].astype(np.float64)
        p = np.clip(p, depth_range.min_depth, depth_range.max_depth)
        self.labels += self.of(d)
        pairs = np.bincount(self.bins(d) * JOINT_BINS + self.bins(p), minlength=JOINT_BINS**2)
        self.joint += pairs.reshape(JOINT_BINS, JOINT_BINS)
        place = np.searchsorted(EDGES, d, side="right") - 1
        for row, weights in enumerate((np.ones_like(d), np.square(p - d), np.abs(p - d) / d)):
            self._sums[row] += np.bincount(place, weights, len(EDGES))

    def ranges(self) -> tuple[RangeError, ...]:
        """Return the errors for each range of distances that occurs."""
        return tuple(
            RangeError(low, high, int(pixels), math.sqrt(squares / pixels), relative / pixels)
            for low, high, pixels, squares, relative in zip(EDGES, (*EDGES[1:], math.inf), *self._sums, strict=True)
            if pixels
        )


def _bins_end(records: Records, head: Regression, name: str, numbers: list[int]) -> float:
    """Return the end of the head's range, or the largest stored value, or 80 if no value is above 0."""
    if head.range is not None:
        return head.range[1]
    largest = max((float(records.target(number, name)["values"].max()) for number in numbers), default=0.0)
    return largest if 0 < largest < math.inf else MAX_DEPTH


def _rmse(depth_range: DepthRange, values: Array, label: Array) -> float | None:
    """Return the rmse of one image, or None without a valid pixel."""
    errors = DepthErrors(depth_range)
    errors.update(torch.from_numpy(values), torch.from_numpy(label))
    metrics = errors.metrics()
    return metrics.rmse if metrics.counted_images else None
