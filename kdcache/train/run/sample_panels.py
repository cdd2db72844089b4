"""Pictures of the same few validation samples, for loggers: image, ground truth, prediction and errors side by side."""

from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch

from kdcache.data import DEPTH, Split
from kdcache.metrics.depth_figures import DepthMap, bar_end
from kdcache.metrics.figures import Array, colour_ids, error_colour, mark_wrong
from kdcache.metrics.predictions import Predicted, judged_tasks, predictions
from kdcache.models import SegmentationModel

SAMPLES = 4
_GAP = 4
"""White pixels between two pictures."""


def sample_panels(
    model: SegmentationModel, split: Split, size: tuple[int, int], device: torch.device
) -> Callable[[], dict[str, Array]]:
    """A function that predicts four samples, evenly spread over a split, with the weights as they are then.

    Args:
        size: (H, W) of the pixels that the model sees, and of each picture.
    Returns: of it, by sample and task uint8 (H, W', 3): image, ground truth, prediction and, of classes, errors. It
        draws no random number and leaves the model as it was.
    """
    numbers = np.unique(np.linspace(0, len(split) - 1, min(SAMPLES, len(split))).round().astype(int)).tolist()
    tasks = judged_tasks(model, split)

    def draw() -> dict[str, Array]:
        batches = predictions(
            model, split, numbers, size, tasks=tasks, device=device, batch_size=1, at_size=True, threads=0
        )
        panels = {}
        with closing(batches):
            for batch in batches:
                for own in batch:
                    for task in tasks:
                        panels[f"{split.ids[own.number]}/{task}"] = _panel(split, own, task, size)
        return panels

    return draw


def _panel(split: Split, own: Predicted, task: str, size: tuple[int, int]) -> Array:
    pixels = _resized(split.image(own.number), size)
    answer, label = own.answers[task].numpy(), own.labels[task].numpy() if task in own.labels else None
    if task == DEPTH:
        high = bar_end([answer] if label is None else [label, answer])
        pictures = [pixels, *(DepthMap(metres, high).rgb() for metres in (label, answer) if metres is not None)]
    else:
        colours = split.classes.colours
        pictures = [pixels, *(colour_ids(ids, colours) for ids in (label, answer) if ids is not None)]
        if label is not None:
            pictures.append(mark_wrong(pixels, label, answer, error_colour(colours)))
    gap = np.full((size[0], _GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)


def _resized(pixels_HW3: Array, size: tuple[int, int]) -> Array:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels_HW3).resize((size[1], size[0]), Image.Resampling.LANCZOS))
