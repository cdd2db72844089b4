"""The loss of channels: where in the image each class, or each channel of a feature, is strong.

Legend: B batch, C classes or channels, h w the teacher's cells, H W the student's image.
"""

from torch import Tensor

from .. import checks
from ..window import Size
from . import library
from .arguments import FLOATS, check_logits, evaluate
from .problem import ChannelProblem
from .reference import channel_loss_reference


def channel_loss(
    student_logits_BChw: Tensor,
    teacher_logits_BChw: Tensor,
    teacher_maximum_Bhw: Tensor | None = None,
    *,
    view_size: Size,
    size: Size,
    temperature: float = 4.0,
    window_B4: Tensor | None = None,
    flip_B: Tensor | None = None,
    pixel_weight_BHW: Tensor | None = None,
    counted_BHW: Tensor | None = None,
    count: Tensor | float | None = None,
    impl: str = "auto",
) -> Tensor:
    """How differently student and teacher spread each class over the cells of an image.

    Computes `T^2 / C * sum over classes of KL(p_t || p_s)`, p = softmax(logits / T) over the cells of one image, mean
    over the images in which any pixel counts. A cell enters both distributions by the share of its pixels that count,
    times the gate where that is above 0: a distribution over positions cannot be weighted afterwards.

    Args:
        student_logits_BChw, teacher_logits_BChw: raw, for what is subtracted from a cell changes them.
        teacher_maximum_Bhw: (B, h, w) floats, any strides: what was subtracted from all logits of the teacher's cells.
        count: the images, in the place of those of this batch.
        view_size, size, temperature, window_B4, flip_B, pixel_weight_BHW, counted_BHW, impl: as in `relation_loss`.
    Returns: 0-dimensional, nats per image, float32 (float64). Differentiable once; with the reference any number of
        times. Without counted cells exactly 0; a non-finite logit or gate as a non-finite logit in `relation_loss`.
    Raises: ShapeError, ValueRangeError naming the argument.
    Memory: fused, the gradient in float32; on the CPU the logits in float32 too, where they are not.
    Source: Shu et al. 2021, arXiv 2011.13256, section 3. Oracle: kdcache_kernels.on_cells.reference.
    """
    check_logits(student_logits_BChw, teacher_logits_BChw)
    shape = (student_logits_BChw.shape[0], *teacher_logits_BChw.shape[2:])
    remedy = "Pass the largest logit of every cell, as a store with raw logits keeps it."
    checks.check_tensor("teacher_maximum_Bhw", teacher_maximum_Bhw, shape, FLOATS, student_logits_BChw.device, remedy)
    return evaluate(
        ChannelProblem,
        library.channel_loss,
        channel_loss_reference,
        impl,
        student_logits_BChw,
        teacher_logits_BChw,
        teacher_maximum=teacher_maximum_Bhw,
        view_size=view_size,
        size=size,
        temperature=temperature,
        window=window_B4,
        flip=flip_B,
        pixel_weight=pixel_weight_BHW,
        counted=counted_BHW,
        count=count,
    )
