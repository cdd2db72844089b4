"""Compare pseudo labels with labels: how many pixels have one, how many of these are right, and their mIoU.

The counts judge the thresholds of a cache (`audit_cache`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdcache.data import IGNORE_INDEX
from kdcache.metrics import ConfusionMatrix, Metrics
from kdcache.metrics.confusion import without_nan
from kdcache.teacher.build.render import Array


@dataclass(frozen=True)
class PseudoQuality:
    """Pseudo labels of labelled pixels. Shares of no pixels are NaN.

    Attributes:
        kept: share of the pixels of each labelled class with a pseudo label. `total_kept`: of all labelled pixels.
        precision: share of each class's pseudo labels that is right. Over all classes it is `metrics.aacc`.
        metrics: IoU and accuracy over the pixels that have both.
    """

    kept: tuple[float, ...]
    total_kept: float
    precision: tuple[float, ...]
    metrics: Metrics

    def to_json(self) -> dict[str, Any]:
        """Return JSON values with null for NaN."""
        rows = zip(self.metrics.class_names, self.kept, self.precision, self.metrics.iou, strict=True)
        classes = [dict(zip(("name", "kept", "precision", "iou"), row, strict=True)) for row in rows]
        total = {"kept": self.total_kept, "precision": self.metrics.aacc, "miou": self.metrics.miou}
        return without_nan({**total, "classes": classes})


class PseudoCounts:
    """Labelled pixels by label, prediction, and number of thresholds that their confidence reaches.

    Args:
        thresholds: the least confidences at which a prediction is a pseudo label, ascending.

    Legend: N thresholds and none, L labels, P predictions.
    """

    def __init__(self, class_names: Sequence[str], thresholds: Sequence[float]) -> None:
        self.class_names, self.thresholds = tuple(class_names), np.array(thresholds, np.float64)
        classes = len(self.class_names)
        self.counts_NLP = np.zeros((len(thresholds) + 1, classes, classes), np.int64)

    def update(self, argmax_HW: Array, confidence_HW: Array, label_HW: Array, counted_HW: Array | None = None) -> None:
        """Add the labelled pixels of an image, or only those in `counted_HW` (bool)."""
        counted = label_HW != IGNORE_INDEX
        counted = counted if counted_HW is None else counted & counted_HW
        level = np.searchsorted(self.thresholds, confidence_HW[counted].astype(np.float64), side="right")
        cells = np.ravel_multi_index(
            (level, label_HW[counted].astype(np.int64), argmax_HW[counted].astype(np.int64)), self.counts_NLP.shape
        )
        self.counts_NLP += np.bincount(cells, minlength=self.counts_NLP.size).reshape(self.counts_NLP.shape)

    def quality(self, number: int = 0) -> PseudoQuality:
        """Return the quality of the pseudo labels by the threshold with this number."""
        labelled_L, kept_LP = self.counts_NLP.sum((0, 2)), self.counts_NLP[number + 1 :].sum(0)
        confusion = ConfusionMatrix(self.class_names, IGNORE_INDEX)
        confusion.counts = torch.from_numpy(kept_LP)
        with np.errstate(invalid="ignore"):
            kept, precision = kept_LP.sum(1) / labelled_L, kept_LP.diagonal() / kept_LP.sum(0)
            total = np.float64(kept_LP.sum()) / labelled_L.sum()
        return PseudoQuality(tuple(kept.tolist()), float(total), tuple(precision.tolist()), confusion.metrics())
