"""Pseudo labels beside labels: how many pixels have one, how many of these are right, and their mIoU.

The same counts judge the thresholds of a store (`audit_cache`) and the files that an export wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdcache.data import IGNORE_INDEX, ClassList, Split, classes_by_name, prefetch
from kdcache.data.classes import read_classes
from kdcache.data.files import read_label
from kdcache.data.sample import ids_out_of_range
from kdcache.errors import DataError
from kdcache.metrics import ConfusionMatrix, Metrics
from kdcache.metrics.confusion import without_nan
from kdcache.metrics.evaluate import Progress
from kdcache.teacher.build.render import Array

LABELS = "labels"


@dataclass(frozen=True)
class PseudoQuality:
    """Pseudo labels of labelled pixels; shares are NaN of no pixels.

    Attributes:
        kept: share of the pixels labelled as each class that have a pseudo label; `total_kept` of all labelled pixels.
        precision: share of the pixels with each pseudo label that are labelled so; their total is `metrics.aacc`.
        metrics: IoU and accuracy over the pixels that have both.
    """

    kept: tuple[float, ...]
    total_kept: float
    precision: tuple[float, ...]
    metrics: Metrics

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; NaN becomes null."""
        rows = zip(self.metrics.class_names, self.kept, self.precision, self.metrics.iou, strict=True)
        classes = [dict(zip(("name", "kept", "precision", "iou"), row, strict=True)) for row in rows]
        total = {"kept": self.total_kept, "precision": self.metrics.aacc, "miou": self.metrics.miou}
        return without_nan({**total, "classes": classes})


class PseudoCounts:
    """Labelled pixels by the number of thresholds that their confidence reaches, label and prediction.

    Args:
        thresholds: the least confidences at which a prediction is a pseudo label, ascending.

    Legend: N thresholds and none, L labels, P predictions.
    """

    def __init__(self, class_names: Sequence[str], thresholds: Sequence[float]) -> None:
        self.class_names, self.thresholds = tuple(class_names), np.array(thresholds, np.float64)
        classes = len(self.class_names)
        self.counts_NLP = np.zeros((len(thresholds) + 1, classes, classes), np.int64)

    def update(self, argmax_HW: Array, confidence_HW: Array, label_HW: Array, counted_HW: Array | None = None) -> None:
        """Add the labelled pixels of an image.

        Args:
            counted_HW: bool, pixels to be added; default all.
        """
        counted = label_HW != IGNORE_INDEX
        counted = counted if counted_HW is None else counted & counted_HW
        level = np.searchsorted(self.thresholds, confidence_HW[counted].astype(np.float64), side="right")
        cells = np.ravel_multi_index(
            (level, label_HW[counted].astype(np.int64), argmax_HW[counted].astype(np.int64)), self.counts_NLP.shape
        )
        self.counts_NLP += np.bincount(cells, minlength=self.counts_NLP.size).reshape(self.counts_NLP.shape)

    def quality(self, number: int = 0) -> PseudoQuality:
        """What the threshold with this number keeps."""
        labelled_L, kept_LP = self.counts_NLP.sum((0, 2)), self.counts_NLP[number + 1 :].sum(0)
        confusion = ConfusionMatrix(self.class_names, IGNORE_INDEX)
        confusion.counts = torch.from_numpy(kept_LP)
        with np.errstate(invalid="ignore"):
            kept, precision = kept_LP.sum(1) / labelled_L, kept_LP.diagonal() / kept_LP.sum(0)
            total = np.float64(kept_LP.sum()) / labelled_L.sum()
        return PseudoQuality(tuple(kept.tolist()), float(total), tuple(precision.tolist()), confusion.metrics())


def judge_pseudo_labels(folder: Path, split: Split, progress: Progress | None = None) -> tuple[PseudoQuality, int]:
    """Judge the files of an export by the labels of a split, at the labels' own size, classes joined by name.

    Pseudo labels are resized to that (the nearest pixel's). A pixel without one, 255, is not kept.

    Args:
        split: ground truth of the samples, with the name that the split has in the folder.
        progress: called with (images done, images).
    Returns: the quality, and the number of images that have both.
    Raises: MismatchError where no class is shared; DataError where no image has both, or for a file that is no label.
    """
    classes = read_classes(folder)
    truth = classes_by_name(split, ClassList(classes.names, classes.colours))
    files = {i: path for i, name in enumerate(split.ids) if (path := _file(folder, split, name)).is_file()}
    both = [index for index in files if split.has_label(index)]
    if not both:
        raise DataError(
            "pseudo labels are judged by labels of the same samples: labels/SPLIT/ID.png",
            received=f"{len(files)} of the {len(split)} samples of {split.data}, split {split.split!r}, have a file in "
            f"{folder / LABELS / split.split}, and none of these has a label",
            remedy="give the data set that the store was built from, and its split with --split",
        )
    counts = PseudoCounts(classes.names, (0.5,))

    def read(index: int) -> tuple[Array, Array | None]:
        return _ids(files[index], len(classes)), truth.label(index)

    for done, (pseudo, label) in enumerate(prefetch(read, both, threads=2, ahead=8), 1):
        assert label is not None, "an image without a label"
        if pseudo.shape != label.shape:
            pseudo = np.array(Image.fromarray(pseudo).resize(label.shape[::-1], Image.Resampling.NEAREST))
        has = pseudo != IGNORE_INDEX
        counts.update(np.where(has, pseudo, 0), has, label)
        if progress is not None:
            progress(done, len(both))
    return counts.quality(), len(both)


def _file(folder: Path, split: Split, sample: str) -> Path:
    return folder / LABELS / split.split / f"{sample}.png"


def _ids(path: Path, classes: int) -> Array:
    """The ids in a file. Raises: DataError for ids of no class."""
    label = read_label(path)
    if strays := ids_out_of_range(label, classes):
        raise DataError(
            f"pseudo labels are class ids, 0 to {classes - 1}, or 255 where there is none",
            received=f"{', '.join(map(str, strays))} in {path}",
            remedy="export them again into another folder",
        )
    return label
