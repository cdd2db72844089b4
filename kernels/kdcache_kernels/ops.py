"""The public functions: they check their arguments and pick an implementation.

Every implementation computes the same numbers to rounding; `impl="reference"` is the oracle. Fused kernels
for CUDA (Triton) and the CPU (numba) will join behind these functions; `impl="auto"` will then pick them.

Legend: B batch, C classes, H W label size, h w the student's or the target's own size.
"""

import torch
from torch import Tensor

from . import checks
from .errors import ShapeError, ValueRangeError
from .reference import (
    Denominators,
    LossParts,
    ce_weight_sum,
    distill_loss_reference,
    kl_pixels,
    upsampled_image,
)
from .topk import PackedTarget

IMPLEMENTATIONS = ("auto", "reference")


def distill_loss(
    student_logits_BChw: Tensor,
    labels_BHW: Tensor | None = None,
    target: PackedTarget | None = None,
    *,
    size: tuple[int, int] | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    class_weight: Tensor | None = None,
    ignore_index: int = 255,
    window_B4: Tensor | None = None,
    flip_B: Tensor | None = None,
    pixel_weight_BHW: Tensor | None = None,
    distill_void: bool = True,
    align_corners: bool = False,
    ce_denominator: Tensor | float | None = None,
    kl_denominator: Tensor | float | None = None,
    impl: str = "auto",
) -> LossParts:
    """Cross-entropy with labels plus KL(teacher || student), both at label size, from low-resolution logits.

    Computes `ce_weight * CE(up(z), y) + kl_weight * T^2 * KL(softmax(up(t) / T) || softmax(up(z) / T))`. CE
    counts the pixels whose label is not `ignore_index` and divides by the sum of their class weights. KL
    counts the pixels whose centre lies in the target's view and divides by their number. A term of weight 0,
    or without labels or target, is not computed and is 0; a term without counted pixels is 0 with gradient
    0. A non-finite logit (or one so large that logits / T overflow) whose interpolation touches a counted
    pixel makes the term and its gradient NaN; elsewhere it changes nothing.

    Args:
        student_logits_BChw: raw logits, any floating dtype and strides; receives the gradient, alone.
            Computed in float32, in float64 when it is float64, also under autocast.
        labels_BHW: class ids, uint8 or a signed integer; None for an unlabelled batch.
        target: packed teacher logits of the same batch; None for CE alone.
        size: (H, W) in pixels; needed without labels.
        ce_weight, kl_weight: >= 0, dimensionless.
        temperature: > 0, dimensionless.
        class_weight: (C,) floats >= 0, for CE; None weighs every class 1.
        ignore_index: the void id, which may be one that the labels' dtype cannot hold.
        window_B4: (B, 4) float64 (y0, x0, y1, x1), half-open edges in pixels of the target's view, which the
            image shows; it may reach over the view's edge. None is the whole view. Without a target, it has
            no effect.
        flip_B: (B,) bool, whether the image shows its window mirrored left to right; None mirrors nothing.
        pixel_weight_BHW: gate of the KL term, any dtype, taken as a number (uint8: 0 or 1, not 0 to 255). It
            multiplies a pixel's KL and does not shrink the denominator. A non-finite weight of a counted
            pixel makes KL NaN.
        distill_void: whether void pixels teach too. False needs labels to find them; a batch without counts
            all.
        align_corners: of the student's resize; the target carries its own.
        ce_denominator, kl_denominator: replace the counts of this batch, 0-dimensional tensors on the device
            or numbers: the global batch's, from `distill_denominators`, summed over ranks and accumulation
                steps.
        impl: "auto" or "reference".
    Returns: (loss, ce, kl), 0-dimensional float32 (float64), nats per pixel; kl includes T^2.
    Raises: ShapeError, ValueRangeError naming the argument. What is wrong inside a tensor is an error on the
        CPU; on CUDA, a class id out of range or a NaN window makes the loss NaN. Nothing waits for the
        device.
    Memory: the reference keeps three (B, C, H, W) tensors for the backward, two at T = 1; eight at its peak.
    Source: Hinton et al. 2015, section 2. Oracle: kdcache_kernels.reference.
    """
    check_implementation(impl)
    checks.check_student(student_logits_BChw)
    B, num_classes = student_logits_BChw.shape[:2]
    device = student_logits_BChw.device
    checks.check_number("temperature", temperature, above_zero=True)
    checks.check_number("ce_weight", ce_weight)
    checks.check_number("kl_weight", kl_weight)
    size = checks.check_size(labels_BHW, size)
    remedy = "Pass one value per pixel of the label."
    checks.check_tensor("labels_BHW", labels_BHW, (B, *size), checks.LABEL_DTYPES, device, remedy)
    checks.check_tensor("pixel_weight_BHW", pixel_weight_BHW, (B, *size), (), device, remedy)
    checks.check_class_weight(class_weight, num_classes, device)
    checks.check_window(window_B4, flip_B, B, device)
    checks.check_denominator("ce_denominator", ce_denominator, device)
    checks.check_denominator("kl_denominator", kl_denominator, device)
    if labels_BHW is not None and ce_weight > 0:
        checks.check_class_ids(labels_BHW, num_classes, ignore_index)
    if target is not None:
        checks.check_target(target, num_classes, B, device)
    return distill_loss_reference(
        student_logits_BChw,
        labels_BHW,
        target,
        size=size,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        temperature=temperature,
        class_weight=class_weight,
        ignore_index=ignore_index,
        window_B4=window_B4,
        flip_B=flip_B,
        pixel_weight_BHW=pixel_weight_BHW,
        distill_void=distill_void,
        align_corners=align_corners,
        ce_denominator=ce_denominator,
        kl_denominator=kl_denominator,
    )


