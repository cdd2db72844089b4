"""IoU of every class as bars in the class's colour, the teacher as a mark across them."""

import math

from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.report.html import Html, join, number, section, tag
from kdcache.analysis.report.scores import class_scores
from kdcache.analysis.spread import Difference
from kdcache.metrics.tables import percent

_SHOWN = 40
"""Classes before the rest is folded away."""


def classes(comparison: Comparison) -> Html:
    """Section of the bars, the list's order chosen by the reader, and the same as a table."""
    cards = [_card(comparison, place) for place in range(len(comparison.class_names))]
    shown = tag("div", *cards[:_SHOWN], class_="classes")
    rest = None
    if len(cards) > _SHOWN:
        more = tag("summary", f"{len(cards) - _SHOWN} more classes")
        rest = tag("details", more, tag("div", *cards[_SHOWN:], class_="classes"))
    lead = "IoU in percent, bars in the colours of the classes. "
    if any(row.teacher for row in comparison.rows):
        lead += "The upright mark is the teacher. "
    lead += "A difference is to the row's baseline."
    gaps = [gap for row in comparison.rows if not row.teacher for gap in row.class_differences]
    if (comparisons := max((gap.comparisons for gap in gaps), default=1)) > 1:
        lead += f" Its verdict is adjusted by Holm for {comparisons} comparisons."
    return section("classes", "Class by class", _order(), shown, rest, class_scores(comparison), lead=lead)


def class_swatch(colour: tuple[int, int, int]) -> Html:
    """The colour of a class in labels and predictions."""
    return tag("span", class_="swatch", style=f"--colour:{css_colour(colour)}", aria_hidden="true")


def css_colour(colour: tuple[int, int, int]) -> str:
    return "rgb({} {} {})".format(*colour)


def _order() -> Html:
    """Needs the script, so it is hidden until that runs."""
    options = (
        ("place", "as in the data"),
        ("gap", "largest gain first"),
        ("loss", "largest loss first"),
        ("least", "lowest IoU first"),
    )
    words = [tag("option", text, value=value) for value, text in options]
    return tag("p", tag("label", "Order ", tag("select", *words, id="class-order")), class_="controls needs-script")


def _card(comparison: Comparison, place: int) -> Html:
    rows = [row for row in comparison.rows if not row.teacher]
    teachers = [row for row in comparison.rows if row.teacher]
    ious = [row.iou[place].mean for row in rows if not math.isnan(row.iou[place].mean)]
    # Where all are equal none is best.
    top = max(ious) if len(set(ious)) > 1 else math.nan
    colour = comparison.class_colours[place]
    head = tag("h3", class_swatch(colour), comparison.class_names[place], tag("small", _share(comparison, place)))
    marks = [row.iou[place].mean for row in teachers if not math.isnan(row.iou[place].mean)]
    bars = [_bar(row, place, colour, marks, row.iou[place].mean == top) for row in rows]
    bars += [_teacher_line(row, place) for row in teachers]
    gaps = [row.class_differences[place].mean for row in rows if row.class_differences]
    finite_gaps = [gap for gap in gaps if not math.isnan(gap)]
    return tag(
        "article",
        head,
        *bars,
        class_="card class",
        data_place=place,
        data_gap=number(max(finite_gaps), 6) if finite_gaps else None,
        data_loss=number(min(finite_gaps), 6) if finite_gaps else None,
        data_least=number(min(ious), 6) if ious else None,
    )


def _bar(row: Row, place: int, colour: tuple[int, int, int], marks: list[float], best: bool) -> Html:
    value = row.iou[place].mean
    if math.isnan(value):
        track: Html = tag("span", "does not occur", class_="bar-track none")
    else:
        fill = tag("span", class_="fill", style=f"width:{number(100 * value)}%;--colour:{css_colour(colour)}")
        lines = [tag("span", class_="mark", style=f"left:{number(100 * mark)}%") for mark in marks]
        track = tag("span", fill, *lines, class_="bar-track", aria_hidden="true")
    shown = percent(value)
    gap = row.class_differences[place] if row.class_differences else None
    figure = tag("span", tag("strong", shown) if best else shown, class_="value")
    return tag("div", tag("span", row.name, class_="name", title=row.name), track, figure, _gap(gap), class_="bar-line")


def _gap(difference: Difference | None) -> Html:
    if difference is None or math.isnan(difference.mean):
        return tag("span", class_="delta")
    sign = f"{100 * difference.mean:+.1f}".replace("-", "\N{MINUS SIGN}")
    sign = "0.0" if sign[1:] == "0.0" else sign
    sure = difference.verdict == "above noise"
    kind = ("up" if difference.mean > 0 else "down") if sure else "unsure"
    return tag("span", sign, class_=f"delta {kind}", title=f"points to {difference.baseline}: {difference.verdict}")


def _teacher_line(row: Row, place: int) -> Html:
    name = tag("span", row.name, class_="name")
    figure = tag("span", percent(row.iou[place].mean), class_="value")
    return tag(
        "div", name, tag("span", class_="rule"), figure, tag("span", class_="delta"), class_="bar-line teacher-line"
    )


def _share(comparison: Comparison, place: int) -> str:
    """How much of the labelled pixels a class has: what is rare is noisy."""
    pixels = [score.metrics.label_pixels for row in comparison.rows for score in row.runs]
    total = sum(map(sum, pixels))
    if not total:
        return ""
    share = sum(counts[place] for counts in pixels) / total
    return join(
        " ", "no pixel" if share == 0 else f"{100 * share:.1f} % of pixels" if share >= 0.001 else "< 0.1 % of pixels"
    )
