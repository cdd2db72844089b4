"""The score of each image, and which images are shown: the best, the worst, or those that are named.

IoU of one image is that of its own confusion matrix; its mIoU is the mean over the classes that are in its label or in
its prediction, void left out. The mean of these over images is not the mIoU of the set, which has one matrix over
all images, and is never called so.
"""

import math
import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from kdcache.analysis.groups import nearest
from kdcache.analysis.spread import plain
from kdcache.data import Split
from kdcache.errors import DataError, RecipeError
from kdcache.metrics.confusion import ConfusionMatrix, Metrics
from kdcache.metrics.evaluate import Progress
from kdcache.metrics.predictions import Predicted, predictions
from kdcache.models import SegmentationModel
from kdcache.settings.shared import JudgeSettings


@dataclass(frozen=True)
class ImageScore:
    """One image: `number` in its split, mIoU and IoU per class; NaN where there is nothing to score."""

    number: int
    sample: str
    miou: float
    iou: tuple[float, ...]

    def score(self, ranked_class: int | None) -> float:
        """The score that images are ranked by: mIoU, or the IoU of one class."""
        return self.miou if ranked_class is None else self.iou[ranked_class]


@dataclass(frozen=True)
class ImageScores:
    """All labelled images of a split, and the matrix over them. Memory: 8 bytes per image and class."""

    images: tuple[ImageScore, ...]
    confusion: ConfusionMatrix

    @property
    def metrics(self) -> Metrics:
        return self.confusion.metrics()

    def known(self, ranked_class: int | None = None) -> list[float]:
        """Scores without NaN, in the order of the split."""
        return [score for image in self.images if not math.isnan(score := image.score(ranked_class))]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.metrics.to_json(),
            "images": [
                {"sample": image.sample, "miou": plain(image.miou), "iou": list(map(plain, image.iou))}
                for image in self.images
            ],
        }


def score_images(
    model: SegmentationModel,
    split: Split,
    size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = JudgeSettings.batch_size,
    progress: Progress | None = None,
) -> ImageScores:
    """One pass over the labelled images.

    Raises: DataError when nothing is labelled or an image cannot be read.
    """
    labelled = [number for number in range(len(split)) if split.has_label(number)]
    if not labelled:
        raise DataError(
            "images are scored by their labels",
            received=f"{split.data}, split {split.split!r}: none of {len(split)} images has one",
            remedy="give a labelled split with --split",
        )
    total = ConfusionMatrix(split.classes.names)
    images: list[ImageScore] = []
    batches = predictions(model, split, labelled, size, device=device, batch_size=batch_size)
    with closing(batches):
        for batch in batches:
            images += [_score(prediction, split, total) for prediction in batch]
            if progress is not None:
                progress(len(images), len(labelled))
    return ImageScores(tuple(images), total)


def ranked(scores: Sequence[ImageScores], ranked_class: int | None = None) -> list[tuple[int, float]]:
    """(position in `images`, score), the best first; of several models the mean, where all have a score.

    Equal scores keep the order of the split.
    """
    rows = zip(*([image.score(ranked_class) for image in of_model.images] for of_model in scores), strict=True)
    means = [(position, statistics.fmean(row)) for position, row in enumerate(rows)]
    scored = [(position, mean) for position, mean in means if not math.isnan(mean)]
    return sorted(scored, key=lambda pair: -pair[1])


def best_and_worst(ranking: Sequence[tuple[int, float]], best: int, worst: int) -> tuple[list[int], list[int]]:
    """Positions of the best (best first) and the worst (worst first); no image is both."""
    upper = min(best, max(len(ranking) - worst, -(-len(ranking) // 2)))
    lower = min(worst, len(ranking) - upper)
    positions = [position for position, _ in ranking]
    return positions[:upper], positions[::-1][:lower]


def class_number(split: Split, name: str) -> int:
    """The number of a class by its name. Raises: RecipeError for an unknown class, with the nearest name."""
    if name not in split.classes.names:
        raise RecipeError(
            "--class is one of the data's classes", received=repr(name), remedy=nearest(name, split.classes.names)
        )
    return split.classes.names.index(name)


def sample_numbers(split: Split, ids: Sequence[str]) -> list[int]:
    """Numbers of samples by their ids. Raises: RecipeError for unknown ids, and for samples without a label."""
    places = {sample: number for number, sample in enumerate(split.ids)}
    for sample in ids:
        if sample not in places:
            raise RecipeError(
                "--ids are samples of the split",
                received=f"{sample!r} in {split.data}, split {split.split!r}",
                remedy=nearest(sample, split.ids),
            )
        if not split.has_label(places[sample]):
            raise RecipeError(
                "images are scored by their labels", received=f"{sample!r} has none", remedy="leave it out of --ids"
            )
    return list(dict.fromkeys(places[sample] for sample in ids))


def _score(prediction: Predicted, split: Split, total: ConfusionMatrix) -> ImageScore:
    own = ConfusionMatrix(split.classes.names)
    own.update(prediction.argmax, prediction.label)
    total.counts += own.counts
    if not own.counts.any():  # nothing but void
        nothing = (math.nan,) * len(split.classes)
        return ImageScore(prediction.number, split.ids[prediction.number], math.nan, nothing)
    metrics = own.metrics()
    return ImageScore(prediction.number, split.ids[prediction.number], metrics.miou, metrics.iou)
