"""Metrics as rows for a terminal and as Markdown: percent with two digits, '-' for a class that does not occur."""

import math
from collections.abc import Sequence

from kdcache.errors import one_line
from kdcache.metrics.confusion import Metrics

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def percent(value: float) -> str:
    """Return a fraction (0 to 1) in percent with two decimals, such as "63.10", or "-" for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def class_rows(metrics: Metrics) -> list[tuple[str, str, str, str]]:
    """Return, for each class, its name and three texts in percent: IoU, recall and share of the labelled pixels."""
    total = sum(metrics.label_pixels) or 1
    return [
        (name, percent(iou), percent(acc), percent(pixels / total))
        for name, iou, acc, pixels in zip(
            metrics.class_names, metrics.iou, metrics.acc, metrics.label_pixels, strict=True
        )
    ]


def iou_listing(metrics: Metrics) -> str:
    """Return plain text with a line for each class, `===>road:       65.35`, and the mIoU last, in percent.

    Source: the listing of AdaptSegNet's compute_iou.py (arXiv 1802.10349).
    """
    width = max(12, *(len(name) + 2 for name in metrics.class_names))
    lines = [
        f"===>{one_line(name) + ':':<{width}}{round(100 * iou, 2)}"
        for name, iou in zip(metrics.class_names, metrics.iou, strict=True)
    ]
    return "\n".join([*lines, f"===> mIoU: {round(100 * metrics.miou, 2)}"]) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first column is aligned left, the others right."""
    first, *rest = [
        "| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)
    ]
    return "\n".join([first, "| --- |" + " ---: |" * (len(header) - 1), *rest]) + "\n"


DEPTH_HEADS = {
    "rmse": "rmse m",
    "rmse_log": "rmse log",
    "abs_rel": "abs rel",
    "sq_rel": "sq rel m",
    "silog": "silog",
    "delta1": "\N{GREEK SMALL LETTER DELTA}1 %",
    "delta2": "\N{GREEK SMALL LETTER DELTA}2 %",
    "delta3": "\N{GREEK SMALL LETTER DELTA}3 %",
}
"""Headers of the metrics of depth, by name: with their unit."""


def depth_figure(name: str, value: float) -> str:
    """Return the value of the depth metric `name` as text: deltas in percent, others with four digits, "-" for NaN."""
    if math.isnan(value):
        return "-"
    return percent(value) if name.startswith("delta") else f"{value:#.4g}".rstrip(".")
