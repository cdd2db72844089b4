"""One model on several data sets, each judged by the classes that it shares with the model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdcache.data import Split
from kdcache.metrics.confusion import Metrics, mean_of
from kdcache.metrics.evaluate import TaskMetrics
from kdcache.metrics.evaluators import EVALUATORS
from kdcache.metrics.tables import Table, iou_listing, markdown_table, percent
from kdcache.tasks import SEGMENTATION

NOT_SHARED = "not shared"


@dataclass(frozen=True)
class OnDataSet:
    """The metrics of a model on one data set, for the classes that both have.

    Attributes:
        missing: classes of the model that the data lack, so its metrics have no rows for them.
        void: classes of the data that the model lacks. Their pixels are void.
    """

    data: str
    split: str
    metrics: TaskMetrics
    missing: tuple[str, ...] = ()
    void: tuple[str, ...] = ()

    @classmethod
    def of(cls, split: Split, metrics: TaskMetrics) -> "OnDataSet":
        """Return the metrics of a pass over `split`, made by `classes_by_name`, without classes that it lacks."""
        if (match := split.match) is None:
            return cls(split.data, split.split, metrics)
        if metrics.segmentation is not None:
            metrics = replace(metrics, segmentation=metrics.segmentation.over(match.shared))
        return cls(split.data, split.split, metrics, match.missing, match.void)

    def to_json(self) -> dict[str, Any]:
        """Return the metrics, and the classes that are not shared, as JSON values."""
        return {"missing_classes": list(self.missing), "void_classes": list(self.void), **self.metrics.to_json()}

    def notes(self) -> Iterator[str]:
        """Yield sentences on classes that are not shared."""
        if self.missing:
            yield f"{self.data} has no {', '.join(self.missing)}: a prediction of these is a miss, and none has a row"
        if self.void:
            yield f"{self.data} has {', '.join(self.void)}, which the model does not know: their pixels are void"


def common_classes(results: Sequence[OnDataSet]) -> tuple[str, ...]:
    """Return the classes with an IoU on every data set with segmentation labels, in the order of the first."""
    ious = [_ious(one) for _, one in _segmented(results)]
    first = ious[0] if ious else {}
    return tuple(name for name in first if not any(math.isnan(iou.get(name, math.nan)) for iou in ious))


def common_mious(results: Sequence[OnDataSet]) -> dict[int, float]:
    """Return the mIoU over `common_classes` by data set number, to compare sets with different classes."""
    names = common_classes(results)
    return {number: mean_of([_ious(one)[name] for name in names]) for number, one in _segmented(results)}


def class_table(results: Sequence[OnDataSet], class_names: Sequence[str]) -> Table:
    """Return IoU in percent, a column per data set: the model's classes, their mean, the mean of common ones."""
    columns = {number: _ious(one) for number, one in _segmented(results)}
    rows = [[name, *(_cell(ious, name) for ious in columns.values())] for name in class_names]
    rows.append(["mIoU", *(percent(one.miou) for _, one in _segmented(results))])
    names = common_classes(results)
    occur = [sum(not math.isnan(iou) for iou in ious.values()) for ious in columns.values()]
    if names and any(count != len(names) for count in occur):
        rows.append([f"mIoU, {len(names)} common", *map(percent, common_mious(results).values())])
    rows.append(["mAcc", *(percent(one.macc) for _, one in _segmented(results))])
    rows.append(["aAcc", *(percent(one.aacc) for _, one in _segmented(results))])
    titles = _titles(results)
    return ["IoU %", *(titles[number] for number in columns)], rows


def figure_table(results: Sequence[OnDataSet], task: str) -> Table:
    """Return the figures of a task, a column per data set with labels of it."""
    found = {number: own for number, one in enumerate(results) if (own := one.metrics.by_task.get(task)) is not None}
    rows = [
        [one.head, *(one.text(getattr(own, name)) for own in found.values())]
        for name, one in EVALUATORS[task].figures.items()
    ]
    titles = _titles(results)
    return [task, *(titles[number] for number in found)], rows


def tables(results: Sequence[OnDataSet], class_names: Sequence[str]) -> list[Table]:
    """Return the table of classes and a table of each other task, each if a data set has such labels."""
    others = (figure_table(results, task) for task in EVALUATORS if task != SEGMENTATION)
    return [table for table in (class_table(results, class_names), *others) if len(table[0]) > 1]


def data_sets_markdown(title: str, results: Sequence[OnDataSet], class_names: Sequence[str]) -> str:
    """Return the tables and the classes that are not shared, as Markdown."""
    notes = [f"- {note}\n" for one in results for note in one.notes()]
    return "\n".join(
        [f"# {title}\n", *(markdown_table(*table) for table in tables(results, class_names)), "".join(notes)]
    )


def listing(results: Sequence[OnDataSet]) -> str:
    """Return `iou_listing` of each data set below its name."""
    titles = _titles(results)
    parts = [f"# {titles[number]}\n{iou_listing(one)}" for number, one in _segmented(results)]
    return "\n".join(parts)


def _segmented(results: Sequence[OnDataSet]) -> Iterator[tuple[int, Metrics]]:
    for number, one in enumerate(results):
        if one.metrics.segmentation is not None:
            yield number, one.metrics.segmentation


def _ious(metrics: Metrics) -> dict[str, float]:
    return dict(zip(metrics.class_names, metrics.iou, strict=True))


def _cell(ious: dict[str, float], name: str) -> str:
    return percent(ious[name]) if name in ious else NOT_SHARED


def _titles(results: Sequence[OnDataSet]) -> list[str]:
    """Return the data sets' names, with their splits."""
    return [f"{one.data}, {one.split}" for one in results]
