"""The loss in plain PyTorch operations, with its gradient by hand, without a graph.

The usual training code keeps ten tensors of label size times classes and processes them twice. Here each exists once,
and most steps overwrite their input. One look at the smallest and largest logit finds values that are not finite. Only
then does the slower way of `reference.py` mark the pixels that they enter.

Legend: B batch, C classes, P pixels of an image, H W label size, h w the student's own size. Images of one pixel have
no axis of pixels: softmax over the last axis is several times as fast.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import LossProblem, LossResult
from ..reference import ce_weight_sum, kl_pixels
from ..topk import densify
from ..window import Size, ViewPositions, resample, view_positions
from .teacher import DenseTeacher, Softmax, SparseTeacher, Teacher, largest

_LARGEST = torch.finfo(torch.float32).max / 8
"""As in the reference: a logit beyond it is lost, for a difference of two overflows."""


class _Map(NamedTuple):
    """A map of logits and where its pixels are: the resize, and its transpose.

    Attributes:
        size: (H, W) in pixels.
        grid: (h, w) of the logits.
        align_corners: whether the resize aligns corners.
        positions: where pixels lie in the view. None is the whole view.
    """

    size: Size
    grid: Size
    align_corners: bool
    positions: ViewPositions | None

    @classmethod
    def of_view(cls, size: Size, grid: Size, align_corners: bool, view_size: Size) -> "_Map":
        """Return the map of a whole view. `F.interpolate` rounds the weights of fractional ratios."""
        whole_ratio = size[0] % grid[0] == 0 and size[1] % grid[1] == 0
        simple = view_size == size or not align_corners
        if simple and (size == grid or (whole_ratio and not align_corners)):
            return cls(size, grid, align_corners, None)
        return cls(size, grid, align_corners, view_positions(None, None, view_size, size, torch.device("cpu")))

    def resize(self, x_Bchw: Tensor) -> Tensor:
        if self.positions is not None:
            return resample(x_Bchw, *self.positions.hat_matrices(self.grid, self.align_corners, x_Bchw.dtype))
        if self.size == self.grid:
            return x_Bchw
        return F.interpolate(x_Bchw, self.size, mode="bilinear", align_corners=self.align_corners)

    def transpose(self, x_BcHW: Tensor) -> Tensor:
        if self.positions is not None:
            rows, columns = self.positions.hat_matrices(self.grid, self.align_corners, x_BcHW.dtype)
            return resample(x_BcHW, rows.mT, columns.mT)
        if self.size == self.grid:
            return x_BcHW
        shape = (*x_BcHW.shape[:2], *self.grid)
        gradient: Tensor = torch.ops.aten.upsample_bilinear2d_backward(x_BcHW, self.size, shape, self.align_corners)
        return gradient


class _Logits(NamedTuple):
    """Finite (B, C, P) logits in pixels, and a mask (B, P) of pixels with a lost one, or None."""

    values: Tensor
    lost: Tensor | None

    @classmethod
    def of(cls, logits_BChw: Tensor, limit: float, on: _Map) -> "_Logits":
        if _widest(logits_BChw) <= limit:
            return cls(in_pixels(on.resize(logits_BChw), 2), None)
        usable_B1hw = (logits_BChw.abs() <= limit).all(1, keepdim=True)
        values_BCHW = on.resize(torch.where(usable_B1hw, logits_BChw, 0))
        return cls(in_pixels(values_BCHW, 2), in_pixels(on.resize((~usable_B1hw).float())[:, 0]) > 0)


def distill_loss(problem: LossProblem) -> LossResult:
    """Compute the CE + KL loss, its terms and its gradient with PyTorch operations on the CPU, from checked arguments.

    Memory: up to eight float32 tensors of label size times classes. `impl="auto"` uses it only if these are small.
    """
    student_BChw = problem.student.detach().to(torch.float32, memory_format=torch.contiguous_format)
    if student_BChw.shape[0] == 0 or not (problem.use_ce or problem.use_kl):
        return _result(problem, 0.0, 0.0, torch.zeros_like(student_BChw))
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return _compute(problem, student_BChw)
    return _compute(problem, student_BChw)


def _compute(problem: LossProblem, student_BChw: Tensor) -> LossResult:
    T = problem.temperature
    on = _Map.of_view(problem.size, (student_BChw.shape[2], student_BChw.shape[3]), problem.align_corners, problem.size)
    logits_BCP, lost_BP = _Logits.of(student_BChw, _LARGEST * min(1.0, T), on)
    # Relative to the maximum, for the sums of the divergence.
    logits_BCP = logits_BCP - largest(logits_BCP)[:, None]
    at_1 = Softmax.of(logits_BCP, centred=True) if problem.use_ce else None
    ce, kl, gradient_BCP = 0.0, 0.0, None
    if problem.use_kl:
        at_T = Softmax.of(logits_BCP if T == 1 else logits_BCP / T, centred=True)
        kl, factor_BP, teacher = _kl(problem, at_T, lost_BP)
        if problem.need_gradient:
            gradient_BCP = teacher.gradient(at_T.p, factor_BP[:, None])
    if at_1 is not None:
        ce, gradient_BCP = _cross_entropy(problem, at_1, lost_BP, gradient_BCP)
    if gradient_BCP is None:
        return _result(problem, ce, kl, student_BChw)
    return _result(problem, ce, kl, on.transpose(gradient_BCP.view(*gradient_BCP.shape[:2], *problem.size)))


def _cross_entropy(
    problem: LossProblem, student: Softmax, lost_BP: Tensor | None, gradient_BCP: Tensor | None
) -> tuple[float, Tensor | None]:
    """Return the cross-entropy. Overwrite the probabilities, and add to the gradient."""
    assert problem.labels is not None
    labels_BP, C = in_pixels(problem.labels).long(), student.p.shape[1]
    counted_BP = labels_BP != problem.ignore_index
    ids_B1P = labels_BP.masked_fill(~counted_BP, 0)[:, None]
    low, high = ids_B1P.aminmax()
    wrong = int(low) < 0 or int(high) >= C
    if wrong:
        ids_B1P = ids_B1P.clamp(0, C - 1)
    weight_C = None if problem.class_weight is None else problem.class_weight.float()
    own_BP = counted_BP.float()
    if problem.ce_pixel_weight is not None:
        own_BP = torch.where(counted_BP, in_pixels(problem.ce_pixel_weight).float(), 0)
    weight_BP = own_BP if weight_C is None else own_BP * weight_C[ids_B1P[:, 0]]
    share = problem.label_smoothing
    hot_BP = slope_BP = weight_BP * (1 - share) if share > 0 else weight_BP
    nats_BP = student.total - student.logits.gather(1, ids_B1P)[:, 0]
    loss_BP = hot_BP * nats_BP
    if problem.focal_gamma > 0:
        loss_BP, hot_BP = _focal(loss_BP, hot_BP, nats_BP, problem.focal_gamma)
        slope_BP = hot_BP
    if share > 0:
        spread_BP, logits_BCP = own_BP * (share / C), student.logits
        total_weight = C if weight_C is None else weight_C.sum()
        mix_BP = logits_BCP.sum(1) if weight_C is None else torch.einsum("bc...,c->b...", logits_BCP, weight_C)
        loss_BP = loss_BP + spread_BP * (total_weight * student.total - mix_BP)
        slope_BP = slope_BP + spread_BP * total_weight
    count = problem.ce_denominator
    if count is None:
        count = counted_BP.sum() if weight_C is None else ce_weight_sum(labels_BP, weight_C, problem.ignore_index, C)
    per_count = _inverse(count)
    if wrong or (lost_BP is not None and bool((lost_BP & counted_BP).any())):
        per_count = math.nan
    ce = float(loss_BP.sum()) * per_count
    if not problem.need_gradient:
        return ce, None
    factor = float(problem.ce_weight) * per_count
    slope_B1P = (slope_BP * factor)[:, None]
    gradient_BCP = student.p.mul_(slope_B1P) if gradient_BCP is None else gradient_BCP.addcmul_(student.p, slope_B1P)
    if share > 0:
        each_C = torch.ones(1) if weight_C is None else weight_C
        gradient_BCP -= (spread_BP * factor)[:, None] * each_C.view(-1, *[1] * (gradient_BCP.dim() - 2))
    return ce, gradient_BCP.scatter_add_(1, ids_B1P, (hot_BP * -factor)[:, None])


def _focal(loss_BP: Tensor, weight_BP: Tensor, nats_BP: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the loss times (1 - p)^gamma, and the weight times what that makes of its gradient, or 0 if p = 1."""
    rest_BP = -torch.expm1(-nats_BP)
    power_BP = rest_BP**gamma
    slope_BP = power_BP + gamma * (power_BP / rest_BP) * (1 - rest_BP) * nats_BP
    sure_BP = rest_BP <= 0
    return (loss_BP * power_BP).masked_fill(sure_BP, 0), (weight_BP * slope_BP).masked_fill(sure_BP, 0)


