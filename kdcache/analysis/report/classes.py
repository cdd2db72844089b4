"""IoU of every class as bars in the class's colour, the teacher as a mark across them."""

import math
from typing import Any

from markupsafe import Markup

from kdcache.analysis.comparison import Comparison
from kdcache.analysis.report.render import number, render
from kdcache.analysis.report.scores import class_scores

_SHOWN = 24
"""Classes before the rest is folded away."""


def classes(comparison: Comparison) -> Markup:
    """Section of the bars, the list's order chosen by the reader, and the same as a table."""
    gaps = [gap for row in comparison.contestants for gap in row.class_differences]
    return render(
        "classes.html",
        contestants=comparison.contestants,
        teachers=comparison.teachers,
        comparisons=max((gap.comparisons for gap in gaps), default=1),
        cards=[_card(comparison, place) for place in range(len(comparison.class_names))],
        shown=_SHOWN,
        table=class_scores(comparison),
    )


def _card(comparison: Comparison, place: int) -> dict[str, Any]:
    """One class: how much of the labels it has, its best IoU, and what the list is ordered by."""
    rows = comparison.contestants
    ious = [row.iou[place].mean for row in rows if not math.isnan(row.iou[place].mean)]
    differences = [row.class_differences[place].mean for row in rows if row.class_differences]
    gaps = [gap for gap in differences if not math.isnan(gap)]
    orders = {"gap": max(gaps, default=None), "loss": min(gaps, default=None), "least": min(ious, default=None)}
    return {
        "place": place,
        "name": comparison.class_names[place],
        "colour": comparison.class_colours[place],
        "share": _share(comparison, place),
        "best": max(ious) if len(set(ious)) > 1 else None,  # where all are equal none is best
        "orders": {f"data-{key}": None if value is None else number(value, 6) for key, value in orders.items()},
    }


def _share(comparison: Comparison, place: int) -> str:
    """How much of the labelled pixels a class has: what is rare is noisy."""
    pixels = [score.metrics.label_pixels for row in comparison.rows for score in row.runs]
    total = sum(map(sum, pixels))
    if not total:
        return ""
    share = sum(counts[place] for counts in pixels) / total
    return "no pixel" if share == 0 else f"{100 * share:.1f} % of pixels" if share >= 0.001 else "< 0.1 % of pixels"
