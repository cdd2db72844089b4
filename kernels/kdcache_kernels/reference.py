"""The distillation loss in plain PyTorch: the oracle of every test, and the fallback where no fused kernel runs.

It upsamples both sets of logits and lets autograd do the rest, so it holds up to eight tensors at label
resolution; in return it is short, works on any device and dtype, and differentiates twice. Three things set
it apart from the usual two lines around `F.kl_div`:

- Geometry. The target is sampled through a window and a flip per sample (`window.py`).
- Non-finite logits. They are taken out before the resize, and every pixel whose interpolation they would have
  entered is marked. A marked pixel that counts makes the loss NaN, and with it the gradient of every logit of
  the batch; one that does not count changes nothing. In the usual code 0 * NaN leaks from ignored pixels into
  the gradient, and a masked NaN can leave it.
- Determinism, without a host synchronisation: no atomic addition, no data-dependent branch.

Legend: B batch, C classes, H W label size, h w the student's or the target's own size.
"""

from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import LossProblem
from .topk import PackedTarget, argmax_dtype, compute_dtype
from .window import Size, ViewPositions, resample, view_positions, window_misses_view


class LossParts(NamedTuple):
    """The result of `distill_loss`: the loss and its two terms, as 0-dimensional tensors.

    >>> import kdcache_kernels
    >>> labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    >>> loss, ce, kl = kdcache_kernels.distill_loss(torch.zeros(1, 2, 4, 4), labels)
    >>> kl.item()
    0.0

    Attributes:
        loss: ce_weight * ce + kl_weight * kl. Call `backward` on it.
        ce: cross-entropy with the labels, nats per pixel.
        kl: T^2 * KL(teacher || student) at temperature T, nats per pixel.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor


class Denominators(NamedTuple):
    """The denominators of the two terms, 0-dimensional float64 tensors.

    >>> import kdcache_kernels
    >>> labels = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
    >>> ce, kl = kdcache_kernels.distill_denominators(labels, num_classes=2)
    >>> ce.item(), kl.item()
    (3.0, 0.0)

    Attributes:
        ce: the sum of the class weights of the labelled pixels (their number without class weights).
        kl: the number of pixels that the KL term counts, 0 without a target as in the example.
    """

    ce: Tensor
    kl: Tensor


def distill_loss_reference(problem: LossProblem) -> LossParts:
    """Compute `kdcache_kernels.distill_loss` from checked arguments with plain PyTorch operations.

    The arithmetic is float32 even under autocast, or float64 for float64 logits. A class id out of range makes CE NaN.
    """
    logits_BChw, labels_BHW, target = problem.student, problem.labels, problem.target
    size, temperature = problem.size, problem.temperature
    dtype = compute_dtype(logits_BChw.dtype)
    with torch.autocast(logits_BChw.device.type, enabled=False):
        # An empty slice: zero, attached to the graph, and zero gradient even from NaN.
        ce = kl = zero = logits_BChw[:0].sum(dtype=dtype)
        if not (problem.use_ce or problem.use_kl):
            return LossParts(zero, zero, zero)
        positions = view_positions(None, None, size, size, logits_BChw.device)
        student = _Upsampled.of(logits_BChw.to(dtype), positions, size, problem.align_corners, temperature)
        log_p_BCHW = None
        if problem.use_ce:
            assert labels_BHW is not None
            log_p_BCHW = student.logits.log_softmax(1)
            ce = zero + _cross_entropy(log_p_BCHW, student.lost, labels_BHW.long(), problem)
        if target is not None:
            if log_p_BCHW is None or temperature != 1:
                scaled_BCHW = student.logits if temperature == 1 else student.logits / temperature
                log_p_BCHW = scaled_BCHW.log_softmax(1)
            window_B4 = _nan_where_it_misses(problem.window, target)
            options = (labels_BHW, size, problem.ignore_index, window_B4, problem.flip, problem.distill_void)
            counted_BHW, positions = kl_pixels(target, *options)
            teacher = _Upsampled.of_target(target, positions, size, dtype, temperature)
            kl = zero + temperature**2 * _kl_divergence(log_p_BCHW, student.lost, teacher, counted_BHW, problem)
        loss = problem.ce_weight * ce + problem.kl_weight * kl
        return LossParts(*(NanReachesAll.apply(part.to(dtype), logits_BChw) for part in (loss, ce, kl)))


class NanReachesAll(torch.autograd.Function):
    """An autograd function that returns the loss unchanged, and spreads a loss that is not finite to all logits.

    The gradient at every logit is then NaN. Without it, autograd gives 0 at logits that were replaced and in images
    without counted pixels. An optimiser would then continue with a partial gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, logits_BChw: Tensor) -> Tensor:
        """Return a copy of the loss. `logits_BChw` is passed only so that `backward` can give it a gradient."""
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Save the loss, and the shape and dtype of the logits, for `backward`."""
        loss, logits_BChw = inputs
        ctx.save_for_backward(loss)
        ctx.shape, ctx.dtype = logits_BChw.shape, logits_BChw.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient by the loss, unchanged, and the gradient by the logits: NaN, or 0 for a finite loss."""
        (loss,) = ctx.saved_tensors
        return gradients[0], (0 * loss.detach()).to(ctx.dtype).expand(ctx.shape)


