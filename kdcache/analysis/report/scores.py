"""The tables: score, difference to the baseline and cost of each row. A click on a column sorts by it."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.report.render import number, render
from kdcache.analysis.statistics import Difference
from kdcache.analysis.tables import difference_table, interval_spans, legend
from kdcache.analysis.task_views import VIEWS
from kdcache.metrics.tables import percent
from kdcache.tasks import SEGMENTATION


@dataclass(frozen=True)
class Cell:
    """A number in a table of rows (not a cell of a teacher's map).

    Attributes:
        value: the number, by which the column is sorted. NaN is unknown and stays last.
        text: the number as text, or a word in its place.
        small: text in small print after the number: its standard deviation, or the interval of a difference.
        gap: a difference. Its verdict, such as "within noise", is shown after the number. None shows no verdict.
        less: whether smaller values are better.
        best: whether it is the best value of its column.
    """

    value: float
    text: str
    small: str = ""
    gap: Difference | None = None
    less: bool = False
    best: bool = False

    @property
    def sort(self) -> str | None:
        """The value as text for sorting in the page, or None for NaN."""
        return None if math.isnan(self.value) else number(self.value, 9)


@dataclass(frozen=True)
class Column:
    """A column in a table of rows.

    Attributes:
        name: the text of the column's header.
        explanation: text under the mouse pointer.
        cell: function that returns a row's cell.
        ranked: whether to mark the best value.
    """

    name: str
    explanation: str
    cell: Callable[[Row], Cell]
    ranked: bool = False


def scores(comparison: Comparison) -> Markup:
    """Return the HTML of the section with the table of scores, the tables of differences, and their explanations."""
    tables = [(view.title, *difference_table(comparison, task)) for task, view in VIEWS.items()]
    return render(
        "scores.html",
        table=sortable(comparison, _columns(comparison)),
        distances=[(title, header, _with_minus(rows)) for title, header, rows in tables if rows],
        legend=legend(comparison),
    )


def _with_minus(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [
        [name, baseline, *(re.sub(r"-(?=\d)", "\N{MINUS SIGN}", cell) for cell in cells)]
        for name, baseline, *cells in rows
    ]


def class_scores(comparison: Comparison) -> dict[str, Any]:
    """Return the values of the page's sortable table of classes: columns for the IoU of each class, then mIoU."""
    columns = [
        Column(name, f"IoU of {name}, %", _iou(place), ranked=True) for place, name in enumerate(comparison.class_names)
    ]
    columns.append(Column("mIoU", "mean over the classes that occur, %", _figure(SEGMENTATION, "miou"), ranked=True))
    return sortable(comparison, columns)


def sortable(comparison: Comparison, columns: Sequence[Column]) -> dict[str, Any]:
    """Return a sortable table of all rows with the given columns, as the values that the page's template takes.

    "header" has pairs (title, explanation). "bodies" has pairs (name, lines): "contestants" for the compared rows, and
    "teachers". A body without lines is left out. A line is (index of the row, row, list of the row's cells).
    """
    lines = [(place, row, [column.cell(row) for column in columns]) for place, row in enumerate(comparison.rows)]
    for number_of_column, column in enumerate(columns):
        contestants = [cells[number_of_column] for _, row, cells in lines if not row.teacher]
        values = {cell.value for cell in contestants}
        known = [value for value in values if not math.isnan(value)]
        top = (min if any(cell.less for cell in contestants) else max)(known, default=math.nan)
        # Where all are equal none is best.
        ranked = column.ranked and sum(not math.isnan(value) for value in values) > 1
        for _, row, cells in lines:
            cell = cells[number_of_column]
            cells[number_of_column] = replace(cell, best=ranked and not row.teacher and cell.value == top)
    bodies = [
        (name, [line for line in lines if line[1].teacher is teacher])
        for name, teacher in (("contestants", False), ("teachers", True))
    ]
    header = [("row", "settings in which the rows differ"), *((column.name, column.explanation) for column in columns)]
    return {"header": header, "bodies": [(name, body) for name, body in bodies if body]}


def _columns(comparison: Comparison) -> list[Column]:
    columns = [column for task in comparison.tasks for column in _task_columns(comparison, task)]
    columns += [
        Column("parameters", "of the network", _parameters),
        Column("GFLOPs", "of one image, 2 per multiply-add", _flops),
    ]
    if any(len(row.runs) > 1 for row in comparison.rows):
        columns.insert(0, Column("runs", "trainings that differ in seed and fold", _runs))
    if comparison.latency is not None:
        columns.append(Column("ms", "time of one image", _milliseconds))
    return columns


def _iou(place: int) -> Callable[[Row], Cell]:
    return lambda row: Cell(row.iou[place].mean, percent(row.iou[place].mean))


def _task_columns(comparison: Comparison, task: str) -> list[Column]:
    """Return the figures of a task, and the distance of its score to the baseline."""
    view, (seeds, images) = VIEWS[task], interval_spans(comparison, task)
    first, *rest = [
        Column(view.figures[name].head, view.figures[name].about, _figure(task, name), ranked=True)
        for name in view.columns
    ]
    gaps = [Column(f"{view.before}to baseline, over {seeds}", view.spans(seeds), _gap(task))]
    if any(gap is not None and gap.resampled is not None for row in comparison.rows for gap in row.differences(task)):
        explanation = f"of the {view.distance} to the baseline: their 95 % interval over resampled {images}"
        gaps.append(Column(f"{view.before}over {images}", explanation, _resampled(task)))
    return [first, *gaps, *rest]


def _figure(task: str, name: str) -> Callable[[Row], Cell]:
    figure = VIEWS[task].figures[name]

    def cell(row: Row) -> Cell:
        spread = row.spread(task, name)
        small = "" if math.isnan(spread.std) else f"\u00b1 {figure.text(spread.std)}"
        return Cell(spread.mean, figure.text(spread.mean), small, less=figure.less)

    return cell


def signed(gap: float, task: str) -> str:
    """Return a difference of a task's scores as signed text: mIoU 0.012 as "+1.20", in points, and rmse in metres.

    `gap` is the difference, for mIoU in units of 1. NaN gives "-".
    """
    return "-" if math.isnan(gap) else VIEWS[task].gap_text(gap).replace("-", "\N{MINUS SIGN}")


def _gap(task: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        gap, _ = row.differences(task)
        less = VIEWS[task].less
        if gap is None or math.isnan(gap.mean):
            return Cell(math.nan, "baseline" if row.baseline else "-", less=less)
        ends = "" if math.isnan(gap.half_width) else f"{signed(gap.low, task)} to {signed(gap.high, task)}"
        return Cell(gap.mean, signed(gap.mean, task), ends, gap if less else None, less)  # the summary has the verdict

    return cell


def _resampled(task: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        gap, _ = row.differences(task)
        drawn = None if gap is None else gap.resampled
        if drawn is None or math.isnan(drawn.low):
            return Cell(math.nan, "-")
        return Cell(drawn.low, f"{signed(drawn.low, task)} to {signed(drawn.high, task)}")

    return cell


def _runs(row: Row) -> Cell:
    return Cell(len(row.runs), str(len(row.runs)))


def _parameters(row: Row) -> Cell:
    return Cell(row.cost.parameters, f"{row.cost.parameters / 1e6:.2f} M")


def _flops(row: Row) -> Cell:
    return Cell(row.cost.flops, f"{row.cost.flops / 1e9:.3f}")


def _milliseconds(row: Row) -> Cell:
    latency = row.cost.latency
    if latency is None:
        return Cell(math.nan, "-")
    return Cell(
        latency.mean_ms, f"{latency.mean_ms:.2f}", "" if math.isnan(latency.std_ms) else f"\u00b1 {latency.std_ms:.2f}"
    )
