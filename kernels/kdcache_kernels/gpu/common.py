"""Helpers shared by the Triton kernels: weights of pixels, powers, sums, and common arguments.

A pixel's label, class weight, gate and masks are read by one function, so every kernel counts the same pixels. It costs
about 20 instructions per pixel, once, against 20 per pixel and class for the rest.

Legend: B batch, C classes, H W label size.
"""

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..errors import ValueRangeError
from ..problem import LossProblem


def cdiv(n: int, size: int) -> int:
    """Return n / size, rounded up. On the host, this is ten times as fast as `triton.cdiv`."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@lru_cache(typed=True)
def constant(value: Any) -> tl.constexpr:
    """Return a value as a Triton constant, and the same object for equal values.

    Triton then finds the compiled variant of a kernel faster.
    """
    return tl.constexpr(value)


LN2 = tl.constexpr(0.6931471805599453)
VOID = tl.constexpr(-1)
WRONG = tl.constexpr(-2)


@triton.jit
def power(x, POWER: tl.constexpr):
    """Return x ** POWER elementwise. POWER is 1, 2, 3 or 4."""
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
    """Return the class ids of a block of label pixels as int32, with VOID (-1) and WRONG (-2) for special pixels.

    VOID marks pixels with label IGNORE_INDEX and pixels that do not exist. WRONG marks ids outside 0 to num_classes -
    1.

    Shapes and units:
        label_ptrs: block of pointers, one per pixel, to labels of any integer dtype.
        exists: bool block, whether the pixel lies in the image and belongs to this program.
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


class Pixels(NamedTuple):
    """The labels and pixel weights of a problem, in the form in which kernels take them.

    Triton compiles a separate variant of a kernel for each combination of fields that are None.

    Attributes:
        labels: (B, H, W) class ids, or None without labels.
        gate, label_gate: (B, H, W) weights of pixels in KL and in CE, or None for ones.
        label_strides, gate_strides, label_gate_strides: (batch, row, column) strides of these tensors in elements, or
            None if the kernel takes the strides as separate arguments.
        class_weight: (C,) contiguous floats, or None for ones.
        num_classes: C.
        USE_CE, USE_KL, DISTILL_VOID, IGNORE_INDEX: Triton constants with the values of `LossProblem`.
        SMOOTH, FOCAL: constants, True with label smoothing and with the focal loss.
        WEIGHED: constant, True with CE pixel weights, label smoothing or the focal loss.
    """

    labels: Any
    label_strides: Any
    gate: Any
    gate_strides: Any
    label_gate: Any
    label_gate_strides: Any
    class_weight: Any
    num_classes: Any
    USE_CE: Any
    USE_KL: Any
    DISTILL_VOID: Any
    IGNORE_INDEX: Any
    SMOOTH: Any
    FOCAL: Any
    WEIGHED: Any


class Needs(NamedTuple):
    """The sizes of the buffers for intermediate results that one launch of a loss kernel needs, see `Buffers`.

    Attributes:
        programs: number of Triton programs of the launch. Each writes its sums of CE and KL to a row of
            `Buffers.partials`.
        scratch: number of float32 elements of `Buffers.scratch`, needed only to compute a gradient. `loss.add_up` still
            reads what `cells.cells_kernel` wrote there, so no later kernel may overwrite it.
    """

    programs: int
    scratch: int = 0


class Buffers(NamedTuple):
    """The memory that the loss kernels of one call share.

    Attributes:
        partials: (programs, 2) float64, the sums of weighted CE and KL of each program in nats. It has a row for each
            program of all kernels.
        scratch: float32 scratch that the kernels use one after the other, as large as the largest need. Empty if no
            gradient is computed.
        first: the first row of `partials` that belongs to the current kernel.
    """

    partials: Tensor
    scratch: Tensor
    first: int = 0


