"""The input of the Triton loss kernels, which `prep` computes.

Legend: B batch, C classes, h w student's size, ht wt target's size.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """The inputs of the loss kernels on CUDA: normalised logits, and where each label pixel lies in them.

    A logit is unusable if it is NaN, infinite or so large that float32 overflows. A position with an unusable logit of
    any class is lost.

    Attributes:
        student: (B, C, h, w) contiguous float32: (logit - maximum over classes) * log2(e) / T, or 0 if lost.
        student_lost: (B, h, w) uint8, 1 if lost.
        target, target_lost: (B, C, ht, wt) and (B, ht, wt), the same for the target. One element each without KL.
        target_scale: log2(e) / T if `target` holds packed float16 logits, which kernels must multiply by it. Otherwise
            None.
        tables: int32, the neighbour tables of the label rows and columns. Read it with `geometry.student_tables` and
            `geometry.target_tables`.
        target_batch: how many images have their own neighbour tables of the target. It is B with a window or a flip,
            else 1, and 0 without KL.
        route: (B, 4) int32. Element 0 is 1 if the fast kernel (`cells` or `pixels`) computes the image, 0 if `tiles`
            does. With 1 and KL, the others are row, column and flip. Student logit (i, j) then meets target logit (row
            + i, column + j). If flip is 1, it meets (row + i, column + w - 1 - j). Both are clamped to the map.
        mix: (B, h, w) float32, the sum over classes of class weight * student, or None without label smoothing.
        factors: (8,) float32. 0 and 1 are factors of the gradient: ce_weight / ce_denominator and kl_weight * T /
            kl_denominator. 2 and 3 are factors of the terms: 1 / ce_denominator and T^2 / kl_denominator. They are 0 if
            the denominator is 0. 4 to 7 are read by `common.load_label_factors`.
        stride: label pixels per logit along an axis if the fast kernel may run (1, 2, 4 or 8), else 0.
    """

    student: Tensor
    student_lost: Tensor
    target: Tensor
    target_lost: Tensor
    target_scale: float | None
    tables: Tensor
    target_batch: int
    route: Tensor
    factors: Tensor
    mix: Tensor | None
    stride: int = 0
