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
    """The arguments of `kdcache_kernels.distill_loss`, checked.

    Attributes:
        student: (B, C, h, w) float32, float16 or bfloat16, any strides. Float64 for the reference alone.
        labels: (B, H, W) uint8 or signed integers, any strides, or None without.
        target: packed teacher logits. Not None exactly when KL is computed.
        size: (H, W) in pixels.
        use_ce: whether CE is computed; labels are then not None. (Without it, they may still mask the KL.)
        ce_weight, kl_weight: 0-dimensional floats on the device of the student.
        ce_denominator, kl_denominator: 0-dimensional floats on the device. None counts this batch.
        temperature: > 0.
        class_weight: (C,) floats, any stride. None weighs every class 1.
        ce_pixel_weight: (B, H, W), any dtype and strides, of CE. None weighs every pixel 1.
        label_smoothing: the share of a label that all classes get, in [0, 1).
        focal_gamma: exponent of the focal loss, 0 without. Not next to label smoothing.
        ignore_index: the void id.
        window: (B, 4) float64, any strides, pixels of the target's view. None is the whole view.
        flip: (B,) bool, any stride. None mirrors nothing.
        pixel_weight: (B, H, W), any dtype and strides, of KL. None weighs every pixel 1.
        distill_void: whether pixels of label `ignore_index` count in the KL.
        align_corners: whether the student's resize aligns corners. The target carries its own.
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
        """Return True if KL is computed, which needs a target."""
        return self.target is not None

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Return the dtype of a family's gradient: bfloat16 for a bfloat16 student, else float32.

        It is never float16, in which small gradients would become 0.
        """
        return gradient_dtype(self.student)


class Counted(NamedTuple):
    """The labels and the geometry of a batch whose denominators are to be counted.

    Attributes:
        labels, class_weight, num_classes, ignore_index, distill_void, size, window, flip: as in `LossProblem`.
        view_size: (height, width) of the target's view in pixels, or None without a target.
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
    """Return the dtype of a family's gradient: bfloat16 for a bfloat16 student, else float32."""
    return torch.bfloat16 if student.dtype == torch.bfloat16 else torch.float32


class LossResult(NamedTuple):
    """The loss, its terms and its gradient, as a family computes them.

    Attributes:
        loss, ce, kl: 0-dimensional float32, or NaN if a counted pixel depends on an unusable logit.
        gradient: (B, C, h, w) contiguous in `gradient_dtype`, the gradient of the loss by the student. It is
            meaningless if the loss is NaN, and (0,) without `need_gradient`.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    gradient: Tensor
