"""The Triton loss kernel without a resize: the student's logits have label size, and a target pixel meets each.

Image classification (h = w = 1) and full-resolution heads, also under whole-pixel windows and flips. The classes run
twice in blocks, for the sums of the softmaxes and for the gradient; nothing of size C is kept, and the second loop
reads the logits mostly from the cache. Without interpolation, the largest of the normalised logits is 0 at every pixel:
no maximum is searched, and any range will do. A class of a pixel costs 25 instructions at T = 2 (sm_90) and at least
12 bytes of memory, which bound it: 0.25 ms at 16 x 21 x 512^2 and the 4.3 TB/s of an H200.

Blocks are classes by pixels. A lane has four neighbouring pixels of an image and two classes of them at a time, so that
it loads 16 bytes at once and sums up classes without reading another lane. With h = w = 1 it is the classes that are
contiguous: a block is then up to 1024 classes of one pixel, or all classes of a few.

Legend: B batch, C classes, h w label size and the student's, ht wt the target's; u, v the student's and the target's
base-2 logits / T. Blocks: c classes, n pixels.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..problem import LossProblem
from .common import (
    LN2,
    Buffers,
    Needs,
    cdiv,
    dependent,
    integer_power,
    label_terms,
    load_label_factors,
    load_pixel,
    multiprocessors,
    pixels_of,
    power,
    power_of_2,
    take_turn,
)
from .geometry import target_tables
from .prepared import Prepared
from .sample import LOWEST_LOGIT, SMALL

CLASSES, PIXELS = 2, 128
"""Classes and pixels of an image that a program does at once."""
ROW = 1024
"""Classes that a program does at once where they are contiguous."""


@triton.jit
def _load_block(base_n, exists_n, start, num_classes, plane, absent, BLOCK_C: tl.constexpr):
    """Return logits of a block of classes and pixels, with `absent` for missing classes or pixels."""
    c = start + tl.arange(0, BLOCK_C)
    mask = (c < num_classes)[:, None] & exists_n[None, :]
    return tl.load(base_n[None, :] + (c * plane)[:, None], mask=mask, other=absent)


@triton.jit
def _sums(
    student_n, target_n, exists_n, pixels, plane, target_plane, temperature, absent_u,
    POWER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return sums over the classes of 2^(T u), 2^u, 2^v and SMALL * 2^v (v - u)."""
    s1 = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    su = s1
    sv = s1
    cross = s1
    for start in range(0, pixels.num_classes, BLOCK_C):
        u = _load_block(student_n, exists_n, start, pixels.num_classes, plane, absent_u, BLOCK_C)
        if pixels.USE_KL:
            v = _load_block(target_n, exists_n, start, pixels.num_classes, target_plane, LOWEST_LOGIT, BLOCK_C)
            eu = tl.exp2(u)
            ev = tl.exp2(v)
            su += eu
            sv += ev
            cross += ev * SMALL * (v - u)
        if pixels.USE_CE:
            s1 += power(eu, POWER) if POWER > 0 else tl.exp2(temperature * u)
    return tl.sum(s1, 0), tl.sum(su, 0), tl.sum(sv, 0), tl.sum(cross, 0)


