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
    """How tables show a metric: its column header and the format of its values.

    Attributes:
        head: the header of its column, with the unit.
        about: an explanation in words.
        text: function that returns a value as text, or "-" for NaN.
        less: whether smaller values are better.
    """

    head: str
    about: str
    text: Callable[[float], str]
    less: bool = False


class Accumulator(Protocol):
    """An object that collects a task's predictions and labels, image by image, and computes its metrics."""

    def update(self, predicted: Tensor, label: Tensor, sample_id: str = "") -> object:
        """Add an image's prediction and label, (H, W) each, as class ids or as depth in metres.

        `sample_id` names the image in the results. The return value has no meaning.
        """

    def result(self) -> TaskMetric | None:
        """Return the metrics of all images added, or None without images. Raises: DataError if no pixel counts."""


class Evaluator(ABC, Generic[Of]):
    """How a task is evaluated. Each task has one subclass.

    Attributes:
        metrics: the class of the task's metrics.
        images: the class that keeps the metrics or counts of every image, such as `ImageCounts`.
        figures: how tables show each metric, by the name of the attribute of `metrics`.
    """

    metrics: ClassVar[type[Any]]
    images: ClassVar[type[Any]]
    figures: ClassVar[Mapping[str, Figure]]

    @abstractmethod
    def predicted_by(self, model: SegmentationModel) -> bool:
        """Return whether a model predicts this task in the unit of its labels, so that it can be evaluated."""

    @abstractmethod
    def answer(self, model: SegmentationModel, output_CHW: Tensor) -> Tensor:
        """Return the prediction (H, W) from the output (C, H, W) of this task's head of `model`.

        The prediction has class ids, uint8, or numbers in the head's unit, such as metres.
        """

    @abstractmethod
    def begin(self, model: SegmentationModel, split: Split, depth: DepthSettings | None) -> Accumulator:
        """Return an empty accumulator for a model on a split.

        `depth` selects the depth labels that count. None takes the defaults.
        """

    @abstractmethod
    def words(self, metrics: Of) -> str:
        """Return the score, the metric that ranks models, from `metrics` with its name and unit: "mIoU 63.10 %"."""

    @abstractmethod
    def rows(self, metrics: Of) -> list[tuple[str, str]]:
        """Return pairs of a metric's name and its value as text, for a notebook."""

    @abstractmethod
    def table(self, metrics: Of) -> tuple[str, Table]:
        """Return one line of results, and a table (header, rows) of the metrics."""


class NumericEvaluator(Evaluator[Of]):
    """The base class for the evaluation of a numeric task such as depth.

    A subclass also defines `merged`, which joins the results of several processes with different images.
    """

    @abstractmethod
    def merged(self, parts: Sequence[Any]) -> Of:
        """Return the metrics over the images of several processes. They are NaN if no pixel counts.

        `parts` has the accumulator of each process.
        """


class ClassCounts:
    """The accumulator of segmentation: counts pixels by label and predicted class.

    `split` gives the class names.

    Attributes:
        confusion: the confusion matrix over all images.
    """

    def __init__(self, split: Split) -> None:
        self.confusion = ConfusionMatrix(split.classes.names)
        self._ids, self._counts = list[str](), list[Tensor]()

    def update(self, predicted: Tensor, label: Tensor, sample_id: str = "") -> None:
        """Add an image: its `predicted` class ids and its `label`, (H, W) each.

        `sample_id` names the image in the results.
        """
        self._ids.append(sample_id)
        self._counts.append(self.confusion.update(predicted, label))

    def result(self) -> Metrics | None:
        """Return the metrics of all images, with the counts of each image, or None if there are no images."""
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
        rows = [[figure.head, figure.text(getattr(metrics, name))] for name, figure in self.figures.items()]
        return summary, (["depth", "mean of images"], rows)


def metric_head(heads: Mapping[str, RegressionHead], task: str) -> RegressionHead | None:
    """Return a model's head of a numeric task if it has the unit of the task's labels (metres), else None.

    `heads` are the model's numeric heads by name.
    """
    head = heads.get(task)
    return head if head is not None and head.unit == TASKS[task].unit else None


NUMERIC_EVALUATORS: Mapping[str, NumericEvaluator[Any]] = {DEPTH: _Depth()}
"""How each task of numbers is evaluated."""
EVALUATORS: Mapping[str, Evaluator[Any]] = {SEGMENTATION: _Segmentation(), **NUMERIC_EVALUATORS}
"""How each task is evaluated, in the order of `TASKS`."""