def _kl(problem: LossProblem, student: Softmax, lost_BP: Tensor | None) -> tuple[float, Tensor, Teacher]:
    """Return the KL times T^2, the (B, P) factors of its gradient, and the teacher that knows the rest of it."""
    target, T, size = problem.target, problem.temperature, problem.size
    assert target is not None
    moved = problem.window is not None or problem.flip is not None
    masked = moved or not problem.distill_void
    gate_BP, counted_BP, positions = torch.ones(student.total.shape), None, None
    count: Tensor | float = float(gate_BP.numel())
    if masked:
        options = (problem.labels, size, problem.ignore_index, problem.window, problem.flip, problem.distill_void)
        counted_BHW, at = kl_pixels(target, *options)
        counted_BP, positions = in_pixels(counted_BHW), at if moved else None
        gate_BP, count = counted_BP.float(), counted_BP.sum()
    if problem.pixel_weight is not None:
        gate_BP = in_pixels(problem.pixel_weight).float()
        gate_BP = gate_BP if counted_BP is None else torch.where(counted_BP, gate_BP, 0)
    grid = (target.values.shape[2], target.values.shape[3])
    if positions is None:
        on = _Map.of_view(size, grid, target.align_corners, target.view_size)
    else:
        on = _Map(size, grid, target.align_corners, positions)
    sparse = target.indices is not None and grid == size == (1, 1) and on.positions is None
    teacher: Teacher
    if sparse and _widest(target.values) < math.inf and _widest(target.tail) < math.inf:
        teacher = SparseTeacher.of(target, T)
    else:
        dense_BChw = densify(target.values, target.indices, target.tail, target.num_classes)
        logits = _Logits.of(dense_BChw if T == 1 else dense_BChw / T, _LARGEST, on)
        teacher = DenseTeacher(Softmax.of(logits.values))
        if logits.lost is not None:
            lost_BP = logits.lost if lost_BP is None else lost_BP | logits.lost
    per_count = _inverse(count if problem.kl_denominator is None else problem.kl_denominator)
    if lost_BP is not None and bool((lost_BP if counted_BP is None else lost_BP & counted_BP).any()):
        per_count = math.nan
    kl = T * T * float((teacher.divergence(student) * gate_BP).sum()) * per_count
    factor_BP = gate_BP * (float(problem.kl_weight) * T * per_count)
    return kl, factor_BP, teacher


