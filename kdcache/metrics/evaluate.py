"""Evaluate a model on a labelled split, at the labels' own size."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcache.data import IGNORE_INDEX, Split
from kdcache.display import html_table
from kdcache.errors import DataError, RecipeError
from kdcache.metrics.confusion import ConfusionMatrix, ImageCounts, Metrics
from kdcache.metrics.depth import DepthErrors, DepthMetrics, DepthRange
from kdcache.metrics.predictions import Predicted, judged_tasks, predicted_tasks, predictions
from kdcache.metrics.sliding import Framing
from kdcache.models import SegmentationModel
from kdcache.settings.parse import Count
from kdcache.settings.shared import DepthSettings, JudgeSettings
from kdcache.tasks import DEPTH, SEGMENTATION

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TaskMetrics:
    """Metrics of a model on a split by task, or None for tasks that model or labels lack."""

    segmentation: Metrics | None = None
    depth: DepthMetrics | None = None

    def __repr__(self) -> str:
        shown = [] if self.segmentation is None else [f"mIoU {100 * self.segmentation.miou:.2f} %"]
        shown += [] if self.depth is None else [f"depth rmse {self.depth.rmse:.3g} m"]
        return f"<TaskMetrics: {', '.join(shown) or 'nothing judged'}>"

    def _repr_html_(self) -> str:
        rows = []
        if (own := self.segmentation) is not None:
            figures = {"mIoU": own.miou, "mAcc": own.macc, "aAcc": own.aacc}
            figures |= dict(zip(own.class_names, own.iou, strict=True))
            rows += [(name, f"{100 * value:.2f} %") for name, value in figures.items()]
        if self.depth is not None:
            rows += [("depth rmse", f"{self.depth.rmse:.3g} m"), ("depth abs rel", f"{self.depth.abs_rel:.3g}")]
        return html_table("Metrics; IoU by class", ("", ""), rows)

    def to_json(self) -> dict[str, Any]:
        """Return segmentation alone as in `Metrics`, else each task's numbers by name in `tasks`."""
        if self.depth is None:
            return {} if self.segmentation is None else self.segmentation.to_json()
        own = {SEGMENTATION: self.segmentation, DEPTH: self.depth}
        return {"tasks": {task: metrics.to_json() for task, metrics in own.items() if metrics is not None}}


def evaluate_model(
    model: SegmentationModel,
    split: Split,
    size: tuple[Count, Count],
    *,
    device: torch.device | str = "cpu",
    batch_size: Count = JudgeSettings.batch_size,
    at_size: bool = False,
    threads: Count = 2,
    framing: Framing | None = None,
    progress: Progress | None = None,
) -> Metrics:
    """Evaluate `model` on the labelled samples of `split` with one confusion matrix, and counts of every image.

    >>> import kdcache
    >>> model, _ = kdcache.load_run("runs/student")
    >>> metrics = kdcache.evaluate_model(model, kdcache.open_split("streets", "val"), size=(48, 64))
    >>> 0 <= metrics.miou <= 1
    True

    Images are resized to `size`, and logits are upsampled to each label's own size.

    Args:
        model: moved to `device`, and put back into its mode afterwards.
        split: the samples.
        size: (H, W) that the model sees.
        device: such as `cpu` or `cuda`.
        batch_size: images per forward pass.
        at_size: resize labels to `size` instead, which is faster and not comparable with published figures.
        threads: threads that decode images.
        framing: how it sees an image of another shape, or in windows. Default: squashed to `size`.
        progress: called with (images done, images).
    Raises: DataError if nothing is labelled or an image cannot be read. RecipeError for an unknown device.
    """
    try:
        torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"Unknown --device {device!r}", fix="Use cpu or cuda.") from error
    ids, counts = list[str](), list[Tensor]()

    def count_image(prediction: Predicted, own: Tensor) -> None:
        ids.append(split.ids[prediction.number])
        counts.append(own)

    confusion = count_pixels(
        model,
        split,
        size,
        device=device,
        batch_size=batch_size,
        at_size=at_size,
        threads=threads,
        framing=framing,
        progress=progress,
        each=count_image,
    )
    return replace(confusion.metrics(), images=ImageCounts.of(ids, counts))


def count_pixels(
    model: SegmentationModel,
    split: Split,
    size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = JudgeSettings.batch_size,
    at_size: bool = False,
    threads: int = 2,
    framing: Framing | None = None,
    progress: Progress | None = None,
    part: tuple[int, int] = (0, 1),
    each: Callable[[Predicted, Tensor], None] | None = None,
) -> ConfusionMatrix:
    """Return the confusion matrix of `evaluate_model`, which several processes can share and add up.

    `part` (i, n) takes every n-th labelled sample from the i-th on. `each` is called with every prediction and its own
    counts, (C, C).

    Raises: DataError for a split without labels.
    """
    labelled = labelled_images(split, (SEGMENTATION,))
    confusion = ConfusionMatrix(split.classes.names, IGNORE_INDEX)
    mine = labelled[part[0] :: part[1]]
    predicted_batches = predictions(
        model,
        split,
        mine,
        size,
        device=device,
        batch_size=batch_size,
        at_size=at_size,
        threads=threads,
        framing=framing,
    )
    done = 0
    with closing(predicted_batches):
        for batch in predicted_batches:
            for prediction in batch:
                own = confusion.update(prediction.argmax, prediction.label)
                if each is not None:
                    each(prediction, own)
            done += len(batch)
            if progress is not None:
                progress(done, len(mine))
    return confusion


