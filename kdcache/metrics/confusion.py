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
    """Pixel counts of N images and C classes, from which the IoU over any subset of the images follows.

    The IoU of a class over some images is the sum of its `hits` divided by the sum of its `unions`.

    Attributes:
        ids: the ids of the images.
        hits: number of pixels that have the class in label and prediction, (N, C).
        unions: number of pixels that have the class in label, prediction or both, without void, (N, C).
    """

    ids: tuple[str, ...]
    hits: npt.NDArray[np.int64]
    unions: npt.NDArray[np.int64]

    @classmethod
    def of(cls, ids: Sequence[str], counts: Sequence[Tensor]) -> "ImageCounts":
        """Return the counts of the images with these ids.

        `counts` has a confusion matrix (C, C) for each image, with labels along the rows.
        """
        matrices = torch.stack(list(counts)).numpy()
        hits = np.diagonal(matrices, axis1=1, axis2=2).copy()
        return cls(tuple(ids), hits, matrices.sum(1) + matrices.sum(2) - hits)

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any]) -> "ImageCounts":
        """Return the counts from the arrays of an .npz file by name: `ids`, `hits` and `unions`.

        Raises: KeyError for a missing array.
        """
        hits, unions = (arrays[name].astype(np.int64) for name in ("hits", "unions"))
        return cls(tuple(arrays["ids"].tolist()), hits, unions)

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The attributes as arrays for an .npz file, by name: `ids` (N,), `hits` and `unions`, uint32 (N, C)."""
        hits, unions = (counts.astype(np.uint32) for counts in (self.hits, self.unions))
        return {"ids": np.array(self.ids), "hits": hits, "unions": unions}

    @property
    def parts(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The pixel counts `hits` (intersections) and `unions`, (N, C) each.

        If both are summed over some images, the mean over classes of hits / unions is the mIoU of these images.
        """
        return self.hits, self.unions

    @property
    def iou(self) -> Tensor:
        """The IoU of each image and class, float64 (N, C). NaN if the class is neither in the label nor predicted."""
        hits, unions = (torch.from_numpy(counts).to(torch.float64) for counts in (self.hits, self.unions))
        return hits / unions

    @property
    def scores(self) -> list[float]:
        """The mIoU of each image, 0 to 1, over the classes in the image's label or prediction. NaN if all is void."""
        return [iou.nanmean().item() for iou in self.iou]


@dataclass(frozen=True)
class Metrics:
    """Segmentation metrics of a model on a split: fractions from 0 to 1, or NaN for a class that does not occur.

    Attributes:
        class_names, iou, acc, label_pixels: for each class, its name, IoU, recall, and number of labelled pixels.
        miou, macc: the means of `iou` and `acc` over the classes that occur.
        aacc: the share of the labelled pixels that are correct.
        images: the counts of every image, or None if they were not kept. `==` and JSON leave them out.
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
        """Return the metrics as JSON values, with null for NaN and one object for each class.

        The counts of single images are left out.
        """
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
        """Return the metrics of the classes `names` only. No other class may have labelled pixels (asserted).

        `miou` and `macc` become means over these classes. A pixel that is predicted as another class still counts as
        wrong.
        """
        kept = [self.class_names.index(name) for name in names]
        assert sum(self.label_pixels) == sum(self.label_pixels[i] for i in kept), "labels of a class that is left out"
        iou, acc = (tuple(values[i] for i in kept) for values in (self.iou, self.acc))
        images = self.images
        return Metrics(
            class_names=tuple(names),
            iou=iou,
            acc=acc,
            label_pixels=tuple(self.label_pixels[i] for i in kept),
            miou=mean_of(iou),
            macc=mean_of(acc),
            aacc=self.aacc,
            images=None if images is None else ImageCounts(images.ids, images.hits[:, kept], images.unions[:, kept]),
        )


class ConfusionMatrix:
    """Counts of pixels by label (rows) and prediction (columns): `counts`, int64 (C, C).

    Args:
        class_names: the names of the C classes.
        ignore_index: the label of void pixels, which do not count.
    """

    def __init__(self, class_names: Sequence[str], ignore_index: int = 255) -> None:
        self.class_names = tuple(class_names)
        self.ignore_index = ignore_index
        size = len(self.class_names)
        self.counts = torch.zeros(size, size, dtype=torch.int64)

    def update(self, predicted: Tensor, label: Tensor) -> Tensor:
        """Add the pixels of an image to the counts. Return the counts of these pixels only, int64 (C, C).

        `predicted` and `label` are class ids of equal shapes and any integer types. Pixels labelled `ignore_index` do
        not count. Every other id must be below the number of classes, which is not checked.
        """
        classes = len(self.class_names)
        counted = label != self.ignore_index
        pairs = label[counted].to(torch.int64) * classes + predicted[counted].to(torch.int64)
        added = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).cpu()
        self.counts += added
        return added

    def metrics(self) -> Metrics:
        """Return the metrics of all pixels added so far."""
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
    """Return the mean of the values that are not NaN, or NaN if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def number_of(value: float | None) -> float:
    """Return a number read from JSON as a float. None (null) becomes NaN."""
    return math.nan if value is None else float(value)


def without_nan(content: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of JSON values in which None replaces NaN and infinity, because JSON has neither."""
    plain: dict[str, Any] = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return plain
