"""Calibration of a model's confidence, and the share of pixels that a confidence threshold keeps.

Confidences are float16, which has 15,361 values from 0 to 1. Pixels are counted by value and by class, so every bin,
threshold and quantile is exact and can be chosen after the pass. Memory: 360 KiB per class.

Legend: C classes, V values of float16 from 0 to 1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache.data import IGNORE_INDEX

BINS = 15
# Non-negative floats are ordered as their bits are.
VALUES_V = np.arange(int(np.float16(1).view(np.uint16)) + 1, dtype=np.uint16).view(np.float16).astype(np.float64)


@dataclass(frozen=True)
class Reliability:
    """The pixels whose confidence is in (low, high]: their share, mean confidence and accuracy, all from 0 to 1.

    `share` is a share of all labelled pixels. Confidence and accuracy are NaN if no pixel is in the bin.
    """

    low: float
    high: float
    share: float
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How well a model's confidence matches its accuracy, over the labelled pixels.

    Attributes:
        ece: the expected calibration error, 0 to 1: the mean of |confidence - accuracy| over the bins, weighted by
            their shares.
        bins: one entry for each interval of confidence, from low to high.
        confidence: for each class, the mean confidence of the pixels predicted as this class, or NaN if there are none.
        precision: for each class, the share of these pixels that are correct, or NaN if there are none.
    """

    ece: float
    bins: tuple[Reliability, ...]
    confidence: tuple[float, ...]
    precision: tuple[float, ...]


