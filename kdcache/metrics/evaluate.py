"""Evaluating a model on a labelled split, at the labels' own size."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from kdcache.data import IGNORE_INDEX, Split, Window, prefetch, render
from kdcache.errors import DataError
from kdcache.metrics.confusion import ConfusionMatrix, ImageCounts, Metrics
from kdcache.models import SegmentationModel
from kdcache.models.native import in_eval_mode
from kdcache.settings.shared import JudgeSettings

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Predicted:
    """The prediction for a sample, by its number in the split: argmax and label, uint8 (H, W) of the label's size."""

    number: int
    argmax: Tensor
    label: Tensor


@dataclass(frozen=True)
class _Sample:
    number: int
    pixels: Tensor  # uint8 (H, W, 3), at the run's size
    label: Tensor  # uint8, at its own size (or the run's, with at_size)


def evaluate_model(
    model: SegmentationModel,
    split: Split,
    size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = JudgeSettings.batch_size,
    at_size: bool = False,
    threads: int = 2,
    progress: Progress | None = None,
) -> Metrics:
    """Metrics of `model` over the labelled samples of `split`, from one confusion matrix; with counts of every image.

    Images are resized to `size`, logits are upsampled to each label's own size (`at_size`: the label is
    resized instead, which is cheaper and not comparable with published figures).

    Args:
        size: (H, W) the model sees.
        progress: called with (images done, images).
    Raises: DataError when nothing is labelled or an image cannot be read.
    """
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
    progress: Progress | None = None,
    part: tuple[int, int] = (0, 1),
    each: Callable[[Predicted, Tensor], None] | None = None,
) -> ConfusionMatrix:
    """The counts of `evaluate_model`, which several processes may share out: they add up to the whole.

    Args:
        part: (i, n) takes every n-th labelled sample from the i-th on.
        each: called with every prediction and its own counts, (C, C).
    Raises: DataError for a split without labels.
    """
    labelled = [index for index in range(len(split)) if split.has_label(index)]
    if not labelled:
        raise DataError(
            "evaluation needs labels",
            received=f"{split.data}, split {split.split!r}: none of {len(split)} images has one",
            remedy="give a labelled split with --split",
        )
    confusion = ConfusionMatrix(split.classes.names, IGNORE_INDEX)
    mine = labelled[part[0] :: part[1]]
    predicted_batches = predictions(
        model, split, mine, size, device=device, batch_size=batch_size, at_size=at_size, threads=threads
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


def predictions(
    model: SegmentationModel,
    split: Split,
    numbers: Sequence[int],
    size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = JudgeSettings.batch_size,
    at_size: bool = False,
    threads: int = 2,
) -> Generator[list[Predicted], None, None]:
    """Predictions for labelled samples, a batch at a time; close it, and the model is back in its mode.

    Args:
        numbers: samples of `split`, in the order of the predictions.
    """
    samples = prefetch(lambda index: _load(split, index, size, at_size), numbers, threads=threads, ahead=4 * batch_size)
    with in_eval_mode(model):
        while batch := list(islice(samples, batch_size)):
            yield _predict(model, batch, device)


@torch.inference_mode()
def _predict(model: SegmentationModel, batch: list[_Sample], device: torch.device | str) -> list[Predicted]:
    pixels = torch.stack([sample.pixels for sample in batch]).to(device)
    logits = model(model.normalise(pixels)).logits.float()
    predicted = []
    for logits_Chw, sample in zip(logits, batch, strict=True):
        height, width = sample.label.shape
        full = model.upsample(logits_Chw[None], (height, width))[0]
        predicted.append(Predicted(sample.number, full.argmax(0).to(torch.uint8).cpu(), sample.label))
    return predicted


def _load(split: Split, index: int, size: tuple[int, int], at_size: bool) -> _Sample:
    image, label = split.image(index), split.label(index)
    assert label is not None, index
    window = Window.full(*image.shape[:2])
    pixels, small = render(image, label, window, flip=False, size=size)
    scored_label = small if at_size else np.ascontiguousarray(label)
    return _Sample(index, torch.from_numpy(pixels), torch.from_numpy(scored_label))
