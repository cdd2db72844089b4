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
    """Pseudo labels compared with labels, on labelled pixels. Fractions of zero pixels are NaN.

    Attributes:
        kept: for each labelled class, the fraction of its pixels that have a pseudo label.
        total_kept: the fraction of all labelled pixels that have a pseudo label.
        precision: for each class, the fraction of its pseudo labels that is right.
        metrics: IoU and accuracy over the pixels that have a pseudo label.
    """

    kept: tuple[float, ...]
    total_kept: float
    precision: tuple[float, ...]
    metrics: Metrics

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, with null for NaN."""
        rows = zip(self.metrics.class_names, self.kept, self.precision, self.metrics.iou, strict=True)
        classes = [dict(zip(("name", "kept", "precision", "iou"), row, strict=True)) for row in rows]
        total = {"kept": self.total_kept, "precision": self.metrics.aacc, "miou": self.metrics.miou}
        return without_nan({**total, "classes": classes})


class PseudoCounts:
    """Counts labelled pixels, to compare pseudo labels with labels at several confidence thresholds.

    Args:
        class_names: names of the classes.
        thresholds: the smallest confidences, ascending, at which a prediction becomes a pseudo label.

    Attributes:
        counts_NLP: int64 (thresholds + 1, C, C), numbers of pixels. The first index is how many thresholds a pixel's
            confidence reaches. The second is its label, and the third its predicted class.
    """

    def __init__(self, class_names: Sequence[str], thresholds: Sequence[float]) -> None:
        self.class_names, self.thresholds = tuple(class_names), np.array(thresholds, np.float64)
        classes = len(self.class_names)
        self.counts_NLP = np.zeros((len(thresholds) + 1, classes, classes), np.int64)

    def update(self, argmax_HW: Array, confidence_HW: Array, label_HW: Array, counted_HW: Array | None = None) -> None:
        """Add the labelled pixels of one image.

        Args:
            argmax_HW: the predicted class of each pixel.
            confidence_HW: the probability of that class, 0 to 1.
            label_HW: the label, 255 for void.
            counted_HW: bool, the pixels to count. None counts all.
        """
        counted = label_HW != IGNORE_INDEX
        counted = counted if counted_HW is None else counted & counted_HW
        level = np.searchsorted(self.thresholds, confidence_HW[counted].astype(np.float64), side="right")
        cells = np.ravel_multi_index(
            (level, label_HW[counted].astype(np.int64), argmax_HW[counted].astype(np.int64)), self.counts_NLP.shape
        )
        self.counts_NLP += np.bincount(cells, minlength=self.counts_NLP.size).reshape(self.counts_NLP.shape)

    def quality(self, number: int = 0) -> PseudoQuality:
        """Return the quality of the pseudo labels at the threshold with the index `number` in `thresholds`."""
        labelled_L, kept_LP = self.counts_NLP.sum((0, 2)), self.counts_NLP[number + 1 :].sum(0)
        confusion = ConfusionMatrix(self.class_names, IGNORE_INDEX)
        confusion.counts = torch.from_numpy(kept_LP)
        with np.errstate(invalid="ignore"):
            kept, precision = kept_LP.sum(1) / labelled_L, kept_LP.diagonal() / kept_LP.sum(0)
            total = np.float64(kept_LP.sum()) / labelled_L.sum()
        return PseudoQuality(tuple(kept.tolist()), float(total), tuple(precision.tolist()), confusion.metrics())
