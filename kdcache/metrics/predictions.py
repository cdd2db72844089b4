"""Predictions of a model for samples of a split, for every task that both have, at the size of the labels."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.data import RENDERERS, Split, Window, prefetch, render
from kdcache.metrics.evaluators import EVALUATORS
from kdcache.metrics.sliding import Framing, at_image, slide
from kdcache.models import SegmentationModel
from kdcache.models.native import in_eval_mode
from kdcache.settings.shared import JudgeSettings
from kdcache.tasks import SEGMENTATION, numeric


@dataclass(frozen=True)
class Predicted:
    """The predictions of a model for one sample, with the sample's labels. All maps have the size (H, W) of the labels.

    Attributes:
        number: the sample's position in the split.
        answers: the predictions by task. "segmentation": class ids, uint8. "depth": metres, float32.
        labels: the existing labels by task. "segmentation": uint8, 255 for void. "depth": metres, float32, NaN for
            unknown.
    """

    number: int
    answers: dict[str, Tensor]
    labels: dict[str, Tensor]

    @property
    def argmax(self) -> Tensor:
        """The predicted class ids, uint8 (H, W)."""
        return self.answers[SEGMENTATION]

    @property
    def label(self) -> Tensor:
        """The segmentation label, uint8 (H, W), 255 for void. Raises: KeyError if the sample does not have one."""
        return self.labels[SEGMENTATION]


@dataclass(frozen=True)
class Inference:
    """How a model runs over the images of a split.

    Attributes:
        size: (H, W) of the model's input, in pixels.
        device: such as "cpu" or "cuda".
        batch_size: images per forward pass.
        at_size: whether labels are resized to `size`. If not, predictions are resized to the labels' size.
        threads: threads that decode images.
        framing: how images of another aspect ratio fit into `size`, or the windows that the model sees.
    """

    size: tuple[int, int]
    device: torch.device | str = "cpu"
    batch_size: int = JudgeSettings.batch_size
    at_size: bool = False
    threads: int = 2
    framing: Framing = Framing()


@dataclass(frozen=True)
class _Sample:
    number: int
    pixels: Tensor  # uint8 (H, W, 3), at the run's size, or of the whole image where it is seen in windows
    view: Window | None  # what they show of the image, where that is not the whole of it
    labels: dict[str, Tensor]
    size: tuple[int, int]  # of the labels and of the predictions


def predicted_tasks(model: SegmentationModel) -> tuple[str, ...]:
    """Return the tasks with a trained head that predicts in the unit of the labels, such as depth in metres."""
    return tuple(
        task for task, judge in EVALUATORS.items() if judge.predicted_by(model) and task not in model.untrained
    )


def judged_tasks(model: SegmentationModel, split: Split) -> tuple[str, ...]:
    """Return the tasks that can be judged: the split has labels, and the model a trained head in the labels' unit."""
    return tuple(task for task in predicted_tasks(model) if task in split.tasks)


def predictions(
    model: SegmentationModel,
    split: Split,
    numbers: Sequence[int],
    inference: Inference,
    tasks: Sequence[str] = (SEGMENTATION,),
) -> Generator[list[Predicted], None, None]:
    """Yield the predictions for samples of a split, a batch at a time.

    Raw outputs are resized first. Then raw depth is converted to metres. The model is in eval mode until the generator
    ends or is closed. Then it returns to the mode that it had.

    Args:
        model: the model, on the device of `inference`.
        split: the samples.
        numbers: positions of samples in `split`, in the order of the predictions.
        inference: how the model runs.
        tasks: the tasks to predict, "segmentation" or "depth". Only their labels are read.
    Raises: RecipeError if the model sees images in windows (`inference.framing`) that are larger than an image.
    """
    samples = prefetch(
        lambda index: _load(split, index, inference, tasks),
        numbers,
        threads=inference.threads,
        ahead=4 * inference.batch_size,
    )
    with in_eval_mode(model):
        while batch := list(islice(samples, inference.batch_size)):
            if inference.framing.slides:
                yield [_slide(model, sample, split, tasks, inference) for sample in batch]
            else:
                yield predict_batch(model, batch, inference.size, tasks, inference.device)


@torch.inference_mode()
def _slide(
    model: SegmentationModel,
    sample: _Sample,
    split: Split,
    tasks: Sequence[str],
    inference: Inference,
) -> Predicted:
    outputs = slide(
        model,
        sample.pixels.to(inference.device),
        inference.framing,
        inference.size,
        tuple(tasks),
        batch_size=inference.batch_size,
        name=f"image {split.ids[sample.number]}",
    )
    answers = {task: answer_of(model, task, outputs[task], sample.size).cpu() for task in tasks}
    return Predicted(sample.number, answers, sample.labels)


@torch.inference_mode()
def predict_batch(
    model: SegmentationModel,
    batch: list[_Sample],
    size: tuple[int, int],
    tasks: Sequence[str],
    device: torch.device | str,
) -> list[Predicted]:
    """Return the predictions for a batch of loaded samples, in the same order.

    Args:
        model: the model, on `device`.
        batch: the samples.
        size: (H, W) of the model's input.
        tasks: the tasks to predict, "segmentation" or "depth".
        device: such as "cpu" or "cuda".
    """
    pixels = torch.stack([sample.pixels for sample in batch]).to(device)
    heads = model(model.normalise(pixels)).heads
    return [
        Predicted(
            sample.number,
            {
                task: answer_of(model, task, heads[task][place].float(), sample.size, sample.view, size).cpu()
                for task in tasks
            },
            sample.labels,
        )
        for place, sample in enumerate(batch)
    ]


def answer_of(
    model: SegmentationModel,
    task: str,
    output_Chw: Tensor,
    size: tuple[int, int],
    view: Window | None = None,
    seen: tuple[int, int] | None = None,
) -> Tensor:
    """Return the prediction (H, W) for a task, from a head's output resized to `size`.

    The prediction has class ids, uint8, or numbers in the head's unit.

    Args:
        model: the model.
        task: "segmentation" or "depth".
        output_Chw: the head's output for one image.
        size: (H, W) of the result.
        view: the part of the image that the model saw, in pixels of the image. None is the whole image.
        seen: (H, W) of the model's input. Needed with `view`.
    """
    return EVALUATORS[task].answer(model, at_image(model, output_Chw, size, view, seen))


def _load(split: Split, index: int, inference: Inference, tasks: Sequence[str]) -> _Sample:
    size, at_size, framing = inference.size, inference.at_size, inference.framing
    image = split.image(index)
    image_size = image.shape[0], image.shape[1]
    window, view = Window.full(*image_size), None
    if framing.slides:
        size = framing.scaled(image_size, size)
    elif (part := framing.view(image_size, size)) != window:
        window, view = part, None if at_size else part
    labels: dict[str, Any] = {task: label for task in tasks if (label := split.label(index, task)) is not None}
    pixels, ids = render(image, labels.get(SEGMENTATION), window, flip=False, size=size)
    if at_size:
        labels = {task: _small(task, label, ids, window) for task, label in labels.items()}
    tensors = {task: torch.from_numpy(np.ascontiguousarray(label)) for task, label in labels.items()}
    return _Sample(index, torch.from_numpy(pixels), view, tensors, size if at_size else image_size)


def _small(task: str, label_HW: Any, ids: Any, window: Window) -> Any:
    """Return a label at the size of `ids`, the class ids that were rendered with the image. Numbers never mix."""
    return RENDERERS[task](label_HW, window, flip=False, size=ids.shape) if numeric([task]) else ids
