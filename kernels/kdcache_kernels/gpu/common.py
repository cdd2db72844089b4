"""Helpers shared by the Triton kernels: what a pixel counts for, powers, and the arguments that all of them take.

A pixel's label, class weight, gate and masks are read by one function, so that every kernel counts the same pixels.
It costs about 20 instructions per pixel, once, against 20 per pixel and class for the rest.

Legend: B batch, C classes, H W label size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from ..problem import LossProblem

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
VOID = tl.constexpr(-1)
WRONG = tl.constexpr(-2)


@triton.jit
def power(x, POWER: tl.constexpr):
    """x to the POWER, 1 to 4."""
    tl.static_assert(POWER >= 1 and POWER <= 4)
    if POWER == 1:
        return x
    square = x * x
    if POWER == 2:
        return square
    if POWER == 3:
        return square * x
    return square * square


@triton.jit
def load_label(label_ptrs, exists, num_classes, IGNORE_INDEX: tl.constexpr):
    """Class ids of a block of pixels, int32: VOID where ignored or not there, WRONG where out of range.

    Args:
        label_ptrs: block of pointers, any integer type.
        exists: bool block: the pixel lies in the image and is this program's.
    """
    ids = tl.load(label_ptrs, mask=exists)
    if ids.dtype.primitive_bitwidth == 64:
        labelled = exists & (ids != IGNORE_INDEX)
    else:
        ids = ids.to(tl.int32)
        labelled = exists
        if IGNORE_INDEX >= -(2**31) and IGNORE_INDEX < 2**31:
            labelled = exists & (ids != IGNORE_INDEX)
    valid = (ids >= 0) & (ids < num_classes)
    return tl.where(labelled, tl.where(valid, ids.to(tl.int32), WRONG), VOID)


@triton.jit
def load_pixel(
    label_ptrs,
    class_weight_ptr,
    pixel_weight_ptrs,
    exists,
    in_view,
    num_classes,
    USE_CE: tl.constexpr,
    USE_KL: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_PIXEL_WEIGHT: tl.constexpr,
    DISTILL_VOID: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
):
    """The weights of a block of pixels in both terms.

    Args:
        label_ptrs, pixel_weight_ptrs: blocks of pointers of one shape; unused where there are none.
        exists: bool block: the pixel lies in the image and is this program's.
        in_view: bool block: its centre lies in the target's view.
    Returns: blocks
        label: int32, the class id; 0 where the pixel is not labelled or its id is out of range.
        ce_weight: float32, class weight of a labelled pixel, else 0; NaN where the id is out of range.
        kl_weight: float32, gate of a pixel that KL counts, else 0.
        ce_counted, kl_counted: bool, whether the terms count the pixel, whatever it weighs.
    """
    label = tl.zeros(exists.shape, tl.int32)
    ce_counted = exists != exists
    kl_counted = ce_counted
    ce_weight = tl.zeros(exists.shape, tl.float32)
    kl_weight = ce_weight
    taught = exists
    if HAS_LABELS and (USE_CE or not DISTILL_VOID):
        ids = load_label(label_ptrs, exists, num_classes, IGNORE_INDEX)
        labelled = ids != VOID
        if not DISTILL_VOID:
            taught = labelled
        if USE_CE:
            ce_counted = labelled
            label = tl.maximum(ids, 0)
            if HAS_CLASS_WEIGHT:
                ce_weight = tl.load(class_weight_ptr + label, mask=ids >= 0, other=0.0).to(tl.float32)
            else:
                ce_weight = tl.where(ids >= 0, 1.0, 0.0)
            ce_weight = tl.where(ids == WRONG, float("nan"), ce_weight)
    if USE_KL:
        kl_counted = taught & in_view
        if HAS_PIXEL_WEIGHT:
            kl_weight = tl.load(pixel_weight_ptrs, mask=kl_counted, other=0).to(tl.float32)
        else:
            kl_weight = tl.where(kl_counted, 1.0, 0.0)
    return label, ce_weight, kl_weight, ce_counted, kl_counted


def gpu(device: torch.device) -> GPUTarget:
    """The target of compilation: NVIDIA's or AMD's compiler, and how many lanes a warp has (64 on a CDNA)."""
    if device.type == "cpu":  # the interpreter
        return GPUTarget("cuda", 90, 32)
    target: GPUTarget = triton.runtime.driver.active.get_current_target()
    return target


def launch_options(lanes: int, registers: int, device: torch.device) -> dict[str, int]:
    """Options of a launch: a thread per lane, and at most so many registers each, which AMD's compiler cannot limit."""
    target = gpu(device)
    options = {"num_warps": max(1, lanes // target.warp_size)}
    return options | {"maxnreg": registers} if target.backend == "cuda" else options


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of the GPU; an H200's for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def integer_power(temperature: float) -> int:
    """POWER of a kernel: T where exp(u) = exp(u / T) ** T spares an exponential and its rounding allows it, else 0."""
    return int(temperature) if temperature in (1, 2, 3, 4) else 0


def pixel_arguments(problem: LossProblem) -> dict[str, Any]:
    """The keyword arguments with which a kernel calls `load_pixel`, and the strides (batch, row, column) it needs.

    label_ptr, stride_lb, stride_lh, stride_lw, class_weight_ptr, pixel_weight_ptr, stride_pb, stride_ph, stride_pw,
    num_classes, and the constants of `load_pixel`. Class weights have no stride there: they are made contiguous.
    """
    labels, pixel_weight = problem.labels, problem.pixel_weight
    class_weight = None if problem.class_weight is None else problem.class_weight.contiguous()
    if pixel_weight is not None and pixel_weight.dtype == torch.bool:
        pixel_weight = pixel_weight.view(torch.uint8)
    label_strides = (0, 0, 0) if labels is None else labels.stride()
    weight_strides = (0, 0, 0) if pixel_weight is None else pixel_weight.stride()
    return {
        "label_ptr": labels,
        **dict(zip(("stride_lb", "stride_lh", "stride_lw"), label_strides, strict=True)),
        "class_weight_ptr": class_weight,
        "pixel_weight_ptr": pixel_weight,
        **dict(zip(("stride_pb", "stride_ph", "stride_pw"), weight_strides, strict=True)),
        "num_classes": problem.student.shape[1],
        "USE_CE": problem.use_ce,
        "USE_KL": problem.use_kl,
        "HAS_LABELS": labels is not None,
        "HAS_CLASS_WEIGHT": class_weight is not None,
        "HAS_PIXEL_WEIGHT": pixel_weight is not None,
        "DISTILL_VOID": problem.distill_void or labels is None,
        "IGNORE_INDEX": problem.ignore_index,
    }
