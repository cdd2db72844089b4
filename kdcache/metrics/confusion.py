"""Segmentation metrics by mmsegmentation's convention.

One confusion matrix over the whole set, void left out. IoU = I/U, Acc = I/label, mIoU and mAcc are means over
the classes that occur (a class absent from labels and predictions is NaN, not 0), aAcc = sum I / sum label.
mIoU is never a mean over images.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Fractions in 0..1; NaN where a class does not occur."""

    class_names: tuple[str, ...]
    iou: tuple[float, ...]
    acc: tuple[float, ...]
    label_pixels: tuple[int, ...]
    miou: float
    macc: float
    aacc: float

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; NaN becomes null, for JSON has none. Classes travel with their names."""
        rows = zip(self.class_names, self.iou, self.acc, self.label_pixels, strict=True)
        classes = [dict(zip(("name", "iou", "acc", "label_pixels"), row, strict=True)) for row in rows]
        return without_nan({"miou": self.miou, "macc": self.macc, "aacc": self.aacc, "classes": classes})


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, accumulated in int64."""

    def __init__(self, class_names: Sequence[str], ignore_index: int = 255) -> None:
        self.class_names = tuple(class_names)
        self.ignore_index = ignore_index
        size = len(self.class_names)
        self.counts = torch.zeros(size, size, dtype=torch.int64)

    def update(self, predicted: Tensor, label: Tensor) -> None:
        """Add pixels; any integer types, equal shapes. Ids at or above the number of classes are a bug upstream."""
        classes = len(self.class_names)
        counted = label != self.ignore_index
        pairs = label[counted].to(torch.int64) * classes + predicted[counted].to(torch.int64)
        self.counts += torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).cpu()

    def metrics(self) -> Metrics:
        """IoU and accuracy of everything added so far."""
        counts = self.counts.to(torch.float64)
        hits, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        iou = hits / (labelled + predicted - hits)  # 0/0 is NaN: the class does not occur
        acc = hits / labelled
        return Metrics(
            class_names=self.class_names,
            iou=tuple(iou.tolist()),
            acc=tuple(acc.tolist()),
            label_pixels=tuple(int(n) for n in labelled.tolist()),
            miou=iou.nanmean().item(),
            macc=acc.nanmean().item(),
            aacc=(hits.sum() / labelled.sum()).item(),
        )


def without_nan(content: dict[str, Any]) -> dict[str, Any]:
    """An object of JSON with None for NaN, which JSON does not have."""
    plain: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return plain
