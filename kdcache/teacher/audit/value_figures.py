"""The audit of depth as pictures."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.metrics.depth_figures import DepthMap, absolute_error, bar_end
from kdcache.metrics.figures import INK, dress, file_part, new_figure, panels, save_figure
from kdcache.metrics.tables import depth_figure
from kdcache.store import Records, evenly_spread
from kdcache.teacher.audit.depth_audit import JOINT_BINS, RegressionAudit, depth_label, map_at_view
from kdcache.teacher.audit.first_views import whole_records
from kdcache.teacher.build.render import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = "samples"
_SHOWN = 4  # images of a head without labels
_TEACHER, _LABEL = "#1b6ca8", "#d1661f"


def write_regression(audit: RegressionAudit, records: Records, folder: Path) -> list[Path]:
    """Draw the audit of a numeric head, such as depth, and return the paths of the pictures.

    `records` is the audited cache with its pixels and labels. `folder` then has an overview, NAME.png, and the worst
    images in `worst/`. Without labels, some images are in `samples/`.
    """
    save_figure(_overview(audit), folder / f"{audit.name}.png")
    written = [folder / f"{audit.name}.png"]
    for rank, scored in enumerate(audit.worst, 1):
        title = f"{scored.sample}: rmse {depth_figure('rmse', scored.rmse)} m, number {rank} from the bottom"
        path = folder / "worst" / f"{audit.name}-rank{rank:02}-{file_part(scored.sample)}-rmse{scored.rmse:.4f}.png"
        save_figure(_image(audit, records, scored.record, title), path)
        written.append(path)
    for record in [] if audit.metrics is not None else _some(records):
        path = folder / SAMPLES / f"{audit.name}-{file_part(records.sample(record))}.png"
        save_figure(_image(audit, records, record, records.sample(record)), path)
        written.append(path)
    return written


def _some(records: Records) -> list[int]:
    numbers = whole_records(records.cache)
    return [numbers[place] for place in evenly_spread(len(numbers), _SHOWN)]


def _overview(audit: RegressionAudit) -> "Figure":
    """Draw the distribution of values. With labels, also predictions over labels and the errors by distance."""
    unit = "m" if audit.unit == "m" else audit.unit
    if audit.metrics is None:
        figure = new_figure(7, 4.6, f"The teacher's {audit.name} on {audit.images} images")
        _spread(figure.add_subplot(), audit, unit)
        return figure
    metrics = audit.metrics
    title = (
        f"The teacher's {audit.name} on {metrics.counted_images} labelled images: rmse "
        f"{depth_figure('rmse', metrics.rmse)} m, abs rel {depth_figure('abs_rel', metrics.abs_rel)}, "
        f"\N{GREEK SMALL LETTER DELTA}1 {depth_figure('delta1', metrics.delta1)} %"
    )
    figure = new_figure(15, 5, title)
    left, middle, right = figure.subplots(1, 3)
    _spread(left, audit, unit)
    dress(middle, "predictions by label: share of each label's pixels", "label, m", "the teacher, m")
    shares = audit.joint / np.maximum(audit.joint.sum(1, keepdims=True), 1)
    visible_shares = np.ma.masked_equal(shares.T, 0)
    drawn = middle.imshow(
        visible_shares, origin="lower", extent=(0, audit.high, 0, audit.high), cmap="viridis", interpolation="nearest"
    )
    middle.plot([0, audit.high], [0, audit.high], color=INK, linestyle="--", linewidth=1)
    figure.colorbar(drawn, ax=middle, fraction=0.046, pad=0.02)
    dress(right, "error by distance: filled rmse in m, outlined abs rel in %", "label, m")
    places = np.arange(len(audit.ranges))
    right.bar(places - 0.2, [part.rmse for part in audit.ranges], 0.38, color=_TEACHER)
    right.set_ylabel("rmse, m", fontsize=10)
    beside = right.twinx()
    relative = [100 * part.abs_rel for part in audit.ranges]
    beside.bar(places + 0.2, relative, 0.38, color="none", edgecolor=_LABEL, linewidth=1.4, hatch="////")
    beside.set_ylabel("abs rel, %", fontsize=10)
    names = [
        f"{part.low:g}-{part.high:g}" if math.isfinite(part.high) else f"{part.low:g} and more" for part in audit.ranges
    ]
    total = sum(part.pixels for part in audit.ranges)
    right.set_xticks(
        places, [f"{name}\n{100 * part.pixels / total:.0f} %" for name, part in zip(names, audit.ranges, strict=True)]
    )
    return figure


def _spread(axes: "object", audit: RegressionAudit, unit: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    dress(axes, f"{audit.name}: how values are spread", unit, "% of pixels")
    edges = np.linspace(0, audit.high, JOINT_BINS + 1)
    for counts, colour, name in ((audit.predicted, _TEACHER, "the teacher"), (audit.labels, _LABEL, "labels")):
        if counts.sum():
            axes.stairs(100 * counts / counts.sum(), edges, color=colour, linewidth=1.6, label=name)
    axes.set_xlim(0, audit.high)
    axes.legend(fontsize=9, frameon=False)


def _image(audit: RegressionAudit, records: Records, record: int, title: str) -> "Figure":
    """Draw image and prediction, and with a label also the label and the error."""
    values: Array = map_at_view(records, record, audit.name).numpy()
    pictures: list[tuple[str, Array | DepthMap]] = [("image", records.pixels(record))]
    label = None if audit.metrics is None else depth_label(records, record)
    high = bar_end([values] if label is None else [values, label])
    if label is not None:
        error = absolute_error(values, label)
        pictures.append(("label", DepthMap(label, high)))
    pictures.append(("the teacher", DepthMap(values, high, unit=audit.unit)))
    if label is not None:
        pictures.append(("absolute error", DepthMap(error, bar_end([error]), "error")))
    return panels(title, pictures, [])
