"""One model's scores as pictures and text: the distribution over images, the confusion matrix, the metrics."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kdcache.analysis.per_image import MIOU, ImageScores, Score, ranked
from kdcache.errors import one_line
from kdcache.metrics.confusion import Metrics
from kdcache.metrics.evaluators import EVALUATORS
from kdcache.metrics.figures import INK, Colours, dress, hex_colours, new_figure
from kdcache.metrics.tables import class_rows, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LISTED = 10


def draw_distribution(scores: ImageScores, colours: Colours, title: str) -> "Figure":
    """Return a figure of two charts: a histogram of the images' mIoU, and the quartiles of IoU for each class.

    `scores` are the scores of each image. `colours` has the RGB colour of each class.
    """
    names = scores.confusion.class_names
    figure = new_figure(13, max(4.8, 1.6 + 0.36 * len(names)), title)
    left, right = figure.subplots(1, 2)
    percentages = 100 * np.array(scores.known())
    dress(left, f"mIoU, {len(percentages)} images", "mIoU %", "images")
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


def draw_scores(scores: ImageScores, score: Score, title: str) -> "Figure":
    """Return a histogram of a score over the images in `scores`, as a figure with lines for the mean and the median.

    `score` is the score to draw, and `title` is the figure's title. Images without this score are left out.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8, 4.8, title)
    values = np.array(scores.known(score))
    axes = dress(figure.add_subplot(), f"{score.name}, {len(values)} images", f"{score.name} {score.unit}", "images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if values.size:
        axes.hist(values, bins=20, color="#1b6ca8", edgecolor="white", linewidth=0.8)
        for value, style, name in ((values.mean(), "-", "mean"), (np.median(values), "--", "median")):
            label = f"{name} {value:.3g} {score.unit}"
            axes.axvline(value, color="#d1661f", linestyle=style, linewidth=1.6, label=label)
        axes.legend(fontsize=9, frameon=False)
    return figure


def metrics_text(scores: ImageScores, about: Sequence[tuple[str, str]], score: Score = MIOU) -> str:
    """Return the metrics of one model as plain text, with the best and the worst images by `score`.

    `about` has pairs (name, value) for the first lines, which say what was evaluated.
    """
    lines = [f"{name + ':':<12} {value}" for name, value in about]
    for task, metrics in scores.by_task.items():
        if isinstance(metrics, Metrics):
            lines += _class_lines(scores)
            continue
        lines += ["", f"{task.capitalize()}: metrics of each image, then the mean of {metrics.counted_images} images"]
        _, (_, rows) = EVALUATORS[task].table(metrics)
        lines += [f"{name:<10} {value:>10}" for name, value in rows]
    order = [scores.images[position] for position, _ in ranked([scores], score)]
    for title, images in (("best", order[:_LISTED]), ("worst", order[::-1][:_LISTED])):
        lines += ["", f"The {title} images by {score.name}, {score.unit}"]
        lines += [f"{score.text(score.of(image)).split()[-2]:>7}  {image.sample}" for image in images]
    return "\n".join(lines) + "\n"


def _class_lines(scores: ImageScores) -> list[str]:
    """Return the figures of segmentation: over all pixels, and image by image."""
    metrics, mious = scores.metrics, scores.known()
    width = max(len(name) for name in (*metrics.class_names, "class"))
    lines = ["", "Over all pixels (one confusion matrix, void left out)"]
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
    return lines


def _having(scores: ImageScores, place: int) -> int:
    """Count the images with a class in their label or prediction."""
    return sum(not math.isnan(image.iou[place]) for image in scores.images)
