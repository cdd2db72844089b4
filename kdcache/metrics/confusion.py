"""Segmentation metrics by mmsegmentation's convention.

There is one confusion matrix over the whole set, without void. IoU = I/U, Acc = I/label, mIoU and mAcc are means over
the classes that occur (a class absent from labels and predictions is NaN, not 0), aAcc = sum I / sum label. mIoU is
never a mean over images.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageCounts:
    """Pixels per image and class, int64 (N, C), which give the IoU of any selection of images.

    Attributes:
        ids: the images' ids.
        hits: pixels of a class in both label and prediction. unions: in either of them. Void is left out.
    """

    ids: tuple[str, ...]
    hits: npt.NDArray[np.int64]
    unions: npt.NDArray[np.int64]

    @classmethod
    def of(cls, ids: Sequence[str], counts: Sequence[Tensor]) -> "ImageCounts":
        """Return the counts of images from their confusion matrices, (C, C) each."""
        matrices = torch.stack(list(counts)).numpy()
        hits = np.diagonal(matrices, axis1=1, axis2=2).copy()
        return cls(tuple(ids), hits, matrices.sum(1) + matrices.sum(2) - hits)

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any]) -> "ImageCounts":
        """Return the counts from their `arrays`. Raises: KeyError."""
        hits, unions = (arrays[name].astype(np.int64) for name in ("hits", "unions"))
        return cls(tuple(arrays["ids"].tolist()), hits, unions)

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a file that holds them."""
        hits, unions = (counts.astype(np.uint32) for counts in (self.hits, self.unions))
        return {"ids": np.array(self.ids), "hits": hits, "unions": unions}

    @property
    def parts(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Two arrays (N, C). Sum both over some images: the mean ratio of the sums is their score."""
        return self.hits, self.unions

    @property
    def iou(self) -> Tensor:
        """IoU of each image and class, (N, C) float64, NaN if a class is neither in its label nor predicted."""
        hits, unions = (torch.from_numpy(counts).to(torch.float64) for counts in (self.hits, self.unions))
        return hits / unions

    @property
    def scores(self) -> list[float]:
        """MIoU of each image, over its own classes."""
        return [iou.nanmean().item() for iou in self.iou]


@dataclass(frozen=True)
class Metrics:
    """Segmentation metrics as fractions in 0..1, or NaN if a class does not occur.

    Attributes:
        images: counts of every image, or None if they were not kept. Ignored by comparison and JSON.
    """

    class_names: tuple[str, ...]
    iou: tuple[float, ...]
    acc: tuple[float, ...]
    label_pixels: tuple[int, ...]
    miou: float
    macc: float
    aacc: float
    images: ImageCounts | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values with null for NaN, and classes by name."""
        rows = zip(self.class_names, self.iou, self.acc, self.label_pixels, strict=True)
        classes = [dict(zip(("name", "iou", "acc", "label_pixels"), row, strict=True)) for row in rows]
        return without_nan({"miou": self.miou, "macc": self.macc, "aacc": self.aacc, "classes": classes})

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "Metrics":
        """Return the metrics from the JSON of `to_json`. Raises: KeyError, TypeError for other content."""
        classes = content["classes"]
        return cls(
            class_names=tuple(str(row["name"]) for row in classes),
            iou=tuple(number_of(row["iou"]) for row in classes),
            acc=tuple(number_of(row["acc"]) for row in classes),
            label_pixels=tuple(int(row["label_pixels"]) for row in classes),
            miou=number_of(content["miou"]),
            macc=number_of(content["macc"]),
            aacc=number_of(content["aacc"]),
        )

    def over(self, names: Sequence[str]) -> "Metrics":
        """Return the metrics of some classes only, if no other class is labelled. Means are over these classes.

        A labelled pixel that is predicted as one of the other classes stays a miss of its class.
        """
        kept = [self.class_names.index(name) for name in names]
        assert sum(self.label_pixels) == sum(self.label_pixels[i] for i in kept), "labels of a class that is left out"
        iou, acc = (tuple(values[i] for i in kept) for values in (self.iou, self.acc))
        own = self.images
        return Metrics(
            class_names=tuple(names),
            iou=iou,
            acc=acc,
            label_pixels=tuple(self.label_pixels[i] for i in kept),
            miou=mean_of(iou),
            macc=mean_of(acc),
            aacc=self.aacc,
            images=None if own is None else ImageCounts(own.ids, own.hits[:, kept], own.unions[:, kept]),
        )


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, accumulated in int64."""

    def __init__(self, class_names: Sequence[str], ignore_index: int = 255) -> None:
        self.class_names = tuple(class_names)
        self.ignore_index = ignore_index
        size = len(self.class_names)
        self.counts = torch.zeros(size, size, dtype=torch.int64)

    def update(self, predicted: Tensor, label: Tensor) -> Tensor:
        """Add pixels of any integer types, in equal shapes. Ids at or above the class count are a bug in the caller.

        Returns: the counts of these pixels only, (C, C).
        """
        classes = len(self.class_names)
        counted = label != self.ignore_index
        pairs = label[counted].to(torch.int64) * classes + predicted[counted].to(torch.int64)
        added = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).cpu()
        self.counts += added
        return added

    def metrics(self) -> Metrics:
        """Return IoU and accuracy of everything added so far."""
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


def mean_of(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN, or NaN without any."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def number_of(value: float | None) -> float:
    """Return a number from JSON, where None is NaN."""
    return math.nan if value is None else float(value)


def without_nan(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with None for NaN, which JSON does not have."""
    plain: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return plain
