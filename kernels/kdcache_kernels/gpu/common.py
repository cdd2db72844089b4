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
    """Return n / size, rounded up. Triton's own is also made for kernels, and takes the host ten times as long."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """Return the lowest power of two from n on."""
    return 1 << (n - 1).bit_length()


@lru_cache(typed=True)
def constant(value: Any) -> tl.constexpr:
    """Return a constant for a kernel, always the same object, so Triton's look-up of variants is free."""
    return tl.constexpr(value)


LN2 = tl.constexpr(0.6931471805599453)
VOID = tl.constexpr(-1)
WRONG = tl.constexpr(-2)


@triton.jit
def power(x, POWER: tl.constexpr):
    """Return x to the POWER, 1 to 4."""
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
    """Return class ids of a block of pixels, int32: VOID if ignored or not there, WRONG if out of range.

    `label_ptrs` is a block of pointers of any integer type. `exists` tells whether the pixel lies in the image and
    belongs to this program.
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
    """The label pixels of a problem as every kernel takes them; what is None at a launch is no part of its variant.

    Attributes:
        labels, gate, label_gate: tensors (pointers in a kernel) of labels and of KL's and CE's weights of pixels; None
            without.
        label_strides, gate_strides, label_gate_strides: (batch, row, column), or None if a kernel takes them by
            themselves.
        class_weight: contiguous, or None without.
        num_classes: C.
        USE_CE, USE_KL, DISTILL_VOID, IGNORE_INDEX: constants, as in `LossProblem`.
        SMOOTH, FOCAL: constants, whether labels are smoothed and the loss is focal; see `label_terms`.
        WEIGHED: constant, whether what a label pulls at its logit is more than its class weight.
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
    """What a loss kernel needs next to its problem.

    Attributes:
        programs: each of which leaves its sums of CE and KL.
        scratch: float32 elements for a gradient, while it runs (of cells, until its edges are added up).
    """

    programs: int
    scratch: int = 0


class Buffers(NamedTuple):
    """What the loss kernels of a call share.

    Attributes:
        partials: (P, 2) float64, partial sums of the pixels' weighted CE and KL, in nats.
        scratch: float32, of the largest need: kernels use it one after the other. Empty without a gradient.
        first: the row of `partials` that is the kernel's first.
    """

    partials: Tensor
    scratch: Tensor
    first: int = 0


@triton.jit
def load_label_factors(pixels, factors_ptr):
    """Return the label's share after smoothing, each class's part, the sum of the parts over the classes, and gamma.

    The first three are 1, 0 and 0 without smoothing.
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
    """Return cross-entropy of a block of pixels in units of log2, and the factors of its gradient.

    Shapes and units:
        ce_weight, label_gate: as `load_pixel` returns them.
        log_sum, own, mix: log2 of the sum of the exponentials, the label's logit, and the sum over the classes of class
            weight * logit where labels are smoothed; base 2 at T = 1, relative to the same.
    Returns: the loss; what multiplies the probabilities; what pulls at the label's logit, but for its class weight and
        what smoothing takes of it; what pulls at every class, but for its weight.
    """
    whole = ce_weight
    if pixels.label_gate is not None:
        whole = whole * label_gate
    pull = label_gate
    spread = label_gate * 0.0
    loss = (log_sum - own) * whole
    if pixels.SMOOTH:
        loss = loss * label_factors[0] + label_gate * (label_factors[2] * log_sum - label_factors[1] * mix)
        whole = whole * label_factors[0] + label_gate * label_factors[2]
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
        whole = whole * slope
        pull = pull * slope
    return loss, whole, pull, spread


@triton.jit
def load_pixel(pixels, label_ptrs, label_gate_ptrs, gate_ptrs, exists, in_view):
    """Return the weights of a block of pixels in both terms.

    Shapes and units:
        label_ptrs, label_gate_ptrs, gate_ptrs: blocks of pointers of one shape; unused where there are none.
        exists: bool block: the pixel lies in the image and is this program's.
        in_view: bool block: its centre lies in the target's view.
    Returns: blocks
        label: int32, the class id, or 0 if the pixel is not labelled or its id is out of range.
        ce_weight: float32, class weight of a labelled pixel, else 0, or NaN if the id is out of range.
        label_gate: float32, CE's weight of a labelled pixel, else 0.
        kl_weight: float32, gate of a pixel that KL counts, else 0.
        ce_counted, kl_counted: bool, whether the terms count the pixel, whatever it weighs.
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
    """Return the sums over a (num_pairs, 2) float64 tensor of the programs' CE and KL."""
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
    """Wait for the kernels before this one, then let the next one be launched.

    This is the first statement of every kernel of a call. A kernel with DEPENDENT may start before the one before it
    has ended, so it must read and write nothing earlier. As each one waits, the last one waits for all of them.
    "memory" keeps the compiler from moving a read up.
    """
    if DEPENDENT:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )


def gpu(device: torch.device) -> GPUTarget:
    """Return the target of compilation: NVIDIA's or AMD's compiler, and how many lanes a warp has (64 on a CDNA)."""
    if device.type == "cpu":  # the interpreter
        return GPUTarget("cuda", 90, 32)
    target: GPUTarget = triton.runtime.driver.active.get_current_target()
    return target


def launch_options(lanes: int, registers: int, device: torch.device) -> dict[str, int]:
    """Return launch options: a thread per lane, with a limit of registers (which AMD's compiler lacks)."""
    target = gpu(device)
    options = {"num_warps": max(1, lanes // target.warp_size)}
    return options | {"maxnreg": registers} if target.backend == "cuda" else options


def dependent(device: torch.device) -> dict[str, Any]:
    """Return options of a launch whose kernel takes its turn: programmatic dependent launch, from sm_90 on."""
    return _dependent_on(device) if device.type == "cuda" else _dependent(None if device.type == "cpu" else gpu(device))


@lru_cache
def _dependent_on(device: torch.device) -> dict[str, Any]:
    return _dependent(gpu(device))


def _dependent(target: GPUTarget | None) -> dict[str, Any]:
    if target is None or target.backend != "cuda" or target.arch < 90:
        return {"DEPENDENT": constant(False)}
    return {"DEPENDENT": constant(True), "launch_pdl": True}


def register_limit(default: int) -> int:
    """Return the registers of a lane of the kernel for aligned cells, at most: of the environment, or the default.

    Raises: ValueRangeError for one that no GPU has.
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
    """Return the number of multiprocessors of the GPU, or an H200's for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def integer_power(temperature: float) -> int:
    """Return POWER: T if exp(u) = exp(u / T) ** T saves an exponential at acceptable rounding, else 0."""
    return int(temperature) if temperature in (1, 2, 3, 4) else 0


def strides_of(problem: LossProblem) -> tuple[int, ...]:
    """Return strides (batch, row, column) of the labels and the two gates, or 0, to pass separately from `Pixels`.

    Triton makes a variant for every divisibility of an integer in a tuple, but not for these.
    """
    tensors = (problem.labels, problem.ce_pixel_weight, problem.pixel_weight)
    return tuple(stride for tensor in tensors for stride in ((0, 0, 0) if tensor is None else tensor.stride()))


def label_pixels(
    labels: Tensor | None, class_weight: Tensor | None, num_classes: int, ignore_index: int,
    *, use_ce: bool, use_kl: bool, distill_void: bool,
) -> Pixels:  # fmt: skip
    """Return label pixels without weights in the form of the kernels."""
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
    """Return the label pixels of a problem in the form of the kernels."""
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
    """Return a gate with a dtype that Triton supports."""
    return gate.view(torch.uint8) if gate is not None and gate.dtype == torch.bool else gate