@triton.jit
def load_label_factors(pixels, factors_ptr):
    """Return (kept, part, parts, gamma), the constants of label smoothing and of the focal loss.

    kept is the share that a label keeps. part is the share that each class gets. parts is the sum over the classes of
    part times class weight. gamma is the exponent of the focal loss, or 0. Without smoothing, the first three are 1, 0
    and 0.

    Shapes and units:
        pixels: `Pixels`, the labels and pixel weights.
        factors_ptr: (8,) float32, `Prepared.factors`.
    """
    kept = 1.0
    part = 0.0
    parts = 0.0
    gamma = 0.0
    if pixels.SMOOTH:
        kept = tl.load(factors_ptr + 4)
        part = tl.load(factors_ptr + 5)
        parts = tl.load(factors_ptr + 6)
    if pixels.FOCAL:
        gamma = tl.load(factors_ptr + 7)
    return kept, part, parts, gamma


@triton.jit
def label_terms(pixels, label_factors, ce_weight, label_gate, log_sum, own, mix):
    """Return the weighted cross-entropy of a block of label pixels in bits, and the factors of its gradient.

    In nats, the gradient of this cross-entropy by the logit of class c is scale * p[c] - weight[c] * (even + pull) if c
    is the pixel's label. For another class, leave out pull. p[c] is the probability of class c, and weight[c] its class
    weight.

    Shapes and units:
        pixels: the labels, the pixel weights and the settings of the terms (`Pixels`). Only CE's settings are read.
        label_factors: (kept, part, parts, gamma) from `load_label_factors`.
        ce_weight: class weight of each pixel's label. label_gate: each pixel's own weight in CE. Both are from
            `load_pixel`, and label_gate is 0 for a pixel without a label.
        log_sum: log2 of the sum over classes of 2^x. x is a class's logit at T = 1 times log2(e), minus any number that
            the pixel's classes share.
        own: x of the pixel's label.
        mix: sum over classes of class weight * x. Read only with label smoothing.
    Returns: (cross-entropy, scale, pull, even), a float32 block each.
    """
    scale = ce_weight
    if pixels.label_gate is not None:
        scale = scale * label_gate
    pull = label_gate
    spread = label_gate * 0.0
    loss = (log_sum - own) * scale
    if pixels.SMOOTH:
        loss = loss * label_factors[0] + label_gate * (label_factors[2] * log_sum - label_factors[1] * mix)
        scale = scale * label_factors[0] + label_gate * label_factors[2]
        pull = label_gate * label_factors[0]
        spread = label_gate * label_factors[1]
    if pixels.FOCAL:
        sure = tl.exp2(own - log_sum)
        rest = 1.0 - sure
        counts = rest > 0
        rest = tl.where(counts, rest, 1.0)
        power = tl.where(counts, tl.exp2(label_factors[3] * tl.log2(rest)), 0.0)
        slope = power + label_factors[3] * (power / rest) * sure * (log_sum - own) * LN2
        loss = loss * power
        scale = scale * slope
        pull = pull * slope
    return loss, scale, pull, spread


