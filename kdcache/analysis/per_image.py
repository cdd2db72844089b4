"""The score of each image, and the choice of the best and the worst images to show.

Depth is scored by each image's rmse in metres. Less is better.
The IoU of one image comes from its own confusion matrix. Its mIoU is the mean over the classes in its label or in its
prediction, without void. The mean over images differs from the mIoU of the set, which has one matrix over all images.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdcache.analysis.statistics import plain
from kdcache.analysis.task_views import VIEWS
from kdcache.data import Split
from kdcache.metrics.confusion import ConfusionMatrix, ImageCounts, Metrics
from kdcache.metrics.evaluate import Progress, accumulate, check_tasks, labelled_images
from kdcache.metrics.evaluators import ClassCounts, TaskMetric
from kdcache.metrics.predictions import Inference
from kdcache.metrics.sliding import Framing
from kdcache.models import SegmentationModel
from kdcache.settings.shared import DepthSettings, JudgeSettings
from kdcache.tasks import DEPTH, SEGMENTATION, TASKS


@dataclass(frozen=True)
class ImageScore:
    """One image: `number` in its split, its score by task, and IoU per class. Both are NaN or absent if unknown."""

    number: int
    sample: str
    scores: Mapping[str, float]
    iou: tuple[float, ...]

    def score(self, task: str = SEGMENTATION) -> float:
        """Return the score in a task, or NaN if there is nothing to score."""
        return self.scores.get(task, math.nan)

    @property
    def miou(self) -> float:
        """The mean IoU over the image's classes."""
        return self.score()


@dataclass(frozen=True)
class Score:
    """The score that ranks images in a task: mIoU, or the rmse of depth (less is better)."""

    task: str = SEGMENTATION

    @property
    def name(self) -> str:
        """Its name."""
        return VIEWS[self.task].score

    @property
    def unit(self) -> str:
        """Its unit, as text."""
        return VIEWS[self.task].unit

    def of(self, image: ImageScore) -> float:
        """Return the score of an image."""
        return image.score(self.task)

    def text(self, value: float) -> str:
        """Return the score with its name and its unit."""
        return f"{self.name} {VIEWS[self.task].score_text(value)} {self.unit}"

    def stem(self, value: float) -> str:
        """Return the score as a part of a file name."""
        return f"{VIEWS[self.task].stem}{value:.4f}"


MIOU, RMSE = Score(), Score(DEPTH)


@dataclass(frozen=True)
class ImageScores:
    """All labelled images of a split, and the metrics over them. Memory: 8 bytes per image and class.

    Attributes:
        confusion: the matrix over all images.
        by_task: the metrics of each judged task.
    """

    images: tuple[ImageScore, ...]
    confusion: ConfusionMatrix
    by_task: Mapping[str, TaskMetric]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The judged tasks."""
        return tuple(self.by_task)

    @property
    def metrics(self) -> Metrics:
        """Segmentation metrics over all images."""
        return self.confusion.metrics()

    def known(self, score: Score = MIOU) -> list[float]:
        """Return the scores other than NaN, in the order of the split."""
        return [value for image in self.images if not math.isnan(value := score.of(image))]

    def to_json(self) -> dict[str, Any]:
        """Return the metrics over the split and of every image as JSON values."""
        own = {task: metrics.to_json() for task, metrics in self.by_task.items()}
        return {**own.pop(SEGMENTATION, {}), **own, "images": [self._image_json(image) for image in self.images]}

    def _image_json(self, image: ImageScore) -> dict[str, Any]:
        own: dict[str, Any] = {"sample": image.sample}
        for task in self.tasks:
            own[TASKS[task].score] = plain(image.score(task))
            own |= {"iou": list(map(plain, image.iou))} if task == SEGMENTATION else {}
        return own


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
    inference = Inference(size, device, batch_size, framing=framing or Framing())
    found = accumulate(model, split, labelled, inference, tasks, depth=depth, progress=progress)
    by_task = {task: metrics for task, one in found.items() if (metrics := one.result()) is not None}
    scores, counts = dict[str, dict[str, float]](), dict[str, list[float]]()
    for task, metrics in by_task.items():
        own = metrics.images
        assert own is not None
        scores[task] = dict(zip(own.ids, own.scores, strict=True))
        counts |= dict(zip(own.ids, own.iou.tolist(), strict=True)) if isinstance(own, ImageCounts) else {}
    nothing = (math.nan,) * len(split.classes)
    images = [
        ImageScore(
            number,
            sample := split.ids[number],
            {task: own[sample] for task, own in scores.items() if sample in own},
            tuple(counts.get(sample, nothing)),
        )
        for number in labelled
    ]
    of_classes = found.get(SEGMENTATION)
    total = of_classes.confusion if isinstance(of_classes, ClassCounts) else ConfusionMatrix(split.classes.names)
    return ImageScores(tuple(images), total, by_task)


def shared_score(scores: Sequence[ImageScores]) -> Score | None:
    """Return the score that ranks images for several models: mIoU if all have it, else rmse, else None."""
    return next((Score(task) for task in TASKS if all(task in one.tasks for one in scores)), None)


def ranked(scores: Sequence[ImageScores], score: Score = MIOU) -> list[tuple[int, float]]:
    """Return (position in `images`, score), the best first. With several models it is the mean score, if all have one.

    Equal scores keep the order of the split.
    """
    rows = zip(*([score.of(image) for image in of_model.images] for of_model in scores), strict=True)
    means = [(position, statistics.fmean(row)) for position, row in enumerate(rows)]
    scored = [(position, mean) for position, mean in means if not math.isnan(mean)]
    return sorted(scored, key=lambda pair: -TASKS[score.task].best(pair[1]))


def best_and_worst(ranking: Sequence[tuple[int, float]], best: int, worst: int) -> tuple[list[int], list[int]]:
    """Return positions of the best (best first) and the worst (worst first). No image is in both."""
    upper = min(best, max(len(ranking) - worst, -(-len(ranking) // 2)))
    lower = min(worst, len(ranking) - upper)
    positions = [position for position, _ in ranking]
    return positions[:upper], positions[::-1][:lower]
