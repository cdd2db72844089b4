"""The score of each image, and the choice of the best and the worst images to show.

Depth is scored by each image's rmse in metres. Less is better.
The IoU of one image comes from its own confusion matrix. Its mIoU is the mean over the classes in its label or in its
prediction, without void. The mean over images differs from the mIoU of the set, which has one matrix over all images.
"""

import math
import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from kdcache.analysis.statistics import plain
from kdcache.data import Split
from kdcache.metrics.confusion import ConfusionMatrix, Metrics
from kdcache.metrics.depth import DepthErrors, DepthMetrics, DepthRange
from kdcache.metrics.evaluate import Progress, check_tasks, labelled_images
from kdcache.metrics.predictions import Predicted, predictions
from kdcache.metrics.sliding import Framing
from kdcache.metrics.tables import depth_figure, percent
from kdcache.models import SegmentationModel
from kdcache.settings.shared import DepthSettings, JudgeSettings
from kdcache.tasks import DEPTH, SEGMENTATION


@dataclass(frozen=True)
class ImageScore:
    """One image: `number` in its split, mIoU, IoU per class, rmse in metres, or NaN if there is nothing to score."""

    number: int
    sample: str
    miou: float
    iou: tuple[float, ...]
    rmse: float = math.nan


@dataclass(frozen=True)
class Score:
    """A score that ranks images: mIoU, or the rmse of depth (less is better)."""

    name: str = "mIoU"
    task: str = SEGMENTATION

    def of(self, image: ImageScore) -> float:
        """Return the score of an image."""
        return image.rmse if self.task == DEPTH else image.miou

    def text(self, value: float) -> str:
        """Return the score with its name and its unit."""
        return f"{self.name} " + (f"{depth_figure('rmse', value)} m" if self.task == DEPTH else f"{percent(value)} %")

    def stem(self, value: float) -> str:
        """Return the score as a part of a file name."""
        return f"{'rmse' if self.task == DEPTH else 'iou'}{value:.4f}"


MIOU, RMSE = Score(), Score("rmse", DEPTH)


@dataclass(frozen=True)
class ImageScores:
    """All labelled images of a split, and the metrics over them. Memory: 8 bytes per image and class.

    Attributes:
        confusion: the matrix over all images. depth: depth metrics, or None if depth is not judged.
        tasks: the judged tasks.
    """

    images: tuple[ImageScore, ...]
    confusion: ConfusionMatrix
    depth: DepthMetrics | None = None
    tasks: tuple[str, ...] = (SEGMENTATION,)

    @property
    def metrics(self) -> Metrics:
        """Segmentation metrics over all images."""
        return self.confusion.metrics()

    def known(self, score: Score = MIOU) -> list[float]:
        """Return the scores other than NaN, in the order of the split."""
        return [value for image in self.images if not math.isnan(value := score.of(image))]

    def to_json(self) -> dict[str, Any]:
        """Return the metrics over the split and of every image as JSON values."""
        classes = self.metrics.to_json() if SEGMENTATION in self.tasks else {}
        depth = {} if self.depth is None else {"depth": self.depth.to_json()}
        return {**classes, **depth, "images": [self._image_json(image) for image in self.images]}

    def _image_json(self, image: ImageScore) -> dict[str, Any]:
        classes = {"miou": plain(image.miou), "iou": list(map(plain, image.iou))} if SEGMENTATION in self.tasks else {}
        return {"sample": image.sample, **classes, **({} if self.depth is None else {"rmse": plain(image.rmse)})}


def score_images(
    model: SegmentationModel,
    split: Split,
    size: tuple[int, int],
    *,
    depth: DepthSettings | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = JudgeSettings.batch_size,
    framing: Framing | None = None,
    progress: Progress | None = None,
) -> ImageScores:
    """Score every image that has a label of a task that the model predicts, in one pass.

    `depth` selects the depth labels that count. `framing` sets how the model sees an image (default: squashed to
    `size`).

    Raises: DataError if nothing is labelled, the model predicts none of the labels, or an image cannot be read.
    """
    labelled = labelled_images(split, split.tasks)
    tasks = check_tasks(model, split)
    total = ConfusionMatrix(split.classes.names)
    errors = DepthErrors(DepthRange.of(model.regressions[DEPTH], depth)) if DEPTH in tasks else None
    images: list[ImageScore] = []
    batches = predictions(
        model, split, labelled, size, tasks=tasks, device=device, batch_size=batch_size, framing=framing
    )
    with closing(batches):
        for batch in batches:
            images += [_score(prediction, split, total, errors) for prediction in batch]
            if progress is not None:
                progress(len(images), len(labelled))
    return ImageScores(tuple(images), total, None if errors is None else errors.metrics(), tasks)


def shared_score(scores: Sequence[ImageScores]) -> Score | None:
    """Return the score that ranks images for several models: mIoU if all have it, else rmse, else None."""
    shared = [score for score in (MIOU, RMSE) if all(score.task in one.tasks for one in scores)]
    return shared[0] if shared else None


def ranked(scores: Sequence[ImageScores], score: Score = MIOU) -> list[tuple[int, float]]:
    """Return (position in `images`, score), the best first. Several models rank by their mean, if all have a score.

    Equal scores keep the order of the split.
    """
    rows = zip(*([score.of(image) for image in of_model.images] for of_model in scores), strict=True)
    means = [(position, statistics.fmean(row)) for position, row in enumerate(rows)]
    scored = [(position, mean) for position, mean in means if not math.isnan(mean)]
    return sorted(scored, key=lambda pair: pair[1] if score.task == DEPTH else -pair[1])


def best_and_worst(ranking: Sequence[tuple[int, float]], best: int, worst: int) -> tuple[list[int], list[int]]:
    """Return positions of the best (best first) and the worst (worst first). No image is in both."""
    upper = min(best, max(len(ranking) - worst, -(-len(ranking) // 2)))
    lower = min(worst, len(ranking) - upper)
    positions = [position for position, _ in ranking]
    return positions[:upper], positions[::-1][:lower]


def _score(prediction: Predicted, split: Split, total: ConfusionMatrix, errors: DepthErrors | None) -> ImageScore:
    """Return the scores of an image, which is added to the matrix and to the errors of depth."""
    sample, rmse = split.ids[prediction.number], math.nan
    if errors is not None and DEPTH in prediction.labels:
        one = DepthErrors(errors.range)
        one.update(prediction.answers[DEPTH], prediction.labels[DEPTH], sample)
        errors.add(one)
        rmse = one.metrics().rmse
    own = ConfusionMatrix(split.classes.names)
    if SEGMENTATION in prediction.labels:
        own.update(prediction.argmax, prediction.label)
        total.counts += own.counts
    if not own.counts.any():  # nothing but void
        nothing = (math.nan,) * len(split.classes)
        return ImageScore(prediction.number, sample, math.nan, nothing, rmse)
    metrics = own.metrics()
    return ImageScore(prediction.number, sample, metrics.miou, metrics.iou, rmse)