@triton.jit
def load_pixel(pixels, label_ptrs, label_gate_ptrs, gate_ptrs, exists, in_view):
    """Return the labels of a block of pixels and their weights in CE and KL.

    Shapes and units:
        pixels: `Pixels`, the labels and pixel weights.
        label_ptrs, label_gate_ptrs, gate_ptrs: blocks of pointers of one shape. Ignored if the tensor is None in
            `pixels`.
        exists: bool block, whether the pixel lies in the image and belongs to this program.
        in_view: bool block, whether the pixel's centre lies in the target's view.
    Returns: (label, ce_weight, label_gate, kl_weight, ce_counted, kl_counted), a block each.
        label: int32, the class id, or 0 if the pixel is not labelled or its id is out of range.
        ce_weight: float32, class weight of the label, or 0 if the pixel is not labelled. NaN if the id is out of range.
        label_gate: float32, the pixel's own weight in CE if it is labelled, else 0.
        kl_weight: float32, the pixel's weight in KL if KL counts it, else 0.
        ce_counted, kl_counted: bool, whether each term counts the pixel, even with a weight of 0.
    """
    label = tl.zeros(exists.shape, tl.int32)
    ce_counted = exists != exists
    kl_counted = ce_counted
    ce_weight = tl.zeros(exists.shape, tl.float32)
    label_gate = ce_weight
    kl_weight = ce_weight
    taught = exists
    if pixels.labels is not None and (pixels.USE_CE or not pixels.DISTILL_VOID):
        ids = load_label(label_ptrs, exists, pixels.num_classes, pixels.IGNORE_INDEX)
        labelled = ids != VOID
        if not pixels.DISTILL_VOID:
            taught = labelled
        if pixels.USE_CE:
            ce_counted = labelled
            label = tl.maximum(ids, 0)
            if pixels.class_weight is not None:
                ce_weight = tl.load(pixels.class_weight + label, mask=ids >= 0, other=0.0).to(tl.float32)
            else:
                ce_weight = tl.where(ids >= 0, 1.0, 0.0)
            ce_weight = tl.where(ids == WRONG, float("nan"), ce_weight)
            if pixels.label_gate is not None:
                label_gate = tl.load(label_gate_ptrs, mask=ids >= 0, other=0).to(tl.float32)
            else:
                label_gate = tl.where(ids >= 0, 1.0, 0.0)
    if pixels.USE_KL:
        kl_counted = taught & in_view
        if pixels.gate is not None:
            kl_weight = tl.load(gate_ptrs, mask=kl_counted, other=0).to(tl.float32)
        else:
            kl_weight = tl.where(kl_counted, 1.0, 0.0)
    return label, ce_weight, label_gate, kl_weight, ce_counted, kl_counted


@triton.jit
def sum_pairs(pairs_ptr, num_pairs, BLOCK: tl.constexpr):
    """Return the sums of both columns (CE and KL) of a (num_pairs, 2) float64 tensor, reading BLOCK rows at a time.

    `pairs_ptr` points to the tensor.
    """
    ce = tl.zeros((BLOCK,), tl.float64)
    kl = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_pairs, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        exists = offs_n < num_pairs
        ce += tl.load(pairs_ptr + 2 * offs_n, mask=exists, other=0.0)
        kl += tl.load(pairs_ptr + 2 * offs_n + 1, mask=exists, other=0.0)
    return tl.sum(ce, 0), tl.sum(kl, 0)


@triton.jit
def take_turn(DEPENDENT: tl.constexpr):
    """Wait until the kernels before this one have ended, then allow the next kernel to start.

    Call it first in every kernel that is launched with the options of `dependent`. With DEPENDENT, a kernel may start
    before the previous one has ended, so it must not read or write memory before this call. Without DEPENDENT, it does
    nothing.
    """
    if DEPENDENT:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )


def gpu(device: torch.device) -> GPUTarget:
    """Return the compilation target of a device: backend ("cuda" or "hip"), architecture and lanes per warp.

    For the CPU, where Triton's interpreter runs kernels, return sm_90.
    """
    if device.type == "cpu":  # the interpreter
        return GPUTarget("cuda", 90, 32)
    target: GPUTarget = triton.runtime.driver.active.get_current_target()
    return target