def _nan_where_it_misses(window_B4: Tensor | None, target: PackedTarget) -> Tensor | None:
    """Return the windows with NaN for those outside the view, so that they make the loss NaN."""
    if window_B4 is None:
        return None
    return window_B4.masked_fill(window_misses_view(window_B4, target.view_size)[:, None], torch.nan)


class _Upsampled(NamedTuple):
    """Finite (B, C, H, W) logits, and the (B, H, W) pixels that a non-finite one would have entered.

    The target's are divided by the temperature already: at its own size that costs nothing.
    """

    logits: Tensor
    lost: Tensor

    @classmethod
    def of(
        cls,
        logits_BChw: Tensor,
        positions: ViewPositions,
        size: Size,
        align_corners: bool,
        temperature: float,
    ) -> "_Upsampled":
        # Beyond this bound a difference of two logits, divided by the temperature, overflows.
        limit = torch.finfo(logits_BChw.dtype).max / 8 * min(1.0, temperature)
        usable_B1hw = (logits_BChw.detach().abs() <= limit).all(1, keepdim=True)
        lost_B1hw = (~usable_B1hw).to(logits_BChw.dtype)
        finite_BChw = torch.where(usable_B1hw, logits_BChw, 0).contiguous()
        logits_BCHW = _resize(finite_BChw, positions, size, align_corners)
        return cls(logits_BCHW, _resize(lost_B1hw, positions, size, align_corners)[:, 0] > 0)

    @classmethod
    def of_target(
        cls,
        target: PackedTarget,
        positions: ViewPositions,
        size: Size,
        dtype: torch.dtype,
        temperature: float,
    ) -> "_Upsampled":
        with torch.no_grad():
            scaled_BChw = target.densify(dtype) / temperature
            return cls.of(scaled_BChw, positions, size, target.align_corners, 1.0)


def _resize(x_BChw: Tensor, positions: ViewPositions, size: Size, align_corners: bool) -> Tensor:
    """Resample through `positions`. On the CPU a whole view takes the faster `F.interpolate`.

    On CUDA its backward adds atomically, and in float64 the matrices are the oracle, so both use matrices.
    """
    # With aligned corners, F.interpolate takes the pixels of the result to be those of the view.
    is_whole = positions.is_whole_view and (not align_corners or positions.view_size == size)
    if is_whole and x_BChw.dtype == torch.float32 and x_BChw.device.type == "cpu":
        return F.interpolate(x_BChw, size, mode="bilinear", align_corners=align_corners)
    grid = (x_BChw.shape[2], x_BChw.shape[3])
    return resample(x_BChw, *positions.hat_matrices(grid, align_corners, x_BChw.dtype))


