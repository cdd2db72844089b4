"""Validation of a depth head: metrics of its predictions on the images with labels of depth."""

from contextlib import closing

import torch

from kdcache.data import Split
from kdcache.heads import DEPTH
from kdcache.metrics.depth import DepthErrors, DepthRange
from kdcache.metrics.predictions import judged_tasks, predictions
from kdcache.models import SegmentationModel


def validates_depth(model: SegmentationModel, val: Split) -> bool:
    """Whether a model predicts metres that the validation data have labels of."""
    return DEPTH in judged_tasks(model, val)


def depth_errors(
    model: SegmentationModel,
    split: Split,
    size: tuple[int, int],
    *,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
) -> DepthErrors:
    """Errors of a model's depth at the labels' own size; the raw output is resized, then becomes metres.

    Args:
        size: (H, W) the model sees.
        part: (i, n) takes every n-th labelled sample from the i-th on.
    Raises: DataError for an image or label that cannot be read.
    """
    errors = DepthErrors(DepthRange.of(model.regressions[DEPTH]))
    labelled = [index for index in range(len(split)) if split.has_label(index, DEPTH)]
    batches = predictions(
        model, split, labelled[part[0] :: part[1]], size, tasks=(DEPTH,), device=device, batch_size=1, threads=0
    )
    with closing(batches):
        for prediction in (one for batch in batches for one in batch):
            errors.update(prediction.answers[DEPTH], prediction.labels[DEPTH], split.ids[prediction.number])
    return errors