@torch.no_grad()
def distill_denominators(
    labels_BHW: Tensor | None = None,
    target: PackedTarget | None = None,
    *,
    num_classes: int,
    size: tuple[int, int] | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = 255,
    window_B4: Tensor | None = None,
    flip_B: Tensor | None = None,
    distill_void: bool = True,
) -> Denominators:
    """Count what `distill_loss` divides by, so that ranks and accumulation steps can share the sums.

    With the sums over all parts of a batch passed to each part's `distill_loss`, the parts' losses add up to
    the loss of the whole batch. (DistributedDataParallel averages gradients: multiply the loss by the number
    of ranks.)

    Args: as in `distill_loss`; num_classes is the student's. One of labels_BHW and target is needed.
    Returns: (ce, kl), 0-dimensional float64 on the device; 0 without labels or target.
    Raises: ShapeError, ValueRangeError naming the argument.
    """
    size = checks.check_size(labels_BHW, size)
    anchor = target.values if labels_BHW is None and target is not None else labels_BHW
    if anchor is None:
        raise ShapeError(
            "labels_BHW or target is given.", received="neither", remedy="Pass what distill_loss will get."
        )
    B, device = anchor.shape[0], anchor.device
    remedy = "Pass one id per pixel."
    checks.check_tensor("labels_BHW", labels_BHW, (B, *size), checks.LABEL_DTYPES, device, remedy)
    checks.check_class_weight(class_weight, num_classes, device)
    ce = kl = torch.zeros((), dtype=torch.float64, device=device)
    if labels_BHW is not None:
        ce = ce_weight_sum(labels_BHW.long(), class_weight, ignore_index, num_classes).double()
    if target is not None:
        checks.check_target(target, num_classes, B, device)
        checks.check_window(window_B4, flip_B, B, device)
        counted, _ = kl_pixels(target, labels_BHW, size, ignore_index, window_B4, flip_B, distill_void)
        kl = counted.sum().double()
    return Denominators(ce, kl)


@torch.no_grad()
def target_argmax_confidence(
    target: PackedTarget,
    size: tuple[int, int],
    window_B4: Tensor | None = None,
    flip_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The teacher's class and its probability (T = 1) at label size: for gates, pseudo labels and audits.

    Args:
        target: packed teacher logits.
        size: (H, W) of the result in pixels.
        window_B4, flip_B: as in `distill_loss`.
    Returns: (argmax, confidence), (B, H, W) each: uint8 (int16 above 256 classes), the lowest id of equal
        ones; and float16. Outside the view the argmax is that of the nearest edge and the confidence 0.
        Where a NaN of the target enters, the confidence is NaN.
    Raises: ShapeError, ValueRangeError naming the argument.
    Memory: O(C*H*w + B*H*W): one image at a time.
    """
    size = checks.check_size(None, size)
    B = target.batch_size
    checks.check_window(window_B4, flip_B, B, target.device)
    dtype = torch.uint8 if target.num_classes <= 256 else torch.int16
    argmax_BHW = torch.empty((B, *size), dtype=dtype, device=target.device)
    confidence_BHW = torch.empty((B, *size), dtype=torch.float16, device=target.device)
    for sample in range(B):
        logits_CHW, lost_HW, inside_HW = upsampled_image(target, sample, size, window_B4, flip_B)
        largest_HW, ids_HW = logits_CHW.max(0)
        argmax_BHW[sample] = ids_HW
        probability_HW = (largest_HW - logits_CHW.logsumexp(0)).exp()
        probability_HW = probability_HW.masked_fill(lost_HW, torch.nan).masked_fill(~inside_HW, 0)
        confidence_BHW[sample] = probability_HW
    return argmax_BHW, confidence_BHW


def check_implementation(impl: str) -> None:
    """Refuse a name that is not in IMPLEMENTATIONS."""
    if impl not in IMPLEMENTATIONS:
        raise ValueRangeError(
            "impl names an implementation that exists.",
            received=repr(impl),
            remedy=f"Choose one of {', '.join(IMPLEMENTATIONS)}.",
        )