def evaluate_tasks(
    model: SegmentationModel,
    split: Split,
    size: tuple[int, int],
    *,
    depth: DepthSettings | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = JudgeSettings.batch_size,
    at_size: bool = False,
    threads: int = 2,
    framing: Framing | None = None,
    progress: Progress | None = None,
) -> TaskMetrics:
    """Evaluate every task that `model` predicts and `split` has labels of in one pass, with numbers of every image.

    Arguments are as in `evaluate_model`. `depth` selects the depth labels that count. Settings other than the default
    need a task of depth.

    Raises: DataError without a task to judge, for depth settings without depth, and for an image that cannot be read.
    """
    tasks = check_tasks(model, split, depth)
    confusion, ids, counts = ConfusionMatrix(split.classes.names, IGNORE_INDEX), list[str](), list[Tensor]()
    errors = DepthErrors(DepthRange.of(model.regressions[DEPTH], depth)) if DEPTH in tasks else None
    labelled = labelled_images(split, tasks)
    batches = predictions(
        model,
        split,
        labelled,
        size,
        tasks=tasks,
        device=device,
        batch_size=batch_size,
        at_size=at_size,
        threads=threads,
        framing=framing,
    )
    done = 0
    with closing(batches):
        for batch in batches:
            for one in batch:
                sample = split.ids[one.number]
                if SEGMENTATION in one.labels:
                    ids.append(sample)
                    counts.append(confusion.update(one.argmax, one.label))
                if errors is not None and DEPTH in one.labels:
                    errors.update(one.answers[DEPTH], one.labels[DEPTH], sample)
            done += len(batch)
            if progress is not None:
                progress(done, len(labelled))
    segmentation = replace(confusion.metrics(), images=ImageCounts.of(ids, counts)) if ids else None
    return TaskMetrics(segmentation, None if errors is None else _judged(errors, split))


def check_tasks(model: SegmentationModel, split: Split, depth: DepthSettings | None = None) -> tuple[str, ...]:
    """Return the tasks that a model is judged on in a split.

    Raises: DataError without such a task, and for a depth range without depth.
    """
    tasks, where = judged_tasks(model, split), f"{split.data}, split {split.split!r}"
    labels = f"labels of {', '.join(split.tasks)}" if split.tasks else "no labels"
    predicted = ", ".join(predicted_tasks(model)) or "no task that has labels"
    facts = f"{model.spec} predicts {predicted}, and {where} has {labels}"
    if model.untrained:
        facts += f". Its run learnt nothing of {', '.join(model.untrained)}"
    if not tasks:
        raise DataError(
            f"Nothing to judge: {facts}",
            fix="Give a labelled split with --split, or data with labels of " + " or ".join(predicted_tasks(model))
            if predicted_tasks(model)
            else "Use a model with a head of segmentation, or of depth in metres. To teach a "
            "backbone a task: train-student --init RUN",
        )
    if depth not in (None, DepthSettings()) and DEPTH not in tasks:
        raise DataError(
            f"Cannot use --min-depth, --max-depth or --depth-crop: {facts}",
            fix="Leave these flags out, or give a model that predicts depth in metres and data with labels of depth.",
        )
    return tasks


def labelled_images(split: Split, tasks: Sequence[str]) -> list[int]:
    """Return the numbers of samples with a label of any task. Raises: DataError if there are none."""
    labelled = [index for index in range(len(split)) if any(split.has_label(index, task) for task in tasks)]
    if not labelled:
        raise DataError(
            f"Missing labels: none of the {len(split)} images of {split.data}, split {split.split!r}, has one",
            fix="Give a labelled split with --split",
        )
    return labelled


def _judged(errors: DepthErrors, split: Split) -> DepthMetrics:
    """Return the metrics of depth. Raises: DataError where no pixel counts."""
    metrics = errors.metrics()
    if not metrics.counted_images:
        raise DataError(
            f"No label of {split.data}, split {split.split!r}, has depth from {errors.range.min_depth:g} to "
            f"{errors.range.max_depth:g} m" + (" inside the crop" if errors.range.crop != "none" else ""),
            fix="Show the range of the labels with kdcache data check. Then give --min-depth and --max-depth that "
            "fit, or correct the unit in depth.toml",
        )
    return metrics