def launch_options(lanes: int, registers: int, device: torch.device) -> dict[str, int]:
    """Return Triton launch options that give each of `lanes` lanes one thread.

    On NVIDIA, a thread uses at most `registers` registers.
    """
    target = gpu(device)
    options = {"num_warps": max(1, lanes // target.warp_size)}
    return options | {"maxnreg": registers} if target.backend == "cuda" else options


def dependent(device: torch.device) -> dict[str, Any]:
    """Return the launch options of a kernel that calls `take_turn`.

    On sm_90 or newer, they let the kernel start before the previous one has ended. Elsewhere, they switch `take_turn`
    off.
    """
    return _dependent_on(device) if device.type == "cuda" else _dependent(None if device.type == "cpu" else gpu(device))


@lru_cache
def _dependent_on(device: torch.device) -> dict[str, Any]:
    return _dependent(gpu(device))


def _dependent(target: GPUTarget | None) -> dict[str, Any]:
    if target is None or target.backend != "cuda" or target.arch < 90:
        return {"DEPENDENT": constant(False)}
    return {"DEPENDENT": constant(True), "launch_pdl": True}


def register_limit(default: int) -> int:
    """Return the largest number of registers that a lane of `cells_kernel` may use.

    The environment variable KDCACHE_CELLS_REGISTERS sets it. Without the variable, return `default`.

    Raises: ValueRangeError if the variable is not an integer from 32 to 255.
    """
    text = os.environ.get("KDCACHE_CELLS_REGISTERS", "")
    if not text:
        return default
    if not (text.isdecimal() and 32 <= int(text) <= 255):
        raise ValueRangeError(
            f"Invalid value of KDCACHE_CELLS_REGISTERS: {text!r}",
            fix=f"Leave it unset for {default}, or set 32 to 255. With 128, more warps share a multiprocessor.",
        )
    return int(text)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU.

    If `device` is the CPU (Triton's interpreter), return 132, the number of an H200.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def integer_power(temperature: float) -> int:
    """Return the temperature T as an int if it is 1, 2, 3 or 4, else 0.

    Kernels then compute exp(u) as exp(u / T) ** T, which saves an exponential.
    """
    return int(temperature) if temperature in (1, 2, 3, 4) else 0


def strides_of(problem: LossProblem) -> tuple[int, ...]:
    """Return the strides of a problem's labels, weights of pixels in CE, and weights of pixels in KL, in elements.

    The result is nine numbers: batch, row and column of each tensor, or 0 for a tensor that is None. Pass them to a
    kernel one by one. For strides in a tuple, Triton would compile a variant of the kernel for each choice of strides
    that are multiples of 16.
    """
    tensors = (problem.labels, problem.ce_pixel_weight, problem.pixel_weight)
    return tuple(stride for tensor in tensors for stride in ((0, 0, 0) if tensor is None else tensor.stride()))


def label_pixels(
    labels: Tensor | None, class_weight: Tensor | None, num_classes: int, ignore_index: int,
    *, use_ce: bool, use_kl: bool, distill_void: bool,
) -> Pixels:  # fmt: skip
    """Return the `Pixels` of a batch's labels, without pixel weights, label smoothing and focal loss.

    Args:
        labels: (B, H, W) class ids, or None without labels.
        class_weight: (C,) floats, or None for ones.
        num_classes: C.
        ignore_index: the label of void pixels.
        use_ce: whether CE is computed.
        use_kl: whether KL is computed.
        distill_void: whether KL counts void pixels. Without labels, it always does.
    """
    return Pixels(
        labels=labels,
        label_strides=None if labels is None else labels.stride(),
        gate=None,
        gate_strides=None,
        label_gate=None,
        label_gate_strides=None,
        class_weight=None if class_weight is None else class_weight.detach().contiguous(),
        num_classes=num_classes,
        USE_CE=constant(use_ce),
        USE_KL=constant(use_kl),
        DISTILL_VOID=constant(distill_void or labels is None),
        IGNORE_INDEX=constant(ignore_index),
        SMOOTH=constant(False),
        FOCAL=constant(False),
        WEIGHED=constant(False),
    )


def pixels_of(problem: LossProblem) -> Pixels:
    """Return the `Pixels` of a problem: its labels, its pixel weights and the settings of CE and KL."""
    gate, label_gate = problem.pixel_weight, problem.ce_pixel_weight
    pixels = label_pixels(
        problem.labels, problem.class_weight, problem.student.shape[1], problem.ignore_index,
        use_ce=problem.use_ce, use_kl=problem.use_kl, distill_void=problem.distill_void,
    )  # fmt: skip
    return pixels._replace(
        gate=_readable(gate),
        gate_strides=None if gate is None else gate.stride(),
        label_gate=_readable(label_gate),
        label_gate_strides=None if label_gate is None else label_gate.stride(),
        SMOOTH=constant(problem.label_smoothing > 0),
        FOCAL=constant(problem.focal_gamma > 0),
        WEIGHED=constant(label_gate is not None or problem.label_smoothing > 0 or problem.focal_gamma > 0),
    )


def _readable(gate: Tensor | None) -> Tensor | None:
    """Return a gate as uint8 if it is bool, which Triton does not support, else unchanged."""
    return gate.view(torch.uint8) if gate is not None and gate.dtype == torch.bool else gate
