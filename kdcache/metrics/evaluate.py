"""Evaluate a model on a labelled split, at the labels' own size."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from kdcache.data import IGNORE_INDEX, Split
from kdcache.display import html_table
from kdcache.errors import DataError, RecipeError
from kdcache.metrics.confusion import ConfusionMatrix, Metrics
from kdcache.metrics.depth import DepthMetrics
from kdcache.metrics.evaluators import EVALUATORS, Accumulator, TaskMetric
from kdcache.metrics.predictions import Inference, Predicted, judged_tasks, predicted_tasks, predictions
from kdcache.metrics.sliding import Framing
from kdcache.metrics.tables import markdown_table
from kdcache.models import SegmentationModel
from kdcache.settings.parse import Count
from kdcache.settings.shared import DepthSettings, JudgeSettings
from kdcache.tasks import SEGMENTATION, TASKS, in_metres

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of a model on a split, by task.

    Attributes:
        segmentation, depth: None if the model does not predict this task, or if the split has no labels for it.
    """

    segmentation: Metrics | None = None
    depth: DepthMetrics | None = None

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "TaskMetrics":
        """Return the metrics from the JSON values of `to_json`. Raises: KeyError, TypeError for other content."""
        tasks = content.get("tasks", {SEGMENTATION: content})
        return cls(
            **{task: EVALUATORS[task].metrics.of_json(values) for task, values in tasks.items() if values is not None}
        )

    @property
    def by_task(self) -> dict[str, TaskMetric]:
        """The metrics of each evaluated task, by task: "segmentation", "depth"."""
        return {task: metrics for task in TASKS if (metrics := getattr(self, task)) is not None}

    def __repr__(self) -> str:
        scores = [EVALUATORS[task].words(metrics) for task, metrics in self.by_task.items()]
        return f"<TaskMetrics: {', '.join(scores) or 'nothing judged'}>"

    def _repr_html_(self) -> str:
        rows = [row for task, metrics in self.by_task.items() for row in EVALUATORS[task].rows(metrics)]
        return html_table("Metrics; IoU by class", ("", ""), rows)

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as JSON values.

        With segmentation only, they are the values of `Metrics.to_json`. Otherwise they are {"tasks": {task: values}}.
        """
        by_task = {task: metrics.to_json() for task, metrics in self.by_task.items()}
        return by_task.get(SEGMENTATION, {}) if set(by_task) <= {SEGMENTATION} else {"tasks": by_task}


def metrics_markdown(title: str, metrics: TaskMetrics) -> str:
    """Return an evaluation as Markdown: the title, then a line of results and a table for each task."""
    parts = [f"# {title}\n"]
    for task, of_task in metrics.by_task.items():
        summary, table = EVALUATORS[task].table(of_task)
        parts += [f"{summary}\n", markdown_table(*table)]
    return "\n".join(parts)


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
    """Evaluate a model's segmentation on the labelled samples of a split.

    >>> import kdcache
    >>> model, _ = kdcache.load_run("runs/student")
    >>> metrics = kdcache.evaluate_model(model, kdcache.open_split("streets", "val"), size=(48, 64))
    >>> 0 <= metrics.miou <= 1
    True

    Images are resized to `size`, and logits are upsampled to each label's own size. The result also has each single
    image's pixel counts, in `Metrics.images`.

    Args:
        model: the model, on `device`. It is in eval mode during the evaluation, and returns to its mode afterwards.
        split: the samples.
        size: (H, W) of the model's input, in pixels.
        device: such as `cpu` or `cuda`.
        batch_size: images per forward pass.
        at_size: resize labels to `size` instead, which is faster. Scores then differ from published ones.
        threads: threads that decode images.
        framing: how images of another aspect ratio fit into `size`, or the windows that the model sees. None squashes
            images to `size`.
        progress: called after each batch with (images done, images in total).
    Raises: DataError if nothing is labelled or an image cannot be read. RecipeError for an unknown device.
    """
    try:
        torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"Unknown --device {device!r}", fix="Use cpu or cuda.") from error
    labelled = labelled_images(split, (SEGMENTATION,))
    inference = Inference(size, device, batch_size, at_size, threads, framing or Framing())
    found = accumulate(model, split, labelled, inference, (SEGMENTATION,), progress=progress)
    metrics = found[SEGMENTATION].result()
    assert isinstance(metrics, Metrics)
    return metrics


def count_pixels(
    model: SegmentationModel,
    split: Split,
    inference: Inference,
    *,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> ConfusionMatrix:
    """Return the confusion matrix of a model on the labelled samples of a split.

    Args:
        model: the model, on the device of `inference`.
        split: the samples.
        inference: how the model runs.
        part: (i, n) takes every n-th labelled sample from number i (0 to n - 1), so n processes can share the work.
        progress: called after each batch with (images done, images in total).
    Raises: DataError for a split without segmentation labels.
    """
    mine = labelled_images(split, (SEGMENTATION,))[part[0] :: part[1]]
    confusion = ConfusionMatrix(split.classes.names, IGNORE_INDEX)
    for prediction in _each(predictions(model, split, mine, inference), len(mine), progress):
        confusion.update(prediction.argmax, prediction.label)
    return confusion


def evaluate_tasks(
    model: SegmentationModel,
    split: Split,
    inference: Inference,
    *,
    depth: DepthSettings | None = None,
    progress: Progress | None = None,
) -> TaskMetrics:
    """Evaluate each task that a model predicts and a split has labels for, in one pass.

    The result has the metrics of single images too.

    Args:
        model: the model, on the device of `inference`.
        split: the samples.
        inference: how the model runs.
        depth: the depth labels that count. None takes the defaults.
        progress: called after each batch with (images done, images in total).
    Raises: DataError if there is no such task, if `depth` is set without a task of depth, or if an image cannot be
    read.
    """
    tasks = check_tasks(model, split, depth)
    labelled = labelled_images(split, tasks)
    accumulators = accumulate(model, split, labelled, inference, tasks, depth=depth, progress=progress)
    metrics: dict[str, Any] = {task: accumulator.result() for task, accumulator in accumulators.items()}
    return TaskMetrics(**metrics)


def accumulate(
    model: SegmentationModel,
    split: Split,
    numbers: Sequence[int],
    inference: Inference,
    tasks: Sequence[str],
    *,
    depth: DepthSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, Accumulator]:
    """Run a model on samples of a split, and return task -> an accumulator with the predictions and labels.

    An accumulator's method `result` returns the metrics. Samples without a label for a task do not count in it.

    Args:
        model: the model, on the device of `inference`.
        split: the samples.
        numbers: positions of the samples in `split`.
        inference: how the model runs.
        tasks: the tasks to evaluate.
        depth: the depth labels that count. None takes the defaults.
        progress: called after each batch with (images done, images in total).
    """
    found = {task: EVALUATORS[task].begin(model, split, depth) for task in tasks}
    for prediction in _each(predictions(model, split, numbers, inference, tasks), len(numbers), progress):
        for task, label in prediction.labels.items():
            found[task].update(prediction.answers[task], label, split.ids[prediction.number])
    return found


def _each(
    batches: Generator[list[Predicted], None, None], total: int, progress: Progress | None
) -> Iterator[Predicted]:
    """Yield the predictions of batches, and report every finished batch."""
    done = 0
    with closing(batches):
        for batch in batches:
            yield from batch
            done += len(batch)
            if progress is not None:
                progress(done, total)


def check_tasks(model: SegmentationModel, split: Split, depth: DepthSettings | None = None) -> tuple[str, ...]:
    """Return the tasks to evaluate: those that the model predicts and the split has labels for.

    `depth` has settings for the depth labels that count, or None if the user gave none.

    Raises: DataError if there is no such task, or if `depth` has settings but depth is not evaluated.
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
    if depth not in (None, DepthSettings()) and not in_metres(tasks):
        raise DataError(
            f"Cannot use --min-depth, --max-depth or --depth-crop: {facts}",
            fix="Leave these flags out, or give a model that predicts depth in metres and data with labels of depth.",
        )
    return tasks


def labelled_images(split: Split, tasks: Sequence[str]) -> list[int]:
    """Return the positions of the samples with a label for any of `tasks`. Raises: DataError if there are none."""
    labelled = split.labelled(*tasks)
    if not labelled:
        raise DataError(
            f"Missing labels: none of the {len(split)} images of {split.data}, split {split.split!r}, has one",
            fix="Give a labelled split with --split",
        )
    return labelled
