"""Cross-entropy with smoothed labels: `torch.nn.functional.cross_entropy` with a denominator of its own."""

import torch
from torch import Tensor

from kdcache.distill.terms.base import divide, wide
from kdcache.distill.terms.cells import resize


def smoothed_cross_entropy(
    logits_BChw: Tensor,
    label_BHW: Tensor,
    smoothing: float,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
    count: Tensor | None = None,
) -> Tensor:
    """The cross-entropy of labels of which a share is spread evenly over all classes, at the label's size.

    Every class weighs its own log-probability, and the sum is divided by the weights of the labels, as in PyTorch.

    Args:
        smoothing: the share, in [0, 1).
        class_weight: (C,); None weighs every class 1.
        count: what the sum is divided by; None is the batch's own sum of class weights.
    Returns: nats per pixel, 0-dimensional float32 (float64); 0 without labelled pixels.
    Memory: several tensors (B, C, H, W). Deterministic on every device.
    Source: Szegedy et al. 2016, arXiv 1512.00567, section 7.
    """
    log_p_BCHW = resize(wide(logits_BChw), (label_BHW.shape[1], label_BHW.shape[2]), align_corners).log_softmax(1)
    classes, dtype = log_p_BCHW.shape[1], log_p_BCHW.dtype
    label_B1HW = label_BHW[:, None]
    one_hot_BCHW = (label_B1HW == torch.arange(classes, device=label_BHW.device)[:, None, None]).to(dtype)
    weight_C11 = torch.ones((), device=label_BHW.device, dtype=dtype)
    if class_weight is not None:
        weight_C11 = class_weight.to(dtype)[:, None, None]
    share_BCHW = weight_C11 * ((1 - smoothing) * one_hot_BCHW + smoothing / classes)
    total = -torch.where(label_B1HW != ignore_index, share_BCHW * log_p_BCHW, 0).sum()
    return divide(total, (weight_C11 * one_hot_BCHW).sum() if count is None else count.to(dtype))