def in_pixels(x: Tensor, axis: int = 1) -> Tensor:
    """Merge the axes of rows and columns, the last two, into one. Remove them if the images have a single pixel.

    `axis` is the axis of the rows, such as 2 for (B, C, H, W). The result is then (B, C, H * W), or (B, C) if H = W =
    1.
    """
    return x.flatten(axis) if x.shape[axis:].numel() > 1 else x.flatten(axis - 1)


def _widest(x: Tensor | None) -> float:
    """Return the largest absolute value, or NaN if there is one."""
    assert x is not None
    low, high = x.aminmax()
    return max(-float(low), float(high)) if float(low) == float(low) else math.nan


def _inverse(count: Tensor | float) -> float:
    """Return 1 / count, and 0 for 0."""
    value = float(count)
    return 1 / value if value else 0.0


def _result(problem: LossProblem, ce: float, kl: float, gradient_BChw: Tensor) -> LossResult:
    loss = float(problem.ce_weight) * ce + float(problem.kl_weight) * kl
    gradient = gradient_BChw.to(problem.gradient_dtype) if problem.need_gradient else torch.empty(0)
    loss_, ce_, kl_ = (torch.scalar_tensor(x, dtype=torch.float32) for x in (loss, ce, kl))
    return LossResult(loss_, ce_, kl_, gradient)
