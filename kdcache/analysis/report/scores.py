"""The tables: what each row scored, how far it is from its baseline, what it costs; sorted by a click on a column."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.report.html import Child, Html, join, number, points, scroll_box, section, simple_table, tag
from kdcache.analysis.report.summary import verdict
from kdcache.analysis.spread import Difference, Spread
from kdcache.analysis.tables import difference_table, legend, row_name
from kdcache.metrics.tables import percent


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        about: explanation that the header shows when it is pointed at.
        value: what the column is sorted by; NaN is unknown, and stays last.
        cell: what is shown.
        best: whether the best is marked, the largest or the smallest one.
    """

    name: str
    about: str
    value: Callable[[Row], float]
    cell: Callable[[Row], Child]
    best: Callable[[Sequence[float]], float] | None = None


def scores(comparison: Comparison) -> Html:
    """Section of the two tables and of what they mean."""
    notes = tag("ul", *(tag("li", line) for line in legend(comparison)), class_="notes")
    return section(
        "scores",
        "Scores and cost",
        sortable(comparison, _columns(comparison), "Scores, distance to the baseline, cost of one image"),
        _distances(comparison),
        tag("details", tag("summary", "What the columns mean"), notes),
        lead="The best of each column is bold; the teacher stands apart, for it is no contestant. "
        "A click on a column's name sorts by it.",
    )


def _distances(comparison: Comparison) -> Html | None:
    """Both intervals, the correlation of the pairs, p-values: what the verdicts stand on."""
    header, rows = difference_table(comparison)
    if not rows:
        return None
    signed = [
        [name, baseline, *(re.sub(r"-(?=\d)", "\N{MINUS SIGN}", cell) for cell in cells)]
        for name, baseline, *cells in rows
    ]
    table = simple_table("Distance to the baseline, points of mIoU", header, signed)
    return tag("details", tag("summary", "What the verdicts stand on"), table)


def class_scores(comparison: Comparison) -> Html:
    """IoU of every class, a column each."""
    columns = [
        Column(name, f"IoU of {name}, %", value := _iou(place), _shown(value), max)
        for place, name in enumerate(comparison.class_names)
    ]
    columns.append(
        Column("mIoU", "mean over the classes that occur, %", lambda row: row.miou.mean, _spread(_miou), max)
    )
    table = sortable(comparison, columns, "IoU of each class, %", "dense")
    return tag("details", tag("summary", "The same as a table"), table)


def sortable(comparison: Comparison, columns: Sequence[Column], caption: str, class_: str = "") -> Html:
    """A table whose header cells are buttons; without a script it is a table as any other."""
    contestants = [row for row in comparison.rows if not row.teacher]
    teachers = [row for row in comparison.rows if row.teacher]
    tops = [_top(column, contestants) for column in columns]
    head = [
        _header("row", "settings in which the rows differ"),
        *(_header(column.name, column.about) for column in columns),
    ]
    numbers = {id(row): place for place, row in enumerate(comparison.rows)}
    bodies = [
        tag("tbody", *(_line(row, numbers[id(row)], columns, tops) for row in rows), class_=name)
        for rows, name in ((contestants, "contestants"), (teachers, "teachers"))
        if rows
    ]
    table = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", *head)),
        *bodies,
        class_=f"sortable {class_}".strip(),
    )
    return scroll_box(caption, table)


def swatch(place: int, row: Row) -> Html:
    """The colour of a row in all drawings."""
    return tag("span", class_=f"swatch {row_class(place, row)}", aria_hidden="true")


def row_class(place: int, row: Row) -> str:
    """CSS class that gives a row its colour."""
    return "row-teacher" if row.teacher else f"row-{place % 8}"


def _columns(comparison: Comparison) -> list[Column]:
    several = any(len(row.runs) > 1 for row in comparison.rows)
    timed = any(row.cost.latency is not None for row in comparison.rows)
    columns = [
        Column("mIoU %", "mean IoU over the classes that occur", lambda row: row.miou.mean, _spread(_miou), max),
        Column("to baseline", "points of mIoU", _gap, _gap_cell),
        Column("mAcc %", "mean share of a class's pixels that is found", lambda r: r.macc.mean, _spread(_macc), max),
        Column("aAcc %", "share of all pixels that is right", lambda row: row.aacc.mean, _spread(_aacc), max),
        Column("parameters", "of the network", lambda row: row.cost.parameters, _parameters),
        Column("GFLOPs", "of one image, 2 per multiply-add", lambda row: row.cost.flops, _flops),
    ]
    if several:
        explanation = "trainings that differ in seed and fold"
        columns.insert(0, Column("runs", explanation, lambda row: len(row.runs), lambda row: str(len(row.runs))))
    if timed:
        columns.append(Column("ms", "time of one image", _milliseconds, _latency))
    return columns


def _top(column: Column, rows: Sequence[Row]) -> float:
    values = [value for row in rows if not math.isnan(value := column.value(row))]
    # Where all are equal none is best.
    return column.best(values) if column.best is not None and len(set(values)) > 1 else math.nan


def _header(name: str, explanation: str) -> Html:
    button = tag("button", name, tag("span", class_="arrow", aria_hidden="true"), type="button", title=explanation)
    return tag("th", button, scope="col")


def _line(row: Row, place: int, columns: Sequence[Column], tops: Sequence[float]) -> Html:
    name = tag("th", swatch(place, row), row_name(row), scope="row", data_value=place)
    cells = []
    for column, top in zip(columns, tops, strict=True):
        value, shown = column.value(row), column.cell(row)
        best = not row.teacher and value == top
        sort = None if math.isnan(value) else number(value, 9)
        cells.append(tag("td", tag("strong", shown) if best else shown, data_value=sort))
    return tag("tr", name, *cells)


def _miou(row: Row) -> Spread:
    return row.miou


def _macc(row: Row) -> Spread:
    return row.macc


def _aacc(row: Row) -> Spread:
    return row.aacc


def _spread(column: Callable[[Row], Spread]) -> Callable[[Row], Child]:
    def cell(row: Row) -> Child:
        spread = column(row)
        return join(percent(spread.mean), None if math.isnan(spread.std) else tag("small", f" ± {percent(spread.std)}"))

    return cell


def _iou(place: int) -> Callable[[Row], float]:
    return lambda row: row.iou[place].mean


def _shown(value: Callable[[Row], float]) -> Callable[[Row], Child]:
    return lambda row: percent(value(row))


def _gap(row: Row) -> float:
    return math.nan if row.difference is None else row.difference.mean


def _gap_cell(row: Row) -> Child:
    if row.difference is None or math.isnan(row.difference.mean):
        return "baseline" if row.baseline else "-"
    return join(points(row.difference.mean), _interval(row.difference), verdict(row.difference))


def _interval(difference: Difference) -> Html | None:
    if math.isnan(difference.half_width):
        return None
    return tag("small", f" {points(difference.low)} to {points(difference.high)}")


def _parameters(row: Row) -> str:
    return f"{row.cost.parameters / 1e6:.2f} M"


def _flops(row: Row) -> str:
    return f"{row.cost.flops / 1e9:.3f}"


def _milliseconds(row: Row) -> float:
    return math.nan if row.cost.latency is None else row.cost.latency.mean_ms


def _latency(row: Row) -> Child:
    latency = row.cost.latency
    if latency is None:
        return "-"
    spread = None if math.isnan(latency.std_ms) else tag("small", f" ± {latency.std_ms:.2f}")
    return join(f"{latency.mean_ms:.2f}", spread)
