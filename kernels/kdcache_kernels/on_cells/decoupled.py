"""The decoupled loss: the target class apart from all others.

Legend: B batch, C classes, h w the teacher's cells, H W the student's image.
"""

from torch import Tensor

from .. import checks
from ..window import Size
from . import library
from .arguments import check_logits, evaluate
from .problem import DecoupledProblem
from .reference import decoupled_loss_reference


def decoupled_loss(
    student_logits_BChw: Tensor,
    teacher_logits_BChw: Tensor,
    labels_BHW: Tensor | None = None,
    *,
    view_size: Size,
    size: Size,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    window_B4: Tensor | None = None,
    flip_B: Tensor | None = None,
    pixel_weight_BHW: Tensor | None = None,
    counted_BHW: Tensor | None = None,
    count: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:
    """How differently student and teacher see the target class, and the other classes among themselves, on cells.

    Computes `T^2 * (alpha * TCKD + beta * NCKD)`, mean over cells: TCKD is the KL of (p, 1 - p), p the probability of
    the target class in softmax(logits / T); NCKD that of the softmax over the other classes. The target class is the
    label of the pixel in which the cell's centre lies, and where that is none of 0 to C - 1, or there are no labels,
    the teacher's best class there, the first of equal ones.

    Args:
        labels_BHW: (B, H, W) class ids, uint8 or signed integers, any strides; no pixel is left out by its label
            (`counted_BHW` does that).
        alpha, beta: >= 0, weights of TCKD and NCKD.
        student_logits_BChw, teacher_logits_BChw, view_size, size, temperature, window_B4, flip_B, pixel_weight_BHW,
            counted_BHW, count, impl: as in `relation_loss`.
    Returns: 0-dimensional, nats per cell, float32 (float64). Differentiable once; with the reference any number of
        times. Without counted cells, and with one class, exactly 0; a non-finite logit as in `relation_loss`.
    Raises: ShapeError, ValueRangeError naming the argument.
    Memory: fused, the gradient in float32; on the CPU the logits in float32 too, where they are not.
    Source: Zhao et al. 2022, arXiv 2203.08679, equation 7. Oracle: kdcache_kernels.on_cells.reference.
    """
    check_logits(student_logits_BChw, teacher_logits_BChw)
    shape = (student_logits_BChw.shape[0], *checks.check_size(None, size))
    remedy = "Pass a class id per pixel of the image; void is any id beyond the classes, such as 255."
    checks.check_tensor("labels_BHW", labels_BHW, shape, checks.LABEL_DTYPES, student_logits_BChw.device, remedy)
    return evaluate(
        DecoupledProblem,
        library.decoupled_loss,
        decoupled_loss_reference,
        impl,
        student_logits_BChw,
        teacher_logits_BChw,
        labels=labels_BHW,
        view_size=view_size,
        size=size,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        window=window_B4,
        flip=flip_B,
        pixel_weight=pixel_weight_BHW,
        counted=counted_BHW,
        count=count,
    )
