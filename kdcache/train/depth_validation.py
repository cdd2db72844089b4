"""Validation of a depth head: metrics of its predictions on the images with labels of depth."""

import numpy as np
import torch

from kdcache.data import Split, Window, render
from kdcache.heads import DEPTH
from kdcache.metrics import DepthErrors
from kdcache.models import SegmentationModel
from kdcache.models.native import in_eval_mode


def validates_depth(model: SegmentationModel, val: Split) -> bool:
    """Whether a model predicts metres that the validation data have labels of."""
    head = model.regressions.get(DEPTH)
    return head is not None and head.unit == "m" and DEPTH in val.tasks


@torch.inference_mode()
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
    head = model.regressions[DEPTH]
    errors = DepthErrors() if head.max_depth is None else DepthErrors(max_depth=head.max_depth)
    labelled = [index for index in range(len(split)) if split.has_label(index, DEPTH)]
    with in_eval_mode(model):
        for index in labelled[part[0] :: part[1]]:
            image, label = split.image(index), split.label(index, DEPTH)
            window = Window.full(*image.shape[:2])
            pixels, _ = render(image, None, window, flip=False, size=size)
            raw_B1hw = model(model.normalise(torch.from_numpy(pixels)[None].to(device))).heads[DEPTH]
            label_HW = torch.from_numpy(np.asarray(label))
            height, width = label_HW.shape
            depth_HW = head.values(model.upsample(raw_B1hw.float(), (height, width)))[0, 0]
            errors.update(depth_HW, label_HW, split.ids[index])
    return errors