@dataclass(frozen=True)
class Coverage:
    """Counts of the selected pixels: those whose confidence reaches the threshold of their predicted class.

    Attributes:
        thresholds: for each class, the confidence that a pixel must reach.
        predicted: for each class, the number of pixels predicted as this class.
        selected: for each class, the number of these pixels at or above the threshold.
        precision: for each class, the share of the selected, labelled pixels that are correct, or NaN if there are
            none.
        total_precision: the share of correct pixels among the selected, labelled pixels of all classes.
    """

    thresholds: tuple[float, ...]
    predicted: tuple[int, ...]
    selected: tuple[int, ...]
    precision: tuple[float, ...]
    total_precision: float

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the selected pixels among those predicted as each class. NaN if no pixel is."""
        return _ratios(self.selected, self.predicted)

    @property
    def total_share(self) -> float:
        """The share of all pixels whose confidence reaches the threshold of their predicted class."""
        return _ratio(sum(self.selected), sum(self.predicted))


class ConfidenceCounts:
    """Counts of pixels by predicted class and confidence, int64 (C, V).

    V is 15,361, the number of float16 values from 0 to 1.

    Args:
        classes: the number of classes, C.

    Attributes:
        predicted_CV: counts of all pixels.
        labelled_CV: counts of the pixels with a label.
        right_CV: counts of the pixels with a correct prediction.
    """

    def __init__(self, classes: int) -> None:
        self.predicted_CV, self.labelled_CV, self.right_CV = (
            np.zeros((classes, VALUES_V.size), np.int64) for _ in range(3)
        )

    def update(
        self,
        argmax_HW: Tensor,
        confidence_HW: Tensor,
        label_HW: NDArray[Any] | None,
        counted_HW: NDArray[Any] | None = None,
    ) -> None:
        """Add the pixels of an image.

        Args:
            argmax_HW: predicted class ids, of an integer type.
            confidence_HW: confidences from 0 to 1, float16.
            label_HW: class ids, or None for an image without a label. A void pixel (255) is only counted as predicted.
            counted_HW: bool, True for the pixels to add. None adds all.
        """
        counted = np.ones(argmax_HW.shape, bool) if counted_HW is None else counted_HW
        class_HW = argmax_HW.numpy().astype(np.int64)
        cell_HW = class_HW * VALUES_V.size + confidence_HW.numpy().view(np.uint16)
        np.add.at(self.predicted_CV.reshape(-1), cell_HW[counted], 1)
        if label_HW is not None:
            np.add.at(self.labelled_CV.reshape(-1), cell_HW[counted & (label_HW != IGNORE_INDEX)], 1)
            np.add.at(self.right_CV.reshape(-1), cell_HW[counted & (label_HW == class_HW)], 1)

    def calibration(self, bins: int = BINS) -> Calibration:
        """Return how far the confidence of the labelled pixels agrees with the share of them that is right.

        The confidence from 0 to 1 is cut into `bins` equal intervals, closed on the right.

        Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
        """
        edges = np.linspace(0, 1, bins + 1)
        bin_V = np.clip(np.searchsorted(edges, VALUES_V, side="left") - 1, 0, None)
        labelled_V, right_V = self.labelled_CV.sum(0), self.right_CV.sum(0)
        count, right, sure = (np.bincount(bin_V, x, bins) for x in (labelled_V, right_V, labelled_V * VALUES_V))
        total = max(int(labelled_V.sum()), 1)
        rows = zip(edges[:-1], edges[1:], count, sure, right, strict=True)
        labelled_C = self.labelled_CV.sum(1)
        return Calibration(
            ece=float(np.abs(sure - right).sum() / total),
            bins=tuple(
                Reliability(float(low), float(high), n / total, _ratio(s, n), _ratio(r, n))
                for low, high, n, s, r in rows
            ),
            confidence=_ratios(self.labelled_CV @ VALUES_V, labelled_C),
            precision=_ratios(self.right_CV.sum(1), labelled_C),
        )

    def coverage(self, threshold: float | Sequence[float]) -> Coverage:
        """Return how many pixels of each predicted class reach a confidence threshold, and the share that is correct.

        `threshold` is one number from 0 to 1 for all classes, or one for each class.
        """
        thresholds_C = np.broadcast_to(np.asarray(threshold, np.float64), len(self.predicted_CV))
        first_C = np.searchsorted(VALUES_V, thresholds_C, side="left")
        selected_C, labelled_C, right_C = (
            np.array([row[first:].sum() for row, first in zip(counts_CV, first_C, strict=True)])
            for counts_CV in (self.predicted_CV, self.labelled_CV, self.right_CV)
        )
        return Coverage(
            thresholds=tuple(thresholds_C.tolist()),
            predicted=tuple(self.predicted_CV.sum(1).tolist()),
            selected=tuple(selected_C.tolist()),
            precision=_ratios(right_C, labelled_C),
            total_precision=_ratio(right_C.sum(), labelled_C.sum()),
        )

    def threshold_keeping(self, share: float) -> float:
        """Return the largest confidence threshold that keeps at least `share` (0 to 1) of all pixels.

        A pixel is kept if its confidence is at least the threshold, which is the same for all classes. Return 1 if
        there are no pixels.
        """
        kept_V = self.predicted_CV.sum(0)[::-1].cumsum()[::-1]
        enough_V = (kept_V >= share * kept_V[0]) & (kept_V > 0)
        return float(VALUES_V[np.flatnonzero(enough_V)[-1]]) if enough_V.any() else 1.0

    @property
    def highest(self) -> float:
        """The largest confidence of any pixel, or 0 without pixels."""
        values = VALUES_V[self.predicted_CV.any(0)]
        return float(values[-1]) if len(values) else 0.0

    def quantile_thresholds(self, share: float) -> tuple[float, ...]:
        """Return the largest threshold for each class that keeps at least `share` (0 to 1) of its predicted pixels.

        Pixels of equal confidence are kept or dropped together. The threshold is 1 for a class that is never predicted.
        """
        kept_CV = self.predicted_CV[:, ::-1].cumsum(1)[:, ::-1]
        enough_CV = (kept_CV >= share * kept_CV[:, :1]) & (kept_CV > 0)
        last_C = VALUES_V.size - 1 - enough_CV[:, ::-1].argmax(1)
        return tuple(VALUES_V[last_C].tolist())


def _ratio(part: float, total: float) -> float:
    return float(part) / float(total) if total else float("nan")


def _ratios(parts: Iterable[float], wholes: Iterable[float]) -> tuple[float, ...]:
    return tuple(_ratio(part, total) for part, total in zip(parts, wholes, strict=True))
