"""The audit as pictures: a folder of PNG files, and report.json with the same numbers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.data import IGNORE_INDEX
from kdcache.files import check_own_folder, replacing_in
from kdcache.metrics import percent
from kdcache.metrics.figures import (
    INK,
    VOID_RGB,
    class_bars,
    colour_ids,
    draw_confusion,
    dress,
    error_colour,
    file_part,
    mark_wrong,
    new_figure,
    panels,
    save_figure,
)
from kdcache.store import Records
from kdcache.teacher.audit.audit import THRESHOLDS, Audit, Scored
from kdcache.teacher.audit.first_views import read_whole
from kdcache.teacher.audit.store_audit import StoreAudit
from kdcache.teacher.audit.topk_error import TEMPERATURES
from kdcache.teacher.audit.value_figures import SAMPLES, write_regression

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.json"
_WORST = "worst"
_PICTURES = ("pseudo-labels.png", "gradient.png", "classes.png", "calibration.png", "confusion.png", "depth.png")
_LINES = ("#1b6ca8", "#d1661f", "#3a8a4d")


def check_report_folder(folder: Path) -> None:
    """Check that a folder is new, empty, or holds an earlier report.

    Raises: RecipeError if it holds something else.
    """
    check_own_folder(folder, REPORT)


def write_report(whole: StoreAudit, records: Records, folder: Path) -> list[Path]:
    """Write report.json and pictures of the audit `whole` into `folder`, and return the paths of the pictures.

    `records` is the audited cache with its pixels and labels. The files replace an earlier report in `folder`, after
    all pictures are drawn.

    Raises: RecipeError if the folder holds something other than a report.
    """
    check_report_folder(folder)
    with replacing_in(folder, lambda: _earlier(folder)) as drawn:
        written = [] if whole.classes is None else _write_classes(whole.classes, records, drawn)
        for regression in whole.regressions:
            written += write_regression(regression, records, drawn)
        (drawn / REPORT).write_text(json.dumps(whole.to_json(), indent=1) + "\n", encoding="utf-8")
    return [folder / path.relative_to(drawn) for path in written]


def _earlier(folder: Path) -> Iterator[Path]:
    """Yield the pictures of an earlier report."""
    for name in (_WORST, SAMPLES):
        yield from (folder / name).glob("*.png")
    yield from (path for name in _PICTURES if (path := folder / name).is_file())


def _write_classes(audit: Audit, records: Records, folder: Path) -> list[Path]:
    """Draw the segmentation audit, and return the paths of the pictures."""
    figures = {"pseudo-labels.png": _coverage(audit)}
    if audit.gradient.noisy:
        figures["gradient.png"] = _gradient(audit)
    if audit.metrics is not None:
        figures |= {"classes.png": _classes(audit), "calibration.png": _calibration(audit)}
        title = "The teacher's predictions for each label, % of the label's pixels"
        figures["confusion.png"] = draw_confusion(audit.counts, audit.class_names, title)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    written = [folder / name for name in figures]
    for rank, scored in enumerate(audit.worst, 1):
        path = folder / _WORST / f"rank{rank:02}-{file_part(scored.sample)}-miou{scored.miou:.4f}.png"
        save_figure(_worst(audit, records, rank, scored), path)
        written.append(path)
    return written


def _classes(audit: Audit) -> "Figure":
    """Draw IoU and accuracy of every class."""
    assert audit.metrics is not None
    metrics = audit.metrics
    title = (
        f"The teacher on {audit.labelled} labelled images: mIoU {percent(metrics.miou)}, aAcc {percent(metrics.aacc)}"
    )
    figure = new_figure(9, 1.6 + 0.42 * len(audit.class_names), title)
    rows = zip(audit.class_names, audit.class_colours, metrics.iou, metrics.acc, strict=True)
    names, colours, iou, acc = zip(*sorted(rows, key=lambda row: -np.nan_to_num(row[2], nan=-1)), strict=True)
    axes = dress(figure.add_subplot(), "filled: IoU; outlined: share of the label's pixels that is found (Acc)")
    class_bars(axes, names, colours, iou, acc)
    return figure


def _calibration(audit: Audit) -> "Figure":
    """Draw the reliability diagram, and each class's confidence next to its precision."""
    assert audit.calibration is not None
    calibration = audit.calibration
    title = f"How sure the teacher is, and how often it is right: ECE {percent(calibration.ece)} points over 15 bins"
    figure = new_figure(13, max(5.4, 1.6 + 0.42 * len(audit.class_names)), title)
    grid = figure.add_gridspec(2, 2, height_ratios=(4, 1))
    middles = np.array([(part.low + part.high) / 2 for part in calibration.bins])
    width = 0.92 / len(middles)
    accuracy = np.nan_to_num([part.accuracy for part in calibration.bins])
    gaps = np.nan_to_num([part.confidence - part.accuracy for part in calibration.bins])
    axes = dress(
        figure.add_subplot(grid[0, 0]), "Reliability: bars on the diagonal are honest", y="share that is right"
    )
    axes.bar(middles, accuracy, width, color="#1b6ca8", label="right")
    axes.bar(
        middles,
        gaps,
        width,
        bottom=accuracy,
        facecolor="none",
        edgecolor="#d1661f",
        hatch="////",
        label="gap to the confidence",
    )
    axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left", fontsize=9, frameon=False)
    below = dress(figure.add_subplot(grid[1, 0], sharex=axes), "", "confidence", "pixels %")
    below.bar(middles, [100 * part.share for part in calibration.bins], width, color="#8a8a8a")
    names = audit.class_names
    right = dress(
        figure.add_subplot(grid[:, 1]), "filled: right when it predicts this class; outlined: its mean confidence"
    )
    class_bars(right, names, audit.class_colours, calibration.precision, calibration.confidence)
    return figure


