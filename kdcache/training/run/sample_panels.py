"""Pictures of a few fixed validation samples for loggers: image, ground truth, prediction and errors."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.data import ClassList, Fit, Split
from kdcache.metrics.depth_figures import DepthMap, bar_end
from kdcache.metrics.figures import Array, colour_ids, error_colour, mark_wrong
from kdcache.metrics.predictions import Inference, Predicted, judged_tasks, predictions
from kdcache.metrics.sliding import Framing
from kdcache.models import SegmentationModel
from kdcache.tasks import DEPTH, SEGMENTATION

SAMPLES = 4
_GAP = 4
"""White pixels between two pictures."""


def sample_panels(
    model: SegmentationModel, split: Split, size: tuple[int, int], device: torch.device, fit: Fit = "squash"
) -> Callable[[], dict[str, Array]]:
    """Return a function that draws pictures of four samples with the model's current predictions.

    The samples are evenly spread over the split.

    Args:
        model: the model. A call leaves it unchanged.
        split: the validation data.
        size: (H, W) of the pixels that the model sees.
        device: where the model is.
        fit: how images with another aspect ratio fill `size`: `squash`, `crop` or `pad`.
    Returns: a function that returns `<sample>/<task>` -> uint8 RGB (H, W', 3): image, ground truth, prediction and, for
        segmentation, errors side by side. If images are not squashed, pictures may be smaller than `size`.
    """
    numbers = np.unique(np.linspace(0, len(split) - 1, min(SAMPLES, len(split))).round().astype(int)).tolist()
    tasks = judged_tasks(model, split)

    inference = Inference(size, device, batch_size=1, at_size=fit == "squash", threads=0, framing=Framing(fit))

    def draw() -> dict[str, Array]:
        panels = {}
        with closing(predictions(model, split, numbers, inference, tasks)) as batches:
            for batch in batches:
                for predicted in batch:
                    for task in tasks:
                        panels[f"{split.ids[predicted.number]}/{task}"] = _panel(split, predicted, task, size, fit)
        return panels

    return draw


def _panel(split: Split, predicted: Predicted, task: str, size: tuple[int, int], fit: Fit) -> Array:
    image = split.image(predicted.number)
    answer, label = (
        predicted.answers[task].numpy(),
        predicted.labels[task].numpy() if task in predicted.labels else None,
    )
    if fit != "squash":  # both have the image's size
        size = Framing("pad", window=(1, 1), whole=size).scaled((image.shape[0], image.shape[1]), size)
        answer, label = _at(answer, size), None if label is None else _at(label, size)
    pixels = _resized(image, size)
    pictures = [pixels, *_DRAWN[task](pixels, answer, label, split.classes)]
    gap = np.full((size[0], _GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)


def _classes(pixels: Array, answer: Array, label: Array | None, classes: ClassList) -> list[Array]:
    """Return the label, the prediction and the errors in the colours of classes."""
    pictures = [colour_ids(ids, classes.colours) for ids in (label, answer) if ids is not None]
    return pictures if label is None else [*pictures, mark_wrong(pixels, label, answer, error_colour(classes.colours))]


def _depths(pixels: Array, answer: Array, label: Array | None, classes: ClassList) -> list[Array]:
    """Return the label and the prediction in the colours of depth, with one scale."""
    maps = [metres for metres in (label, answer) if metres is not None]
    return [DepthMap(metres, bar_end(maps)).rgb() for metres in maps]


_DRAWN = {SEGMENTATION: _classes, DEPTH: _depths}


def _at(values_HW: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Return class ids or metres resized to `size` = (H, W) by the nearest value."""
    rows, columns = (
        ((np.arange(to) + 0.5) * side / to).astype(int) for side, to in zip(values_HW.shape, size, strict=True)
    )
    resized: npt.NDArray[Any] = values_HW[rows[:, None], columns]
    return resized


def _resized(pixels_HW3: Array, size: tuple[int, int]) -> Array:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels_HW3).resize((size[1], size[0]), Image.Resampling.LANCZOS))
