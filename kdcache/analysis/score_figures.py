"""One model's scores as pictures and text: the spread over images, the confusion matrix, the figures."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdcache.analysis.per_image import ImageScores
from kdcache.errors import one_line
from kdcache.metrics.figures import INK, Colours, dress, hex_colours, new_figure
from kdcache.metrics.tables import class_rows, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LISTED = 10


def draw_distribution(scores: ImageScores, colours: Colours, title: str, ranked_class: int | None = None) -> "Figure":
    """How the score is spread over images, and the quartiles of every class."""
    names = scores.confusion.class_names
    figure = new_figure(13, max(4.8, 1.6 + 0.36 * len(names)), title)
    left, right = figure.subplots(1, 2)
    percentages = 100 * np.array(scores.known(ranked_class))
    what = "mIoU" if ranked_class is None else f"IoU of {names[ranked_class]}"
    dress(left, f"{what}, {len(percentages)} images", f"{what} %", "images")
    left.hist(percentages, bins=np.linspace(0, 100, 21), color="#1b6ca8", edgecolor="white", linewidth=0.8)
    left.set_xlim(0, 100)
    left.yaxis.get_major_locator().set_params(integer=True)
    if percentages.size:
        for value, style, name in ((percentages.mean(), "-", "mean"), (np.median(percentages), "--", "median")):
            left.axvline(value, color="#d1661f", linestyle=style, linewidth=1.6, label=f"{name} {value:.1f}")
        left.legend(fontsize=9, frameon=False)
    dress(right, "per class: median, quartiles, least and most (images that have it)", "IoU %")
    for place, colour in enumerate(hex_colours(colours)):
        values = [100 * image.iou[place] for image in scores.images if not math.isnan(image.iou[place])]
        if not values:
            right.text(1, place, "in no image", va="center", fontsize=8, color=INK)
            continue
        least, first, middle, third, most = np.percentile(values, (0, 25, 50, 75, 100))
        right.plot([least, most], [place, place], color="#b0b0b0", linewidth=1)
        right.barh(place, third - first, 0.56, left=first, color=colour, edgecolor=INK, linewidth=0.6)
        right.plot([middle, middle], [place - 0.28, place + 0.28], color="white", linewidth=4, solid_capstyle="butt")
        right.plot([middle, middle], [place - 0.28, place + 0.28], color=INK, linewidth=2, solid_capstyle="butt")
    labels = [f"{one_line(name)} ({_having(scores, place)})" for place, name in enumerate(names)]
    right.set_yticks(range(len(names)), labels)
    right.set_ylim(len(names) - 0.4, -0.6)
    right.set_xlim(0, 100)
    return figure


def metrics_text(scores: ImageScores, about: Sequence[tuple[str, str]], ranked_class: int | None = None) -> str:
    """The figures of one model as plain text.

    Args:
        about: what was evaluated, as (name, value).
    """
    metrics, mious = scores.metrics, scores.known()
    width = max(len(name) for name in (*metrics.class_names, "class"))
    lines = [f"{name + ':':<12} {value}" for name, value in about]
    lines += ["", "Over all pixels (one confusion matrix, void left out)"]
    lines += [f"mIoU {percent(metrics.miou)} %, mAcc {percent(metrics.macc)} %, aAcc {percent(metrics.aacc)} %", ""]
    lines.append(f"{'class':<{width}}  {'IoU %':>7}  {'Acc %':>7}  {'pixels %':>8}  {'images':>6}")
    for place, (name, iou, acc, share) in enumerate(class_rows(metrics)):
        lines.append(f"{name:<{width}}  {iou:>7}  {acc:>7}  {share:>8}  {_having(scores, place):>6}")
    lines += ["", "Image by image: mean IoU over the classes in the label or the prediction, void left out"]
    unscored = len(scores.images) - len(mious)
    lines.append(f"{len(mious)} images" + (f", {unscored} without a labelled pixel" if unscored else ""))
    if mious:
        spread = statistics.stdev(mious) if len(mious) > 1 else math.nan
        lines.append(
            f"mean {percent(statistics.fmean(mious))} %, median {percent(statistics.median(mious))} %, "
            f"standard deviation {percent(spread)}, least {percent(min(mious))} %, most {percent(max(mious))} %"
        )
    name = "mIoU" if ranked_class is None else f"IoU of {metrics.class_names[ranked_class]}"
    order = sorted(
        (image for image in scores.images if not math.isnan(image.score(ranked_class))),
        key=lambda image: -image.score(ranked_class),
    )
    for title, images in (("best", order[:_LISTED]), ("worst", order[::-1][:_LISTED])):
        lines += ["", f"The {title} images by {name}, %"]
        lines += [f"{percent(image.score(ranked_class)):>7}  {image.sample}" for image in images]
    return "\n".join(lines) + "\n"


def _having(scores: ImageScores, place: int) -> int:
    """Images in whose label or prediction a class is."""
    return sum(not math.isnan(image.iou[place]) for image in scores.images)