def _coverage(audit: Audit) -> "Figure":
    """Draw share and precision of pseudo labels over thresholds, and for each class at 0.7 and 0.9."""
    labelled = audit.metrics is not None
    figure = new_figure(14, max(4.8, 1.6 + 0.42 * len(audit.class_names)), "Pseudo labels: what a threshold keeps")
    left, *others = figure.subplots(1, 3)
    dress(left, "all classes", "least confidence that is kept", "% of pixels")
    left.plot(THRESHOLDS, [100 * x.total_share for x in audit.coverage], "o-", color=_LINES[0], label="pixels kept")
    if labelled:
        right = [100 * x.total_precision for x in audit.coverage]
        left.plot(THRESHOLDS, right, "s-", color=_LINES[1], label="of these, right")
        everything = percent(audit.metrics.aacc) if audit.metrics is not None else ""
        left.set_title(f"all classes; without a threshold {everything} % are right", fontsize=11, color=INK)
    left.set_ylim(None, 100.5)
    left.legend(fontsize=9, frameon=False, loc="lower left")
    for axes, threshold in zip(others, (0.7, 0.9), strict=True):
        coverage = audit.coverage_at(threshold)
        dress(axes, f"at {threshold}: filled kept" + (", outlined right of these, %" if labelled else ", %"))
        class_bars(axes, audit.class_names, audit.class_colours, coverage.shares, coverage.precision)
    others[1].set_yticklabels([])
    return figure


def _gradient(audit: Audit) -> "Figure":
    """Draw the error of the KL gradient over k, for an untrained student and for one near the teacher."""
    gradient = audit.gradient
    title = f"Error of the KL gradient with only k of {len(audit.class_names)} classes kept ({gradient.records} images)"
    figure = new_figure(11, 4.6, title)
    students = (("a student that knows nothing", gradient.uniform), ("a student near its teacher", gradient.noisy))
    for axes, (student, errors) in zip(figure.subplots(1, 2, sharey=True), students, strict=True):
        dress(axes, student, "classes kept, k", "error, % of the gradient's norm")
        for temperature, colour in zip(TEMPERATURES, _LINES, strict=True):
            percents = [100 * row[temperature] for row in errors.values()]
            axes.plot(list(errors), percents, "o-", color=colour, label=f"T = {temperature:g}")
        axes.axhline(5, color=INK, linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(list(errors), [str(k) for k in errors])
        axes.legend(fontsize=9, frameon=False)
    figure.axes[1].set_ylabel("")
    left = figure.axes[0]
    left.text(0.02, 4.8, "5 %, what --top-k auto allows", transform=left.get_yaxis_transform(), va="top", fontsize=8)
    return figure


def _worst(audit: Audit, records: Records, rank: int, scored: Scored) -> "Figure":
    """Draw the image, the label, the prediction, and the pixels where label and prediction differ."""
    prediction = read_whole(records, scored.record, labelled=True)
    assert prediction.label is not None
    pixels, argmax, label = map(
        prediction.of_image, (records.pixels(scored.record), prediction.argmax.numpy(), prediction.label)
    )
    counted = label != IGNORE_INDEX
    wrong = float((argmax != label)[counted].mean())
    colours, red = audit.class_colours, error_colour(audit.class_colours)
    present = sorted({*np.unique(label[counted]).tolist(), *np.unique(argmax).tolist()})
    legend = [(audit.class_names[number], colours[number]) for number in present]
    title = f"{scored.sample}: mIoU {percent(scored.miou)}, number {rank} from the bottom"
    return panels(
        f"{title}; {percent(wrong)} % of pixels wrong",
        [
            ("image", pixels),
            ("label", colour_ids(label, colours)),
            ("the teacher", colour_ids(argmax, colours)),
            ("errors", mark_wrong(pixels, label, argmax, red)),
        ],
        [*legend, ("void", VOID_RGB), ("wrong", red)],
    )