def _cross_entropy(
    log_p_BCHW: Tensor,
    lost_BHW: Tensor,
    labels_BHW: Tensor,
    problem: LossProblem,
) -> Tensor:
    num_classes, dtype = log_p_BCHW.shape[1], log_p_BCHW.dtype
    ignore_index, class_weight = problem.ignore_index, problem.class_weight
    counted_BHW = labels_BHW != ignore_index
    wrong_BHW = counted_BHW & ((labels_BHW < 0) | (labels_BHW >= num_classes))
    weight_C = None if class_weight is None else class_weight.to(dtype)
    # Wrong ids are hidden from nll_loss: on CUDA they would end the process. No reduction: its sum is atomic.
    labels_BHW = labels_BHW.masked_fill(wrong_BHW, ignore_index)
    loss_BHW = F.nll_loss(log_p_BCHW, labels_BHW, weight_C, ignore_index=ignore_index, reduction="none")
    if problem.label_smoothing > 0:
        share = problem.label_smoothing / num_classes
        weighted_BCHW = log_p_BCHW if weight_C is None else log_p_BCHW * weight_C[:, None, None]
        spread_BHW = -weighted_BCHW.sum(1).masked_fill(labels_BHW == ignore_index, 0)
        loss_BHW = (1 - problem.label_smoothing) * loss_BHW + share * spread_BHW
    if problem.focal_gamma > 0:
        own_BHW = F.nll_loss(log_p_BCHW, labels_BHW, ignore_index=ignore_index, reduction="none")
        loss_BHW = loss_BHW * _power(-torch.expm1(-own_BHW), problem.focal_gamma)
    if problem.ce_pixel_weight is not None:
        loss_BHW = loss_BHW * torch.where(counted_BHW, problem.ce_pixel_weight.to(dtype), 0)
    denominator = problem.ce_denominator
    if denominator is None:
        denominator = ce_weight_sum(labels_BHW, weight_C, ignore_index, num_classes)
    spoilt = (counted_BHW & (lost_BHW | wrong_BHW)).any()
    return divide(loss_BHW.sum(), denominator, spoilt)


def _power(x: Tensor, exponent: float) -> Tensor:
    """Return x ** exponent for x >= 0, with value and gradient 0 at 0 (the limit with the factor log(1 - x))."""
    above = x > 0
    return torch.where(above, torch.where(above, x, 1) ** exponent, 0)


def _kl_divergence(
    log_p_BCHW: Tensor,
    lost_BHW: Tensor,
    teacher: _Upsampled,
    counted_BHW: Tensor,
    problem: LossProblem,
) -> Tensor:
    log_q_BCHW = teacher.logits.log_softmax(1)
    q_BCHW = log_q_BCHW.exp()
    # Finite even where q is 0, for both logarithms are. The difference first: exactly 0 when they are equal.
    loss_BHW = (q_BCHW * (log_q_BCHW - log_p_BCHW)).sum(1)
    factor_BHW = counted_BHW.to(loss_BHW.dtype)
    if problem.pixel_weight is not None:
        factor_BHW = torch.where(counted_BHW, problem.pixel_weight.to(loss_BHW.dtype), 0)
    denominator = counted_BHW.sum() if problem.kl_denominator is None else problem.kl_denominator
    spoilt = (counted_BHW & (lost_BHW | teacher.lost)).any()
    return divide((loss_BHW * factor_BHW).sum(), denominator, spoilt)


