"""Whether a model has learnt anything: its scores compared with predictions that ignore the image.

Two predictions need no image: one class everywhere, or every class as often as the model predicts it, but at random
places. The best of the first kind has the share of the largest class, divided by the number of classes, as its mIoU.
The distance to the second is Cohen's kappa, which is 0 at chance and 1 if all pixels are right.
"""

import math

from kdcache.metrics.confusion import Metrics
from kdcache.metrics.tables import percent

_ALONE = 0.999
"""Share of the predicted pixels from which one class is the only one."""
_LEAST_KAPPA = 0.05
"""Pixels are many, but neighbours are alike: below, agreement with the labels may be an accident."""


def at_chance(metrics: Metrics) -> str | None:
    """Return why a model's scores are at chance level, such as "predicts Road alone (mIoU 2.79 %)", or None.

    None means that the scores beat every constant and random prediction, or that fewer than two classes have labels.
    """
    pixels = sum(metrics.label_pixels)
    labelled = sum(count > 0 for count in metrics.label_pixels)
    if labelled < 2 or math.isnan(metrics.miou):
        return None
    largest = max(range(len(metrics.label_pixels)), key=metrics.label_pixels.__getitem__)
    constant = metrics.label_pixels[largest] / pixels / labelled
    predicted = _predicted_shares(metrics)
    alone = max(range(len(predicted)), key=predicted.__getitem__)
    kappa = _kappa(metrics, predicted)
    if metrics.miou > constant * (1 + 1e-9) and kappa > _LEAST_KAPPA:
        return None
    if predicted[alone] >= _ALONE:
        return f"predicts {metrics.class_names[alone]} alone (mIoU {percent(metrics.miou)} %)"
    if metrics.miou > constant:
        return (
            f"is at chance: its classes lie as if at random places (mIoU {percent(metrics.miou)} %, kappa {kappa:.2f})"
        )
    name = metrics.class_names[largest]
    return f"is at chance: mIoU {percent(metrics.miou)} %, and {name} everywhere would have {percent(constant)} %"


def _predicted_shares(metrics: Metrics) -> list[float]:
    """Return each class's share in the prediction, from IoU = hits / (labelled + predicted - hits), or 0."""
    pixels = sum(metrics.label_pixels)
    shares = []
    for iou, acc, count in zip(metrics.iou, metrics.acc, metrics.label_pixels, strict=True):
        hits = 0.0 if math.isnan(acc) else acc * count
        shares.append((hits / iou - count + hits) / pixels if hits else 0.0)
    return shares


def _kappa(metrics: Metrics, predicted: list[float]) -> float:
    """Return Cohen's kappa, or its largest possible value if classes are predicted without a hit."""
    pixels = sum(metrics.label_pixels)
    by_chance = sum(share * count / pixels for share, count in zip(predicted, metrics.label_pixels, strict=True))
    return (metrics.aacc - by_chance) / max(1 - by_chance, 1e-12)
