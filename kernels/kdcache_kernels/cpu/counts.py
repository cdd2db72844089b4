"""The denominators of the loss without the loss, for processes and accumulated parts that share them."""

import numpy as np
import torch
from torch import Tensor

from ..problem import Counted
from ..window import view_positions
from .math import kernel
from .threads import run

_f = np.float32


@kernel
def count_rows(first, last, labels, ignore_index, class_weight, inside_y, inside_x, use_kl, skip_void, counts):
    """Count the denominators of CE and KL in a range of label rows.

    The rows are `first` to `last` - 1. Row y of image b has the number b * H + y.

    Shapes and units:
        labels: (B, H, W) of any integer dtype, or (B, 0, 0) without labels.
        ignore_index: label of void pixels, which CE does not count.
        class_weight: (C,) float32.
        inside_y, inside_x: (Bt, H) and (Bt, W) bool, whether a label row or column lies in the target's view. Bt is B,
            or 1 if all images share one view.
        use_kl: whether to count pixels for KL.
        skip_void: whether KL leaves out void pixels.
        counts: (B, H, 2) float64 result: sum of the class weights of labelled pixels, number of pixels that KL counts.
    """
    H, W = inside_y.shape[1], inside_x.shape[1]
    has_labels = labels.shape[1] > 0
    for task in range(first, last):
        b, y = task // H, task % H
        bt = b if inside_y.shape[0] > 1 else 0
        weight_sum, counted = 0.0, 0
        for x in range(W):
            label = np.int64(labels[b, y, x]) if has_labels else np.int64(0)
            void = has_labels and label == ignore_index
            if has_labels and not void and label >= 0 and label < class_weight.size:
                weight_sum += class_weight[label]
            if use_kl and inside_y[bt, y] and inside_x[bt, x] and not (void and skip_void):
                counted += 1
        counts[b, y, 0], counts[b, y, 1] = weight_sum, counted


def count(counted: Counted, device: torch.device) -> Tensor:
    """Compute the denominators of CE and KL on the CPU, see `kdcache_kernels.distill_denominators`.

    Args:
        counted: the labels, class weights and windows of a batch.
        device: the CPU.
    Returns: (2,) float64, for CE and KL.
    """
    H, W = counted.size
    view = counted.size if counted.view_size is None else counted.view_size
    positions = view_positions(counted.window, counted.flip, (view[0], view[1]), (H, W), device)
    y, x = positions.y.numpy(), positions.x.numpy()
    labels = torch.empty((counted.batch, 0, 0), dtype=torch.uint8) if counted.labels is None else counted.labels
    weight = torch.ones(counted.num_classes) if counted.class_weight is None else counted.class_weight
    counts_BH2 = np.zeros((counted.batch, H, 2))
    run(
        count_rows, counted.batch * H, labels.contiguous().numpy(), counted.ignore_index,
        weight.detach().float().contiguous().numpy(), ~((y < 0) | (y > view[0])), ~((x < 0) | (x > view[1])),
        counted.view_size is not None, not counted.distill_void, counts_BH2, nanoseconds=2.0 * counted.batch * H * W,
    )  # fmt: skip
    return torch.from_numpy(counts_BH2.sum((0, 1)))
