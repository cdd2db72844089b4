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
    """The scores of one image.

    Attributes:
        number: the image's position in the split, from 0.
        sample: the image's id.
        scores: task -> score. A task is missing if the image has no label for it.
        iou: the IoU of each class, NaN if the class is neither in the label nor predicted.
    """

    number: int
    sample: str
    scores: Mapping[str, float]
    iou: tuple[float, ...]

    def score(self, task: str = SEGMENTATION) -> float:
        """Return the image's score in a task: mIoU or rmse. NaN if the image does not have a label for the task."""
        return self.scores.get(task, math.nan)

    @property
    def miou(self) -> float:
        """The mean IoU over the classes in the image, 0 to 1, or NaN if it does not have a label."""
        return self.score()


@dataclass(frozen=True)
class Score:
    """The score that ranks images in a task: mIoU, or the rmse of depth, of which smaller is better."""

    task: str = SEGMENTATION

    @property
    def name(self) -> str:
        """The score's name: "mIoU" or "rmse"."""
        return VIEWS[self.task].score

    @property
    def unit(self) -> str:
        """The score's unit as text: "%" or "m"."""
        return VIEWS[self.task].unit

    def of(self, image: ImageScore) -> float:
        """Return the score of an image, or NaN if it does not have one."""
        return image.score(self.task)

    def text(self, value: float) -> str:
        """Return a value of the score as text, with its name and unit: "mIoU 63.10 %"."""
        return f"{self.name} {VIEWS[self.task].score_text(value)} {self.unit}"

    def stem(self, value: float) -> str:
        """Return a value of the score as a part of a file name: "iou0.6310"."""
        return f"{VIEWS[self.task].stem}{value:.4f}"


MIOU, RMSE = Score(), Score(DEPTH)


@dataclass(frozen=True)
class ImageScores:
    """A model's scores for all labelled images of a split. They take 8 bytes of memory per image and class.

    Attributes:
        images: the scores of each image.
        confusion: the confusion matrix over all images.
        by_task: the metrics over all images, by task.
    """

    images: tuple[ImageScore, ...]
    confusion: ConfusionMatrix
    by_task: Mapping[str, TaskMetric]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the evaluated tasks: "segmentation", "depth" or both."""
        return tuple(self.by_task)

    @property
    def metrics(self) -> Metrics:
        """The segmentation metrics over all images."""
        return self.confusion.metrics()

    def known(self, score: Score = MIOU) -> list[float]:
        """Return the images' values of `score`, in the order of the split. Images without a value are left out."""
        return [value for image in self.images if not math.isnan(value := score.of(image))]

    def to_json(self) -> dict[str, Any]:
        """Return the metrics over all images, and the scores of each image, as JSON values."""
        metrics_of = {task: metrics.to_json() for task, metrics in self.by_task.items()}
        return {
            **metrics_of.pop(SEGMENTATION, {}),
            **metrics_of,
            "images": [self._image_json(image) for image in self.images],
        }

    def _image_json(self, image: ImageScore) -> dict[str, Any]:
        values: dict[str, Any] = {"sample": image.sample}
        for task in self.tasks:
            values[TASKS[task].score] = plain(image.score(task))
            values |= {"iou": list(map(plain, image.iou))} if task == SEGMENTATION else {}
        return values


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
    """Return the scores of every labelled image of a split, for each task that the model predicts, in one pass.

    Args:
        model: the model, on `device`.
        split: the images.
        size: (H, W) of the model's input, in pixels.
        depth: the depth labels that count. None takes the defaults.
        device: such as "cpu" or "cuda".
        batch_size: images per forward pass.
        framing: how an image is fitted to `size`, or cut into windows. None squashes the image to `size`.
        progress: called after each batch with (images done, images in total).
    Raises: DataError if no label fits the model's tasks, or if an image cannot be read.
    """
    labelled = labelled_images(split, split.tasks)
    tasks = check_tasks(model, split)
    inference = Inference(size, device, batch_size, framing=framing or Framing())
    found = accumulate(model, split, labelled, inference, tasks, depth=depth, progress=progress)
    by_task = {task: metrics for task, accumulator in found.items() if (metrics := accumulator.result()) is not None}
    scores, counts = dict[str, dict[str, float]](), dict[str, list[float]]()
    for task, metrics in by_task.items():
        images_of = metrics.images
        assert images_of is not None
        scores[task] = dict(zip(images_of.ids, images_of.scores, strict=True))
        counts |= (
            dict(zip(images_of.ids, images_of.iou.tolist(), strict=True)) if isinstance(images_of, ImageCounts) else {}
        )
    nothing = (math.nan,) * len(split.classes)
    images = [
        ImageScore(
            number,
            sample := split.ids[number],
            {task: images_of[sample] for task, images_of in scores.items() if sample in images_of},
            tuple(counts.get(sample, nothing)),
        )
        for number in labelled
    ]
    of_classes = found.get(SEGMENTATION)
    total = of_classes.confusion if isinstance(of_classes, ClassCounts) else ConfusionMatrix(split.classes.names)
    return ImageScores(tuple(images), total, by_task)


def shared_score(scores: Sequence[ImageScores]) -> Score | None:
    """Return the score by which images can be ranked for several models, or None if they share no score.

    It is mIoU if all models have it, else the rmse of depth if all models have that.
    """
    return next((Score(task) for task in TASKS if all(task in of_model.tasks for of_model in scores)), None)


def ranked(scores: Sequence[ImageScores], score: Score = MIOU) -> list[tuple[int, float]]:
    """Return pairs (position in `ImageScores.images`, score), the best image first.

    With several models, the score is the mean over them. An image is left out if any model has no score for it. Images
    with equal scores keep the order of the split.
    """
    rows = zip(*([score.of(image) for image in of_model.images] for of_model in scores), strict=True)
    means = [(position, statistics.fmean(row)) for position, row in enumerate(rows)]
    scored = [(position, mean) for position, mean in means if not math.isnan(mean)]
    return sorted(scored, key=lambda pair: -TASKS[score.task].best(pair[1]))


def best_and_worst(ranking: Sequence[tuple[int, float]], best: int, worst: int) -> tuple[list[int], list[int]]:
    """Return positions of the best images (best first) and of the worst images (worst first), without overlap.

    Args:
        ranking: pairs (position, score), the best image first, as `ranked` returns them.
        best: the largest number of best images. With fewer than `best` + `worst` images, each list gets half of them,
            or more if the other list needs less.
        worst: the largest number of worst images.
    """
    upper = min(best, max(len(ranking) - worst, -(-len(ranking) // 2)))
    lower = min(worst, len(ranking) - upper)
    positions = [position for position, _ in ranking]
    return positions[:upper], positions[::-1][:lower]
