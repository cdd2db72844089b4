"""How each task is evaluated: one entry per task in `EVALUATORS`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from kdcache.data import Split
from kdcache.errors import DataError
from kdcache.heads import RegressionHead
from kdcache.metrics.confusion import ConfusionMatrix, ImageCounts, Metrics
from kdcache.metrics.depth import DepthErrors, DepthImages, DepthMetrics, DepthRange
from kdcache.metrics.tables import DEPTH_HEADS, Table, class_rows, depth_figure, percent
from kdcache.models import SegmentationModel
from kdcache.settings.shared import DepthSettings
from kdcache.tasks import DEPTH, SEGMENTATION, TASKS

Images = ImageCounts | DepthImages
"""The numbers of single images of a task."""
TaskMetric = Metrics | DepthMetrics
"""The metrics of a task."""
Of = TypeVar("Of", Metrics, DepthMetrics)


@dataclass(frozen=True)
class Figure:
    """A number that a task is evaluated by.

    Attributes:
        head: its header in tables, with its unit.
        about: what it is, in words.
        text: returns a value as text, '-' for NaN.
        less: whether less of it is better.
    """

    head: str
    about: str
    text: Callable[[float], str]
    less: bool = False


class Accumulator(Protocol):
    """Collects the answers to a task and its labels, image by image."""

    def update(self, predicted: Tensor, label: Tensor, sample_id: str = "") -> object:
        """Add the answer and the label of an image, (H, W) each."""

    def result(self) -> TaskMetric | None:
        """Return the metrics of all images, or None without images. Raises: DataError if no pixel counts."""


class Evaluator(ABC, Generic[Of]):
    """How a task is evaluated.

    Attributes:
        metrics: the class of its metrics, and `images`, the class of the numbers of single images.
        figures: the figures of its metrics, by their attributes.
    """

    metrics: ClassVar[type[Any]]
    images: ClassVar[type[Any]]
    figures: ClassVar[Mapping[str, Figure]]

    @abstractmethod
    def predicted_by(self, model: SegmentationModel) -> bool:
        """Return whether a model has a head whose answers can be compared with labels."""

    @abstractmethod
    def answer(self, model: SegmentationModel, output_CHW: Tensor) -> Tensor:
        """Return the answer (H, W) from a head's output: argmax uint8, or values in the head's unit."""

    @abstractmethod
    def begin(self, model: SegmentationModel, split: Split, depth: DepthSettings | None) -> Accumulator:
        """Return an empty accumulator. `depth` selects the depth labels that count."""

    @abstractmethod
    def words(self, metrics: Of) -> str:
        """Return the score with its name and unit."""

    @abstractmethod
    def rows(self, metrics: Of) -> list[tuple[str, str]]:
        """Return figures and their values for a notebook."""

    @abstractmethod
    def table(self, metrics: Of) -> tuple[str, Table]:
        """Return a summary, and the header and rows of a table."""


class NumericEvaluator(Evaluator[Of]):
    """How a task of numbers, such as depth, is evaluated: its errors can be merged over processes."""

    @abstractmethod
    def merged(self, parts: Sequence[Any]) -> Of:
        """Return the metrics over all accumulators of `begin`, one from each process, or NaN if no pixel counts."""


class ClassCounts:
    """Counts of classes: `confusion` over all images of a split, and the counts of each image."""

    def __init__(self, split: Split) -> None:
        self.confusion = ConfusionMatrix(split.classes.names)
        self._ids, self._counts = list[str](), list[Tensor]()

    def update(self, predicted: Tensor, label: Tensor, sample_id: str = "") -> None:
        """Add the argmax and the label of an image, (H, W) each."""
        self._ids.append(sample_id)
        self._counts.append(self.confusion.update(predicted, label))

    def result(self) -> Metrics | None:
        """Return the metrics with the counts of every image, or None without images."""
        if not self._ids:
            return None
        return replace(self.confusion.metrics(), images=ImageCounts.of(self._ids, self._counts))


class _Segmentation(Evaluator[Metrics]):
    metrics, images = Metrics, ImageCounts
    figures: ClassVar = {
        "miou": Figure("mIoU %", "mean IoU over the classes that occur", percent),
        "macc": Figure("mAcc %", "mean share of a class's pixels that is found", percent),
        "aacc": Figure("aAcc %", "share of all pixels that is right", percent),
    }

    def predicted_by(self, model: SegmentationModel) -> bool:
        return SEGMENTATION in model.head_kinds

    def answer(self, model: SegmentationModel, output_CHW: Tensor) -> Tensor:
        return output_CHW.argmax(0).to(torch.uint8)

    def begin(self, model: SegmentationModel, split: Split, depth: DepthSettings | None) -> ClassCounts:
        return ClassCounts(split)

    def words(self, metrics: Metrics) -> str:
        return f"mIoU {100 * metrics.miou:.2f} %"

    def rows(self, metrics: Metrics) -> list[tuple[str, str]]:
        values = {"mIoU": metrics.miou, "mAcc": metrics.macc, "aAcc": metrics.aacc}
        values |= dict(zip(metrics.class_names, metrics.iou, strict=True))
        return [(name, f"{100 * value:.2f} %") for name, value in values.items()]

    def table(self, metrics: Metrics) -> tuple[str, Table]:
        summary = f"mIoU {percent(metrics.miou)}, mAcc {percent(metrics.macc)}, aAcc {percent(metrics.aacc)}"
        return summary, (["class", "IoU %", "Acc %", "pixels %"], [list(row) for row in class_rows(metrics)])


class _Depths(DepthErrors):
    """Errors of depth on a split."""

    def __init__(self, depth_range: DepthRange, split: Split) -> None:
        super().__init__(depth_range)
        self._where = f"{split.data}, split {split.split!r}"

    def result(self) -> DepthMetrics:
        metrics = self.metrics()
        if not metrics.counted_images:
            raise DataError(
                f"No label of {self._where}, has depth from {self.range.min_depth:g} to {self.range.max_depth:g} m"
                + (" inside the crop" if self.range.crop != "none" else ""),
                fix="Show the range of the labels with kdcache data check. Then give --min-depth and --max-depth that "
                "fit, or correct the unit in depth.toml",
            )
        return metrics


_DEPTH_WORDS = {
    "rmse": "of depth, root mean square error in metres; less is better",
    "abs_rel": "error of depth as a part of the depth; less is better",
    "delta1": "share of pixels within a factor of 1.25",
}


class _Depth(NumericEvaluator[DepthMetrics]):
    metrics, images = DepthMetrics, DepthImages
    figures: ClassVar = {
        name: Figure(head, _DEPTH_WORDS.get(name, head), partial(depth_figure, name), less=not name.startswith("delta"))
        for name, head in DEPTH_HEADS.items()
    }

    def predicted_by(self, model: SegmentationModel) -> bool:
        return metric_head(model.regressions, DEPTH) is not None

    def answer(self, model: SegmentationModel, output_CHW: Tensor) -> Tensor:
        return model.regressions[DEPTH].values(output_CHW)[0]

    def begin(self, model: SegmentationModel, split: Split, depth: DepthSettings | None) -> _Depths:
        return _Depths(DepthRange.of(model.regressions[DEPTH], depth), split)

    def merged(self, parts: Sequence[DepthErrors]) -> DepthMetrics:
        return DepthErrors.merged(parts).metrics()

    def words(self, metrics: DepthMetrics) -> str:
        return f"depth rmse {metrics.rmse:.3g} m"

    def rows(self, metrics: DepthMetrics) -> list[tuple[str, str]]:
        return [("depth rmse", f"{metrics.rmse:.3g} m"), ("depth abs rel", f"{metrics.abs_rel:.3g}")]

    def table(self, metrics: DepthMetrics) -> tuple[str, Table]:
        summary = f"Depth of {metrics.counted_images} images, {metrics.pixels} pixels"
        rows = [[one.head, one.text(getattr(metrics, name))] for name, one in self.figures.items()]
        return summary, (["depth", "mean of images"], rows)


def metric_head(heads: Mapping[str, RegressionHead], task: str) -> RegressionHead | None:
    """Return the head of a regression task, if it has the unit of the task's labels, or None."""
    head = heads.get(task)
    return head if head is not None and head.unit == TASKS[task].unit else None


NUMERIC_EVALUATORS: Mapping[str, NumericEvaluator[Any]] = {DEPTH: _Depth()}
"""How each task of numbers is evaluated."""
EVALUATORS: Mapping[str, Evaluator[Any]] = {SEGMENTATION: _Segmentation(), **NUMERIC_EVALUATORS}
"""How each task is evaluated, in the order of `TASKS`."""
