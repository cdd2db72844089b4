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
    """The metrics of a model on one data set, over the classes that model and data share.

    Attributes:
        data, split: the data set and its split, as the user named them.
        missing: the model's classes that the data do not have. The metrics leave them out.
        void: the data's classes that the model does not have. Their pixels count as void.
    """

    data: str
    split: str
    metrics: TaskMetrics
    missing: tuple[str, ...] = ()
    void: tuple[str, ...] = ()

    @classmethod
    def of(cls, split: Split, metrics: TaskMetrics) -> "OnDataSet":
        """Return the result of an evaluation on `split`, without the classes that the data do not have.

        `metrics` are the metrics over all of the model's classes.
        """
        if (match := split.match) is None:
            return cls(split.data, split.split, metrics)
        if metrics.segmentation is not None:
            metrics = replace(metrics, segmentation=metrics.segmentation.over(match.shared))
        return cls(split.data, split.split, metrics, match.missing, match.void)

    def to_json(self) -> dict[str, Any]:
        """Return the metrics, and the class names that only the model or only the data have, as JSON values."""
        return {"missing_classes": list(self.missing), "void_classes": list(self.void), **self.metrics.to_json()}

    def notes(self) -> Iterator[str]:
        """Yield a sentence for the classes that only the model has, and one for the classes that only the data have."""
        if self.missing:
            yield f"{self.data} has no {', '.join(self.missing)}: a prediction of these is a miss, and none has a row"
        if self.void:
            yield f"{self.data} has {', '.join(self.void)}, which the model does not know: their pixels are void"


def common_classes(results: Sequence[OnDataSet]) -> tuple[str, ...]:
    """Return the names of the classes that have an IoU on every data set with segmentation labels."""
    ious = [_ious(metrics) for _, metrics in _segmented(results)]
    first = ious[0] if ious else {}
    return tuple(name for name in first if not any(math.isnan(iou.get(name, math.nan)) for iou in ious))


def common_mious(results: Sequence[OnDataSet]) -> dict[int, float]:
    """Return each data set's mIoU (0 to 1) over the classes that have an IoU on all data sets.

    This mIoU compares data sets with different classes. Data sets without segmentation labels are left out.

    Returns: index of the data set in `results` -> mIoU.
    """
    names = common_classes(results)
    return {number: mean_of([_ious(metrics)[name] for name in names]) for number, metrics in _segmented(results)}


def class_table(results: Sequence[OnDataSet], class_names: Sequence[str]) -> Table:
    """Return a table of IoU in percent: a row for each of `class_names` and a column for each data set.

    More rows follow: mIoU, mIoU over the common classes if it differs, mAcc and aAcc.
    """
    columns = {number: _ious(metrics) for number, metrics in _segmented(results)}
    rows = [[name, *(_cell(ious, name) for ious in columns.values())] for name in class_names]
    rows.append(["mIoU", *(percent(metrics.miou) for _, metrics in _segmented(results))])
    names = common_classes(results)
    occur = [sum(not math.isnan(iou) for iou in ious.values()) for ious in columns.values()]
    if names and any(count != len(names) for count in occur):
        rows.append([f"mIoU, {len(names)} common", *map(percent, common_mious(results).values())])
    rows.append(["mAcc", *(percent(metrics.macc) for _, metrics in _segmented(results))])
    rows.append(["aAcc", *(percent(metrics.aacc) for _, metrics in _segmented(results))])
    titles = _titles(results)
    return ["IoU %", *(titles[number] for number in columns)], rows


def figure_table(results: Sequence[OnDataSet], task: str) -> Table:
    """Return a table of a numeric task's metrics: a row for each metric, a column for each data set.

    Data sets on which the task was not evaluated are left out. `task` is the task's name, such as `depth`.
    """
    found = {
        number: metrics
        for number, result in enumerate(results)
        if (metrics := result.metrics.by_task.get(task)) is not None
    }
    rows = [
        [figure.head, *(figure.text(getattr(metrics, name)) for metrics in found.values())]
        for name, figure in EVALUATORS[task].figures.items()
    ]
    titles = _titles(results)
    return [task, *(titles[number] for number in found)], rows


def tables(results: Sequence[OnDataSet], class_names: Sequence[str]) -> list[Table]:
    """Return the tables of a model's scores on several data sets. A task without scores on any data set has no table.

    The first table is `class_table`, with the IoU of `class_names`. Each numeric task follows, with its `figure_table`.
    `results` has the scores on each data set.
    """
    others = (figure_table(results, task) for task in EVALUATORS if task != SEGMENTATION)
    return [table for table in (class_table(results, class_names), *others) if len(table[0]) > 1]


def data_sets_markdown(title: str, results: Sequence[OnDataSet], class_names: Sequence[str]) -> str:
    """Return an evaluation on several data sets as Markdown.

    After the title come a table with the IoU of each class on each data set, and a table of the figures of depth. A
    table without data sets is left out. Notes name the classes that model and data do not share.

    Args:
        title: text of the heading.
        results: the evaluation on each data set.
        class_names: the classes that have a row in the table of IoU.
    """
    notes = [f"- {note}\n" for result in results for note in result.notes()]
    return "\n".join(
        [f"# {title}\n", *(markdown_table(*table) for table in tables(results, class_names)), "".join(notes)]
    )


def listing(results: Sequence[OnDataSet]) -> str:
    """Return the class IoUs of each data set as plain text: its name, a line for each class, and the mIoU, in percent.

    Data sets without an evaluation of segmentation are left out. `results` has the evaluation on each data set.
    """
    titles = _titles(results)
    parts = [f"# {titles[number]}\n{iou_listing(metrics)}" for number, metrics in _segmented(results)]
    return "\n".join(parts)


def _segmented(results: Sequence[OnDataSet]) -> Iterator[tuple[int, Metrics]]:
    for number, result in enumerate(results):
        if result.metrics.segmentation is not None:
            yield number, result.metrics.segmentation


def _ious(metrics: Metrics) -> dict[str, float]:
    return dict(zip(metrics.class_names, metrics.iou, strict=True))


def _cell(ious: dict[str, float], name: str) -> str:
    return percent(ious[name]) if name in ious else NOT_SHARED


def _titles(results: Sequence[OnDataSet]) -> list[str]:
    """Return the data sets' names, with their splits."""
    return [f"{result.data}, {result.split}" for result in results]
