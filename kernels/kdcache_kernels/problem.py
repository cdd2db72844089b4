"""The input and the result of a fused loss kernel, the same for every family.

The public functions check their arguments and turn them into a `LossProblem`; a family (numba on the CPU, Triton on
CUDA) turns it into a `LossResult`. Nothing in between is of label size times classes.

Legend: B batch, C classes, k kept classes, H W label size, h w the student's own size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .topk import PackedTarget


@dataclass(frozen=True, kw_only=True)
class LossProblem:
    """The checked arguments of `kdcache_kernels.distill_loss`.

    Attributes:
        student: (B, C, h, w) logits, float32, float16 or bfloat16, any strides. float64 only for the reference.
        labels: (B, H, W) uint8 or signed integers, any strides, or None without labels.
        target: packed teacher logits. None if KL is not computed.
        size: (H, W) of the labels in pixels.
        use_ce: whether CE is computed. Labels are then not None. Without CE, labels may still mask the KL.
        ce_weight, kl_weight: 0-dimensional floats on the student's device.
        ce_denominator, kl_denominator: 0-dimensional floats on the student's device. None counts this batch.
        temperature: > 0, dimensionless.
        class_weight: (C,) floats, any stride. None weighs every class 1.
        ce_pixel_weight: (B, H, W) weights of pixels in CE, any dtype and strides. None weighs every pixel 1.
        label_smoothing: the share of a label that all classes get, in [0, 1).
        focal_gamma: exponent of the focal loss, 0 without. At least one of it and label_smoothing is 0.
        ignore_index: the label of void pixels.
        window: (B, 4) float64 edges (y0, x0, y1, x1) in pixels of the target's view, any strides. None is the whole
            view.
        flip: (B,) bool, any stride. None mirrors nothing.
        pixel_weight: (B, H, W) weights of pixels in KL, any dtype and strides. None weighs every pixel 1.
        distill_void: whether KL counts void pixels.
        align_corners: whether the student's resize aligns corners. For the teacher, see `PackedTarget.align_corners`.
        need_gradient: whether to compute the gradient.
    """

    student: Tensor
    labels: Tensor | None
    target: PackedTarget | None
    size: tuple[int, int]
    use_ce: bool
    ce_weight: Tensor
    kl_weight: Tensor
    ce_denominator: Tensor | None
    kl_denominator: Tensor | None
    temperature: float
    class_weight: Tensor | None
    ce_pixel_weight: Tensor | None = None
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    ignore_index: int
    window: Tensor | None
    flip: Tensor | None
    pixel_weight: Tensor | None
    distill_void: bool
    align_corners: bool
    need_gradient: bool

    @property
    def use_kl(self) -> bool:
        """True if KL is computed, that is, if there is a target."""
        return self.target is not None

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype in which the kernels write the gradient: bfloat16 for bfloat16 logits, else float32.

        It is never float16, in which small gradients would become 0.
        """
        return gradient_dtype(self.student)


class Counted(NamedTuple):
    """The checked arguments of `kdcache_kernels.distill_denominators`, which counts the denominators of CE and KL.

    Attributes:
        labels: (B, H, W) class ids, or None without labels.
        class_weight: (C,) floats. None weighs every class 1.
        num_classes: C.
        ignore_index: the label of void pixels.
        distill_void: whether KL counts void pixels.
        size: (H, W) of the labels in pixels.
        view_size: (height, width) of the target's view in pixels, or None without a target.
        window: (B, 4) float64 edges (y0, x0, y1, x1) in pixels of the view. None is the whole view.
        flip: (B,) bool, whether the window is mirrored. None mirrors nothing.
        batch: B.
    """

    labels: Tensor | None
    class_weight: Tensor | None
    num_classes: int
    ignore_index: int
    distill_void: bool
    size: tuple[int, ...]
    view_size: tuple[int, ...] | None
    window: Tensor | None
    flip: Tensor | None
    batch: int


def gradient_dtype(student: Tensor) -> torch.dtype:
    """Return the dtype in which the kernels write the gradient by `student`: bfloat16 for bfloat16, else float32."""
    return torch.bfloat16 if student.dtype == torch.bfloat16 else torch.float32


class LossResult(NamedTuple):
    """The loss, its terms and its gradient, as the kernels return them.

    Attributes:
        loss, ce, kl: 0-dimensional float32. NaN if a counted pixel depends on a logit that is not finite or too large.
        gradient: (B, C, h, w) contiguous, the gradient of the loss by the student's logits, in `gradient_dtype`. Do not
            use it if the loss is NaN. It is (0,) if `need_gradient` is False.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    gradient: Tensor