@triton.jit
def _gradient(
    student_n, target_n, gradient_n, exists_n, label, k_ce, pull, even, a, ku, kv, pixels, plane, target_plane,
    temperature, absent_u, POWER: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write a 2^(T u) + ku 2^u - kv 2^v, less what pulls at the label's class (-1: none) and at all classes."""
    for start in range(0, pixels.num_classes, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        exists_c = c < pixels.num_classes
        u = _load_block(student_n, exists_n, start, pixels.num_classes, plane, absent_u, BLOCK_C)
        if pixels.USE_KL:
            v = _load_block(target_n, exists_n, start, pixels.num_classes, target_plane, LOWEST_LOGIT, BLOCK_C)
            eu = tl.exp2(u)
            factor = ku[None, :]
            if pixels.USE_CE and POWER == 1:
                factor += a[None, :]
            if pixels.USE_CE and POWER > 1:
                factor += a[None, :] * power(eu, POWER - 1)
            g = eu * factor - tl.exp2(v) * kv[None, :]
            if pixels.USE_CE and POWER == 0:
                g += a[None, :] * tl.exp2(temperature * u)
        else:
            g = a[None, :] * tl.exp2(temperature * u)
        if pixels.USE_CE:
            k_label_c = tl.zeros((BLOCK_C,), tl.float32) + k_ce
            if pixels.class_weight is not None:
                k_label_c *= tl.load(pixels.class_weight + c, mask=exists_c, other=0.0).to(tl.float32)
            k_label_cn = k_label_c[:, None]
            if pixels.SMOOTH:
                g -= k_label_cn * even[None, :]
            if pixels.WEIGHED:
                k_label_cn = k_label_cn * pull[None, :]
            g -= tl.where(c[:, None] == label[None, :], k_label_cn, 0.0)
        gradient_ptrs = gradient_n[None, :] + (c * plane)[:, None]
        tl.store(gradient_ptrs, g.to(gradient_ptrs.dtype.element_ty), mask=exists_c[:, None] & exists_n[None, :])


@triton.jit
def _target_pixels(at_n, exists_n, image, route_ptr, tables_ptr, target_batch, h, w, ht, wt, MOVED: tl.constexpr):
    """Return the target's pixel that each of an image's pixels `at_n` meets, and whether it lies in the view."""
    if not MOVED:
        return at_n, exists_n
    i = at_n // w
    j = at_n % w
    route_ptr += 4 * image
    row = tl.load(route_ptr + 1) + i
    column = tl.load(route_ptr + 2) + tl.where(tl.load(route_ptr + 3) != 0, w - 1 - j, j)
    target_at_n = tl.minimum(tl.maximum(row, 0), ht - 1) * wt + tl.minimum(tl.maximum(column, 0), wt - 1)
    rows, columns = target_tables(tables_ptr, h, w, target_batch)
    row_inside = tl.load(rows.inside + image * h + i, mask=exists_n, other=0)
    column_inside = tl.load(columns.inside + image * w + j, mask=exists_n, other=0)
    return target_at_n, (row_inside & column_inside) != 0


@triton.jit(do_not_specialize=["batch", "target_batch", "first_partial", "h", "ht", "wt", "image_blocks", "num_blocks"])
def pixels_kernel(
    student_ptr, student_lost_ptr, target_ptr, target_lost_ptr, tables_ptr, route_ptr, factors_ptr, mix_ptr,
    gradient_ptr, partials_ptr, first_partial, pixels, plane, target_plane, batch, target_batch, h, w, ht, wt,
    image_blocks, num_blocks, temperature,
    MOVED: tl.constexpr, SINGLE: tl.constexpr, POWER: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Compute the fused CE + KL loss and its gradient for student logits of label size.

    Nothing is interpolated: each student logit meets exactly one target logit. Of N programs, each handles every N-th
    block of BLOCK_N pixels. Images with route 0 are skipped, because the kernel `tiles` computes them.

    Shapes and units:
        student_ptr, target_ptr: (B, C, h, w) and (B, C, ht, wt) float32 logits, normalised as in `Prepared`.
        student_lost_ptr, target_lost_ptr: (B, h, w) and (B, ht, wt) uint8, 1 where a logit is unusable.
        tables_ptr, route_ptr, factors_ptr, mix_ptr, target_batch: the fields of `Prepared` with these names.
        pixels: `Pixels`, labels and pixel weights. batch: B. temperature: T.
        plane, target_plane: h * w and ht * wt. image_blocks, num_blocks: blocks per image, and of all images.
        MOVED: whether there is a window or a flip. SINGLE: whether images have one pixel, so a block has many images.
        POWER: T if it is 1 to 4 and both terms are computed, else 0.
        DEPENDENT: whether the kernel may start before the previous one ends.
        BLOCK_N, BLOCK_C: pixels of a block, and classes that are read at a time.
    Results:
        gradient_ptr: (B, C, h, w), or None for no gradient.
        partials_ptr: `Buffers.partials`. Row first_partial + program gets the program's sums of CE and KL in nats.
    """
    take_turn(DEPENDENT)
    pid = tl.program_id(0)
    k_ce = tl.load(factors_ptr)
    k_kl = tl.load(factors_ptr + 1)
    label_factors = load_label_factors(pixels, factors_ptr)
    absent_u = LOWEST_LOGIT / tl.maximum(temperature, 1.0)
    ce_sum = tl.zeros((BLOCK_N,), tl.float64)
    kl_sum = tl.zeros((BLOCK_N,), tl.float64)
    for block in range(pid, num_blocks, tl.num_programs(0)):
        if SINGLE:
            image = block * BLOCK_N + tl.arange(0, BLOCK_N)
            at = image * 0
            exists = image < batch
            image = tl.minimum(image, batch - 1)
        else:
            # Pixels of one image follow each other, and the compiler sees it: it loads four of them at once.
            image = block // image_blocks
            at = block % image_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
            exists = at < plane
        # As blocks, because the interpreter makes no mask of a block's mask and a scalar's.
        exists = exists & (tl.load(route_ptr + 4 * (image + at * 0)) == 1)
        if tl.max(exists.to(tl.int32), 0) > 0:
            image64 = tl.full((), 1, tl.int64) * image
            student_n = student_ptr + image64 * pixels.num_classes * plane + at
            lost = tl.load(student_lost_ptr + image64 * plane + at, mask=exists, other=0)
            target_n = student_n
            in_view = exists
            if pixels.USE_KL:
                target_at, in_view = _target_pixels(
                    at, exists, image, route_ptr, tables_ptr, target_batch, h, w, ht, wt, MOVED
                )
                target_n = target_ptr + image64 * pixels.num_classes * target_plane + target_at
                target_lost = tl.load(target_lost_ptr + image64 * target_plane + target_at, mask=exists, other=0)
            s1, su, sv, cross = _sums(
                student_n, target_n, exists, pixels, plane, target_plane, temperature, absent_u, POWER, BLOCK_C, BLOCK_N
            )
            i = (at // w).to(tl.int64)
            j = (at % w).to(tl.int64)
            label_ptrs = pixels.labels
            if label_ptrs is not None:
                stride_b, stride_h, stride_w = pixels.label_strides
                label_ptrs += image64 * stride_b + i * stride_h + j * stride_w
            gate_ptrs = pixels.gate
            if gate_ptrs is not None:
                stride_b, stride_h, stride_w = pixels.gate_strides
                gate_ptrs += image64 * stride_b + i * stride_h + j * stride_w
            label_gate_ptrs = pixels.label_gate
            if label_gate_ptrs is not None:
                stride_b, stride_h, stride_w = pixels.label_gate_strides
                label_gate_ptrs += image64 * stride_b + i * stride_h + j * stride_w
            label, ce_weight, label_gate, kl_weight, ce_counted, kl_counted = load_pixel(
                pixels, label_ptrs, label_gate_ptrs, gate_ptrs, exists, in_view
            )
            a = s1
            pull = s1
            even = s1
            ku = s1
            kv = s1
            if pixels.USE_CE:
                ce_weight = ce_weight.to(tl.float32)
                s1 = tl.where(exists, s1, 1.0)
                u_label = tl.load(student_n + label * plane, mask=exists, other=0.0)
                mix = u_label
                if mix_ptr is not None:
                    mix = tl.load(mix_ptr + image64 * plane + at, mask=exists, other=0.0)
                ce, scale, pull, even = label_terms(
                    pixels, label_factors, ce_weight, label_gate, tl.log2(s1), temperature * u_label, temperature * mix
                )
                ce_sum += tl.where(ce_counted & (lost != 0), float("nan"), LN2 * ce).to(tl.float64)
                label = tl.where(ce_counted, label, -1)
                a = k_ce * scale / s1
            if pixels.USE_KL:
                su = tl.where(exists, su, 1.0)
                sv = tl.where(exists, sv, 1.0)
                kl = LN2 * (cross / sv / SMALL + tl.log2(su / sv)) * kl_weight
                kl_sum += tl.where(kl_counted & ((lost | target_lost) != 0), float("nan"), kl).to(tl.float64)
                ku = k_kl * kl_weight / su
                kv = k_kl * kl_weight / sv
            if gradient_ptr is not None:
                gradient_n = gradient_ptr + image64 * pixels.num_classes * plane + at
                _gradient(
                    student_n, target_n, gradient_n, exists, label, k_ce, pull, even, a, ku, kv, pixels, plane,
                    target_plane, temperature, absent_u, POWER, BLOCK_C,
                )  # fmt: skip
    partials_ptr += 2 * (first_partial + pid)
    tl.store(partials_ptr, tl.sum(ce_sum, 0))
    tl.store(partials_ptr + 1, tl.sum(kl_sum, 0))


class Tiling(NamedTuple):
    """How `pixels_kernel` divides the work. Only `classes` can change bits of the gradient.

    Attributes:
        classes, pixels: classes and pixels of a block, a power of two each.
        programs: the largest number of programs to launch.
        num_warps: warps per program.
    """

    classes: int
    pixels: int
    programs: int
    num_warps: int


def choose_tiling(problem: LossProblem) -> Tiling:
    """Return the `Tiling` of a problem.

    For images of several pixels, one warp handles a block, with four neighbouring pixels per lane. For images of one
    pixel, whose classes are contiguous in memory, four warps share a block along the classes.
    """
    C, h, w = problem.student.shape[1:]
    classes = power_of_2(C)
    processors = multiprocessors(problem.student.device)
    if h * w > 1:
        return Tiling(min(CLASSES, classes), PIXELS, 32 * processors, 1)
    classes = min(ROW, classes)
    return Tiling(classes, ROW // classes, 16 * processors, 4)


def _blocks(problem: LossProblem, tiling: Tiling) -> tuple[int, int]:
    """Return the number of blocks of an image, and of all images."""
    B, _, h, w = problem.student.shape
    if h * w == 1:
        return 1, cdiv(B, tiling.pixels)
    image_blocks = cdiv(h * w, tiling.pixels)
    return image_blocks, B * image_blocks


def needs(problem: LossProblem, tiling: Tiling) -> Needs:
    """Return the number of programs that `launch` starts for this problem and tiling, with no scratch memory."""
    return Needs(min(_blocks(problem, tiling)[1], tiling.programs))


def launch(problem: LossProblem, prepared: Prepared, gradient: Tensor | None, buffers: Buffers, tiling: Tiling) -> None:
    """Launch `pixels_kernel`, which computes the loss of the images with route 1 (see `Prepared.route`).

    The kernel writes sums of CE and KL to `buffers.partials`, which `loss.add_up` adds up.

    Shapes and units:
        problem, prepared: the checked arguments, and the result of `prepare` for them. Its `stride` must be 1.
        gradient: (B, C, h, w) contiguous result, written for images with route 1. None computes no gradient.
        buffers: memory of the size that `needs` returns.
        tiling: from `choose_tiling`.
    """
    B, _, h, w = problem.student.shape
    ht, wt = prepared.target.shape[2:]
    image_blocks, num_blocks = _blocks(problem, tiling)
    pixels_kernel[(needs(problem, tiling).programs,)](
        prepared.student, prepared.student_lost, prepared.target, prepared.target_lost, prepared.tables,
        prepared.route, prepared.factors, prepared.mix, gradient, buffers.partials, buffers.first, pixels_of(problem),
        h * w, ht * wt, B, prepared.target_batch, h, w, ht, wt, image_blocks, num_blocks, problem.temperature,
        MOVED=problem.window is not None or problem.flip is not None, SINGLE=h * w == 1,
        POWER=integer_power(problem.temperature) if problem.use_ce and problem.use_kl else 0,
        BLOCK_C=tiling.classes, BLOCK_N=tiling.pixels, num_warps=tiling.num_warps, enable_fp_fusion=True,
        **dependent(problem.student.device),
    )  # fmt: skip