def argmax_confidence_reference(
    target: PackedTarget, size: Size, window_B4: Tensor | None, flip_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the teacher's most likely class at each pixel, and its probability, with PyTorch operations.

    This is the reference for `kdcache_kernels.target_argmax_confidence`.

    Args:
        target: packed teacher logits.
        size: (H, W) of the result in pixels.
        window_B4: (B, 4) edges (y0, x0, y1, x1) in pixels of the view, or None for the whole view.
        flip_B: (B,) bool, whether to mirror left to right, or None.
    Returns: (class ids, float16 probabilities), (B, H, W) each.
    Memory: O(C*H*W), because it computes one image at a time.
    """
    shape = (target.batch_size, *size)
    argmax_BHW = torch.empty(shape, dtype=argmax_dtype(target.num_classes), device=target.device)
    confidence_BHW = torch.empty(shape, dtype=torch.float16, device=target.device)
    for part in (slice(sample, sample + 1) for sample in range(target.batch_size)):
        window_14, flip_1 = (None if tensor is None else tensor[part] for tensor in (window_B4, flip_B))
        with torch.autocast(target.device.type, enabled=False):
            positions = view_positions(window_14, flip_1, target.view_size, size, target.device)
            image = target.map(itemgetter(part))
            logits_1CHW, lost_1HW = _Upsampled.of_target(image, positions, size, torch.float32, 1.0)
        largest_1HW, argmax_BHW[part] = logits_1CHW.max(1)
        probability_1HW = (largest_1HW - logits_1CHW.logsumexp(1)).exp()
        confidence_BHW[part] = probability_1HW.masked_fill(lost_1HW, torch.nan).masked_fill(~positions.inside(), 0)
    return argmax_BHW, confidence_BHW


def kl_pixels(
    target: PackedTarget,
    labels_BHW: Tensor | None,
    size: Size,
    ignore_index: int,
    window_B4: Tensor | None,
    flip_B: Tensor | None,
    distill_void: bool,
) -> tuple[Tensor, ViewPositions]:
    """Return the (B, H, W) bool mask of pixels that KL counts, and all pixels' positions in the target's view.

    KL counts the pixels whose centre lies in the target's view.

    Args:
        target: the packed target.
        labels_BHW: class ids, or None.
        size: (H, W) in pixels.
        ignore_index: the label of void pixels.
        window_B4: (B, 4) edges (y0, x0, y1, x1) of what the image shows, in pixels of the target's view. None for the
            whole view.
        flip_B: (B,) bool, whether the window is mirrored. None mirrors nothing.
        distill_void: False leaves out void pixels if there are labels.
    """
    positions = view_positions(window_B4, flip_B, target.view_size, size, target.device)
    counted_BHW = positions.inside().expand(target.batch_size, *size)
    if not distill_void and labels_BHW is not None:
        counted_BHW = counted_BHW & (labels_BHW.long() != ignore_index)
    return counted_BHW, positions


def ce_weight_sum(labels_BHW: Tensor, class_weight: Tensor | None, ignore_index: int, num_classes: int) -> Tensor:
    """Return the denominator of CE, 0-dimensional: the sum of the class weights of all labelled pixels.

    Without class weights, it is the number of labelled pixels. `ignore_index` is the label of pixels that do not count.
    Class ids outside 0 to num_classes - 1 do not count either.
    """
    counted_BHW = (labels_BHW != ignore_index) & (labels_BHW >= 0) & (labels_BHW < num_classes)
    if class_weight is None:
        return counted_BHW.sum()
    weight_BHW = class_weight[labels_BHW.masked_fill(~counted_BHW, 0)]
    return torch.where(counted_BHW, weight_BHW, 0).sum(dtype=torch.float64)


def divide(total: Tensor, denominator: Tensor, spoilt: Tensor) -> Tensor:
    """Return total / denominator, or 0 if the denominator is 0. All arguments are 0-dimensional tensors.

    If `spoilt` is True, the result and its gradient are NaN.
    """
    divisor = denominator.to(torch.float64)
    scale = divisor.reciprocal().masked_fill(divisor == 0, 0).masked_fill(spoilt, torch.nan)
    return total * scale.to(total.dtype)
