"""The distillation loss on CUDA: which kernels run, in which order, and their sum.

Six launches at most and no wait for the device: prepare, geometry, the fast kernel (cells, with its combination of
edges, or pixels), tiles, totals. Tiles takes any geometry and any range of logits; the fast kernel takes what meets
the student's grid cell by cell, at a third of the time. Which image goes where is decided on the device, so both
are launched, and each passes by the other's images in a few microseconds. Where the host knows that the fast
kernel cannot run at all (sizes, aligned corners), tiles runs alone.

Legend: B batch, C classes, h w student's size, P programs of a kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ShapeError
from ..problem import LossProblem, LossResult
from .common import sum_pairs
from .prep import prepare

SUMS = 2048
"""Partial sums that the one program of totals reads at a time."""
OFFSETS = 2**31
"""Elements that an offset of 32 bits can reach."""
SCALED = 4096
"""Elements of a program of scale_gradient."""


@triton.jit(
    do_not_specialize=["num_fast", "num_tiles"],
    do_not_specialize_on_alignment=["ce_weight_ptr", "kl_weight_ptr"],
)
def totals_kernel(
    fast_ptr, tiles_ptr, num_fast, num_tiles, factors_ptr, ce_weight_ptr, kl_weight_ptr, loss_ptr, ce_ptr, kl_ptr,
    HAS_FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The terms and the loss from the (P, 2) partial sums of the kernels, in float64."""
    ce, kl = sum_pairs(tiles_ptr, num_tiles, BLOCK)
    if HAS_FAST:
        fast_ce, fast_kl = sum_pairs(fast_ptr, num_fast, BLOCK)
        ce += fast_ce
        kl += fast_kl
    ce *= tl.load(factors_ptr + 2).to(tl.float64)
    kl *= tl.load(factors_ptr + 3).to(tl.float64)
    loss = tl.load(ce_weight_ptr).to(tl.float64) * ce + tl.load(kl_weight_ptr).to(tl.float64) * kl
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(ce_ptr, ce.to(tl.float32))
    tl.store(kl_ptr, kl.to(tl.float32))


@triton.jit
def scale_kernel(gradient_ptr, factor_ptr, loss_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    """out = gradient * factor, multiplied in float32; NaN where the loss is not finite."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offs_n < num_elements
    gradient = tl.load(gradient_ptr + offs_n, mask=exists, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr).to(tl.float32) + 0.0 * tl.load(loss_ptr)
    tl.store(out_ptr + offs_n, (gradient * factor).to(out_ptr.dtype.element_ty), mask=exists)


def distill_loss(problem: LossProblem) -> LossResult:
    """Loss, terms and gradient of a checked problem; the same bits every time.

    Raises: ShapeError for an image of 2^31 logits or more, or whose elements lie so far apart.
    Memory: 4 bytes per logit of both inputs, the gradient, what cells keeps of its edges and tiles of its programs;
    nothing of label size times C.
    """
    student, device = problem.student, problem.student.device
    _check_offsets(problem)
    shape = student.shape if problem.need_gradient else (0,)
    if student.shape[0] == 0 or not (problem.use_ce or problem.use_kl):
        loss, ce, kl = (torch.zeros((), device=device) for _ in range(3))
        return LossResult(loss, ce, kl, torch.zeros(shape, dtype=problem.gradient_dtype, device=device))
    gradient = torch.empty(shape, dtype=problem.gradient_dtype, device=device)
    with torch.cuda.device_of(student):
        loss, ce, kl = _launch_all(problem, gradient if problem.need_gradient else None)
    return LossResult(loss, ce, kl, gradient)


def _check_offsets(problem: LossProblem) -> None:
    """The kernels count the elements of one image in 32 bits, and those of a batch in 64."""
    h, w = problem.student.shape[2:]
    target = (0, 0) if problem.target is None else problem.target.values.shape[2:]
    num_classes = problem.student.shape[1]
    if num_classes * max(h * w, target[0] * target[1]) >= OFFSETS:
        raise ShapeError(
            "one image has fewer than 2^31 logits.",
            received=f"{num_classes} classes, student {(h, w)}, target {tuple(target)}",
            remedy="Crop the images, or pass impl='reference'.",
        )
    strided = {
        "student_logits_BChw": problem.student,
        "labels_BHW": problem.labels,
        "pixel_weight_BHW": problem.pixel_weight,
        "ce_pixel_weight_BHW": problem.ce_pixel_weight,
    }
    for name, tensor in strided.items():
        if tensor is not None and _reach(tensor) >= OFFSETS:
            raise ShapeError(
                f"one image of {name} lies within 2^31 elements of memory.",
                entry="image within 2^31 elements",
                received=f"{tuple(tensor.shape)} with strides {tensor.stride()}",
                remedy=f"Pass {name}.contiguous(), or crop the images where that is as long.",
            )


def _reach(tensor: Tensor) -> int:
    """The offset of the last element of one image from its first."""
    return sum((n - 1) * abs(stride) for n, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def _launch_all(problem: LossProblem, gradient: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from . import cells, pixels
    from . import tiles as triton_tiles

    prepared = prepare(problem)
    fast = None
    if prepared.stride > 1:
        fast = cells.launch(problem, prepared, gradient, prepared.stride)
    elif prepared.stride == 1:
        fast = pixels.launch(problem, prepared, gradient)
    tiles = triton_tiles.launch(problem, prepared, gradient, all_images=fast is None)
    loss, ce, kl = (torch.empty((), dtype=torch.float32, device=problem.student.device) for _ in range(3))
    totals_kernel[(1,)](
        fast, tiles, 0 if fast is None else fast.shape[0], tiles.shape[0], prepared.factors, problem.ce_weight,
        problem.kl_weight, loss, ce, kl,
        HAS_FAST=fast is not None, BLOCK=SUMS, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return loss, ce, kl


def scale_gradient(gradient: Tensor, factor: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `gradient * factor` in `dtype`, multiplied in float32; NaN where the loss is not finite.

    Args:
        gradient: any floating dtype and strides.
        factor: 0-dimensional floats on the same device.
        loss: 0-dimensional float32 there, too.
    Returns: a contiguous tensor.
    """
    gradient = gradient.contiguous()
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            scale_kernel[(triton.cdiv(gradient.numel(), SCALED),)](
                gradient, factor, loss, out, gradient.numel(), BLOCK=SCALED, num_warps=8, enable_fp_fusion=False
            )
    return out
