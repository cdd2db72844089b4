"""The loss of relations on CUDA: a cell of the target per lane, dynamic loops over the classes, no wait for the device.

Six launches at most: tables of neighbours (with a window, a flip or two grids) and weights of cells (where they may be
unequal) of `cells.py`, relations, classes, totals, gradient; one more carries the gradient back to a student's
own grid. Probabilities are never written: the second walk computes them again from seven numbers per cell.

Sums over cells are made of blocks: in each, the products of a class are centred on its own mean there, and classes
puts blocks together in float64. All of what is added is positive, so that nothing cancels however even a class is. No
class is held, so C has no limit and nothing is padded; no atomics, and every sum has one order.

Legend: B batch, C classes, H W the image, hs ws the student's own size, h w the target's cells, N blocks of cells.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...on_cells.problem import EPS, MOMENTS, RelationProblem, largest_logit
from .cells import ENTRIES, LOG2_E, Laid, cells_of_program, check_offsets, corners, lay, logit, on_own_grid, take, weigh

VARIANCE = tl.constexpr(EPS)
PLANES = 7
"""Numbers that the second walk reads of each cell; see `relations_kernel`."""


@triton.jit
def _probability(x, limit, scale, top, inverse):
    """Return a class's probability. A lost logit counts as 0, to stay a number."""
    return tl.exp2((tl.where(tl.abs(x) <= limit, x, 0.0) - top) * scale) * inverse


@triton.jit(
    do_not_specialize=[
        "s_stride_b", "s_stride_h", "t_stride_b", "t_stride_h", "num_classes", "h", "w", "blocks", "num_blocks",
    ],
)  # fmt: skip
def relations_kernel(
    student, s_stride_b, s_stride_c, s_stride_h, s_stride_w, teacher, t_stride_b, t_stride_c, t_stride_h, t_stride_w,
    t_batched, counted_ptr, weight_ptr, cells_ptr, blocks_ptr, inter_ptr, num_classes, h, w, plane, blocks, num_blocks,
    limit, scale,
    S_FLAT: tl.constexpr, T_FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run the forward pass of the relation loss. One program handles BLOCK target cells of one image.

    In each cell, p and q are the student's and the teacher's probabilities of a class, and r is their correlation over
    the C classes. The derivative of r by p is slope * ((q - 1/C) - pull * (p - 1/C)). N is the number of programs.

    Shapes and units:
        student, teacher: logit maps with their neighbour tables (`Samples`), each followed by the map's strides (image,
            class, row, column) in elements.
        t_batched: 1 if the teacher's neighbour tables differ between images, else 0.
        counted_ptr, weight_ptr: (B, h, w) counted share and weight of each cell, or None if each is 1.
        plane: h * w. blocks: programs per image. num_blocks: N.
        limit: the largest magnitude of a usable logit. A cell with another logit is lost. scale: log2(e) / T.
        S_FLAT, T_FLAT: whether rows of the student's and the teacher's logits follow each other without a gap.
    Results:
        cells_ptr: (B, 7, h * w) float32, seven numbers per cell: the student's largest logit, 1 / the student's sum of
            exponentials, the same two numbers of the teacher, the cell's weight, slope and pull. The weight is NaN for
            a lost cell that counts.
        blocks_ptr: (6, C, N) float32, each program's moments, see `RelationProblem.moments`. Weights are written for
            class 0 only.
        inter_ptr: (N,) float64, the sum of (the cell's weight) * (1 - r) over each program's cells.
    """
    image, cell_n, exists = cells_of_program(plane, blocks, BLOCK)
    image64, program = image.to(tl.int64), tl.program_id(0)
    S_SAMPLED: tl.constexpr = student.rows is not None
    T_SAMPLED: tl.constexpr = teacher.rows is not None
    s_corners = corners(student, image, 0, cell_n, h, w, s_stride_h, s_stride_w, S_FLAT)
    t_corners = corners(teacher, image, t_batched, cell_n, h, w, t_stride_h, t_stride_w, T_FLAT)
    s_start, t_start = student.logits + image64 * s_stride_b, teacher.logits + image64 * t_stride_b

    s_top = tl.full((BLOCK,), -3e38, tl.float32)
    t_top = s_top
    s_sum = tl.zeros((BLOCK,), tl.float32)
    t_sum = s_sum
    lost = tl.zeros((BLOCK,), tl.int32)
    s_ptr, t_ptr = s_start, t_start
    for _ in range(num_classes):
        s_top, s_sum, lost = take(logit(s_ptr, s_corners, exists, S_SAMPLED), limit, scale, s_top, s_sum, lost)
        t_top, t_sum, lost = take(logit(t_ptr, t_corners, exists, T_SAMPLED), limit, scale, t_top, t_sum, lost)
        s_ptr += s_stride_c
        t_ptr += t_stride_c
    s_inverse, t_inverse = 1.0 / s_sum, 1.0 / t_sum

    weight = weigh(counted_ptr, weight_ptr, image64 * plane + cell_n, exists, lost)
    total = tl.sum(weight, 0)
    share = weight * tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))

    even = 1.0 / num_classes
    st = tl.zeros((BLOCK,), tl.float32)
    ss = st
    tt = st
    s_ptr, t_ptr, block_ptr = s_start, t_start, blocks_ptr + program
    tl.store(block_ptr, total)
    for _ in range(num_classes):
        p = _probability(logit(s_ptr, s_corners, exists, S_SAMPLED), limit, scale, s_top, s_inverse)
        q = _probability(logit(t_ptr, t_corners, exists, T_SAMPLED), limit, scale, t_top, t_inverse)
        a, b = p - even, q - even
        st += a * b
        ss += a * a
        tt += b * b
        s_mean, t_mean = tl.sum(share * p, 0), tl.sum(share * q, 0)
        a, b = p - s_mean, q - t_mean
        wa, wb = weight * a, weight * b
        step = num_classes * num_blocks
        # A class that is alike everywhere has exactly its value as its mean: its factors reach 1 / EPS.
        tl.store(block_ptr + step, s_mean + tl.sum(share * a, 0))
        tl.store(block_ptr + 2 * step, t_mean + tl.sum(share * b, 0))
        tl.store(block_ptr + 3 * step, tl.sum(wa * b, 0))
        tl.store(block_ptr + 4 * step, tl.sum(wa * a, 0))
        tl.store(block_ptr + 5 * step, tl.sum(wb * b, 0))
        s_ptr += s_stride_c
        t_ptr += t_stride_c
        block_ptr += num_blocks

    s_varied, t_varied = ss + VARIANCE, tt + VARIANCE
    slope = 1.0 / tl.sqrt(s_varied * t_varied)
    tl.store(inter_ptr + program, tl.sum(tl.where(exists, weight * (1.0 - st * slope), 0.0).to(tl.float64), 0))
    cell_ptrs = cells_ptr + image64 * 7 * plane + cell_n
    tl.store(cell_ptrs, s_top, mask=exists)
    tl.store(cell_ptrs + plane, s_inverse, mask=exists)
    tl.store(cell_ptrs + 2 * plane, t_top, mask=exists)
    tl.store(cell_ptrs + 3 * plane, t_inverse, mask=exists)
    tl.store(cell_ptrs + 4 * plane, weight, mask=exists)
    tl.store(cell_ptrs + 5 * plane, slope, mask=exists)
    tl.store(cell_ptrs + 6 * plane, st / s_varied, mask=exists)


@triton.jit(do_not_specialize=["num_classes", "num_blocks", "num_counts", "cells"])
def classes_kernel(
    blocks_ptr, inter_ptr, counts_ptr, count_ptr, shared_ptr, moments_ptr, factors_ptr, intra_ptr, sums_ptr,
    num_classes, num_blocks, num_counts, cells, gamma,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Combine the partial sums of `relations_kernel` into the two correlations of the relation loss.

    Program c < C handles class c. p and q are the student's and the teacher's probabilities of the class, and r is
    their correlation over the cells. Program C, the last, adds up the sums over cells.

    Shapes and units:
        blocks_ptr, inter_ptr: (6, C, num_blocks) and (num_blocks,), results of `relations_kernel`.
        counts_ptr: (num_counts,) float64, whose sum is the number of counted cells. None if all cells count.
        cells: the number of all cells. It is the count if `counts_ptr` is None.
        count_ptr: one float, the number of counted cells to divide by. None takes it from `counts_ptr` or `cells`.
        shared_ptr: (6, C) float64 moments of the whole batch, or None if this process has the whole batch.
        gamma: weight of the correlation over the cells. BLOCK: partial sums that are read at a time.
    Results:
        moments_ptr: (6, C) float64, the moments of this process's cells, see `RelationProblem.moments`.
        factors_ptr: (4, C) float32: mean of p, mean of q, and two factors f and g. In a cell, gamma / C * r has the
            derivative m * (f * (q - mean of q) - g * (p - mean of p)) by p. m is the cell's weight.
        intra_ptr: (C,) float64, 1 - r.
        sums_ptr: (2,) float64: the sum over the cells of (the cell's weight) * (1 - correlation over the classes), and
            1 / the number of counted cells.
    """
    c = tl.program_id(0)
    step = num_classes * num_blocks
    if c == num_classes:
        inter, count = tl.full((BLOCK,), 0.0, tl.float64), tl.full((BLOCK,), 0.0, tl.float64)
        for start in range(0, num_blocks, BLOCK):
            offs_n = start + tl.arange(0, BLOCK)
            inter += tl.load(inter_ptr + offs_n, mask=offs_n < num_blocks, other=0.0)
        total = cells * tl.full((), 1.0, tl.float64)
        if counts_ptr is not None:
            for start in range(0, num_counts, BLOCK):
                offs_n = start + tl.arange(0, BLOCK)
                count += tl.load(counts_ptr + offs_n, mask=offs_n < num_counts, other=0.0)
            total = tl.sum(count, 0)
        if count_ptr is not None:
            total = tl.load(count_ptr).to(tl.float64)
        tl.store(sums_ptr, tl.sum(inter, 0))
        tl.store(sums_ptr + 1, tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total)))
        return
    block_ptr = blocks_ptr + c * num_blocks
    zero = tl.full((BLOCK,), 0.0, tl.float64)
    weight, s, t = zero, zero, zero
    for start in range(0, num_blocks, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        exists = offs_n < num_blocks
        block_weight = tl.load(blocks_ptr + offs_n, mask=exists, other=0.0).to(tl.float64)
        weight += block_weight
        s += block_weight * tl.load(block_ptr + step + offs_n, mask=exists, other=0.0)
        t += block_weight * tl.load(block_ptr + 2 * step + offs_n, mask=exists, other=0.0)
    total = tl.sum(weight, 0)
    inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    s_mean, t_mean = tl.sum(s, 0) * inverse, tl.sum(t, 0) * inverse
    st_n, ss_n, tt_n = zero, zero, zero
    for start in range(0, num_blocks, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        exists = offs_n < num_blocks
        block_weight = tl.load(blocks_ptr + offs_n, mask=exists, other=0.0).to(tl.float64)
        a = tl.load(block_ptr + step + offs_n, mask=exists, other=0.0) - s_mean
        b = tl.load(block_ptr + 2 * step + offs_n, mask=exists, other=0.0) - t_mean
        st_n += tl.load(block_ptr + 3 * step + offs_n, mask=exists, other=0.0) + block_weight * a * b
        ss_n += tl.load(block_ptr + 4 * step + offs_n, mask=exists, other=0.0) + block_weight * a * a
        tt_n += tl.load(block_ptr + 5 * step + offs_n, mask=exists, other=0.0) + block_weight * b * b
    st, ss, tt = tl.sum(st_n, 0), tl.sum(ss_n, 0), tl.sum(tt_n, 0)
    moments_ptr += c
    tl.store(moments_ptr, total)
    tl.store(moments_ptr + num_classes, s_mean)
    tl.store(moments_ptr + 2 * num_classes, t_mean)
    tl.store(moments_ptr + 3 * num_classes, st)
    tl.store(moments_ptr + 4 * num_classes, ss)
    tl.store(moments_ptr + 5 * num_classes, tt)
    if shared_ptr is not None:
        shared_ptr += c
        total = tl.load(shared_ptr)
        s_mean = tl.load(shared_ptr + num_classes)
        t_mean = tl.load(shared_ptr + 2 * num_classes)
        st = tl.load(shared_ptr + 3 * num_classes)
        ss = tl.load(shared_ptr + 4 * num_classes)
        tt = tl.load(shared_ptr + 5 * num_classes)
    inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    ss = ss * inverse + VARIANCE
    slope = 1.0 / tl.sqrt(ss * (tt * inverse + VARIANCE))
    st *= inverse
    tl.store(intra_ptr + c, tl.where(total == 0, 0.0, 1.0 - st * slope))
    by_teacher = gamma * inverse * slope / num_classes
    factors_ptr += c
    tl.store(factors_ptr, s_mean.to(tl.float32))
    tl.store(factors_ptr + num_classes, t_mean.to(tl.float32))
    tl.store(factors_ptr + 2 * num_classes, by_teacher.to(tl.float32))
    tl.store(factors_ptr + 3 * num_classes, (by_teacher * st / ss).to(tl.float32))


@triton.jit
def _pull(p, q, even, steep, lean, weight, factors_ptr, num_classes):
    """Return the gradient of a class by the student's probability."""
    s_mean, t_mean = tl.load(factors_ptr), tl.load(factors_ptr + num_classes)
    by_teacher, by_student = tl.load(factors_ptr + 2 * num_classes), tl.load(factors_ptr + 3 * num_classes)
    intra = by_teacher * (q - t_mean) - by_student * (p - s_mean)
    return steep * ((q - even) - lean * (p - even)) + weight * intra


@triton.jit(
    do_not_specialize=[
        "s_stride_b", "s_stride_h", "t_stride_b", "t_stride_h", "num_classes", "h", "w", "blocks", "beta",
    ],
)  # fmt: skip
def relations_gradient_kernel(
    student, s_stride_b, s_stride_c, s_stride_h, s_stride_w, teacher, t_stride_b, t_stride_c, t_stride_h, t_stride_w,
    t_batched, cells_ptr, factors_ptr, sums_ptr, gradient_ptr, num_classes, h, w, plane, blocks, limit, scale, beta,
    temperature,
    S_FLAT: tl.constexpr, T_FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the relation loss by the student's logits.

    One program handles BLOCK target cells of one image. A cell is the area of the image that one target logit covers.
    The student's logits are resized to the cells first.

    Shapes and units:
        student, teacher: logit maps with their neighbour tables (`Samples`), each followed by the map's strides (image,
            class, row, column) in elements.
        t_batched: 1 if the teacher's neighbour tables differ between images, else 0.
        cells_ptr: (B, 7, h * w) float32 from `relations_kernel`, where the seven numbers per cell are explained.
        factors_ptr: (4, C) float32 from `classes_kernel`, where the four numbers per class are explained.
        sums_ptr: (2,) float64 from `classes_kernel`. This kernel reads the second, 1 / the number of counted cells.
        gradient_ptr: (B, C, h, w) float32 result, the gradient by the resized logits.
        plane: h * w. blocks: programs per image.
        limit: the largest magnitude of a usable logit. scale: log2(e) / T. temperature: T.
        beta: weight of the correlation over the classes.
        S_FLAT, T_FLAT: whether rows of the student's and the teacher's logits follow each other without a gap.
    """
    image, cell_n, exists = cells_of_program(plane, blocks, BLOCK)
    image64 = image.to(tl.int64)
    S_SAMPLED: tl.constexpr = student.rows is not None
    T_SAMPLED: tl.constexpr = teacher.rows is not None
    s_corners = corners(student, image, 0, cell_n, h, w, s_stride_h, s_stride_w, S_FLAT)
    t_corners = corners(teacher, image, t_batched, cell_n, h, w, t_stride_h, t_stride_w, T_FLAT)
    s_start, t_start = student.logits + image64 * s_stride_b, teacher.logits + image64 * t_stride_b

    cell_ptrs = cells_ptr + image64 * 7 * plane + cell_n
    s_top = tl.load(cell_ptrs, mask=exists, other=0.0)
    s_inverse = tl.load(cell_ptrs + plane, mask=exists, other=0.0)
    t_top = tl.load(cell_ptrs + 2 * plane, mask=exists, other=0.0)
    t_inverse = tl.load(cell_ptrs + 3 * plane, mask=exists, other=0.0)
    weight = -temperature * tl.load(cell_ptrs + 4 * plane, mask=exists, other=0.0)
    slope = tl.load(cell_ptrs + 5 * plane, mask=exists, other=0.0)
    lean = tl.load(cell_ptrs + 6 * plane, mask=exists, other=0.0)
    steep = weight * slope * (beta * tl.load(sums_ptr + 1)).to(tl.float32)
    even = 1.0 / num_classes

    dot = tl.zeros((BLOCK,), tl.float32)
    s_ptr, t_ptr, factor_ptr = s_start, t_start, factors_ptr
    for _ in range(num_classes):
        p = _probability(logit(s_ptr, s_corners, exists, S_SAMPLED), limit, scale, s_top, s_inverse)
        q = _probability(logit(t_ptr, t_corners, exists, T_SAMPLED), limit, scale, t_top, t_inverse)
        dot += p * _pull(p, q, even, steep, lean, weight, factor_ptr, num_classes)
        s_ptr += s_stride_c
        t_ptr += t_stride_c
        factor_ptr += 1
    s_ptr, t_ptr, factor_ptr = s_start, t_start, factors_ptr
    gradient_ptrs = gradient_ptr + image64 * num_classes * plane + cell_n
    for _ in range(num_classes):
        p = _probability(logit(s_ptr, s_corners, exists, S_SAMPLED), limit, scale, s_top, s_inverse)
        q = _probability(logit(t_ptr, t_corners, exists, T_SAMPLED), limit, scale, t_top, t_inverse)
        pull = _pull(p, q, even, steep, lean, weight, factor_ptr, num_classes)
        tl.store(gradient_ptrs, p * (pull - dot), mask=exists)
        s_ptr += s_stride_c
        t_ptr += t_stride_c
        factor_ptr += 1
        gradient_ptrs += plane


@triton.jit(do_not_specialize=["num_classes", "beta", "gamma", "temperature"])
def relations_totals_kernel(sums_ptr, intra_ptr, loss_ptr, num_classes, beta, gamma, temperature, BLOCK: tl.constexpr):
    """Compute the relation loss T^2 * (beta * inter + gamma * intra) from the results of `classes_kernel`.

    There is one program. inter is sums[0] * sums[1], and intra is the mean of the C values at `intra_ptr`.

    Shapes and units:
        sums_ptr: (2,) float64, the sum over the cells of (the cell's weight) * (1 - correlation), and 1 / the number of
            counted cells.
        intra_ptr: (C,) float64, 1 - correlation of each class. loss_ptr: one float32 result. num_classes: C.
        beta, gamma: weights of inter and intra. temperature: T. BLOCK: classes that are read at a time.
    """
    intra = tl.full((BLOCK,), 0.0, tl.float64)
    for start in range(0, num_classes, BLOCK):
        offs_c = start + tl.arange(0, BLOCK)
        intra += tl.load(intra_ptr + offs_c, mask=offs_c < num_classes, other=0.0)
    inter = tl.load(sums_ptr) * tl.load(sums_ptr + 1)
    loss = beta * inter + gamma * (tl.sum(intra, 0) / num_classes)
    tl.store(loss_ptr, (temperature * temperature * loss).to(tl.float32))


class _Walked(NamedTuple):
    """The result of the first walk, and what the second takes.

    Attributes:
        laid: both sets of logits under the cells.
        cells: (B, 7, h w), see `relations_kernel`.
        factors, intra, sums, moments: as `classes_kernel` writes them.
    """

    laid: Laid
    cells: Tensor
    factors: Tensor
    intra: Tensor
    sums: Tensor
    moments: Tensor


def relation_loss(problem: RelationProblem) -> tuple[Tensor, Tensor]:
    """Compute the relation loss and its gradient on CUDA, from checked arguments, with the same bits every time.

    Returns: the loss, 0-dimensional float32, and its float32 gradient by the student's (B, C, hs, ws) logits. The
        gradient is an empty tensor if `problem.need_gradient` is False.
    Raises: ShapeError if the student's or teacher's logits of one image span 2^31 elements or more in memory.
    Memory: the gradient in the student's size and in the cells' size, 28 bytes per cell, and 20 bytes per class and
        block of cells.
    """
    student, device = problem.student, problem.student.device
    shape = student.shape if problem.need_gradient else (0,)
    if student.shape[0] == 0:
        return torch.zeros((), device=device), torch.zeros(shape, device=device)
    check_offsets(problem)
    with torch.cuda.device_of(student):
        walked = _walk(problem)
        loss = torch.empty((), device=device)
        (B, C), T = student.shape[:2], problem.temperature
        relations_totals_kernel[(1,)](
            walked.sums, walked.intra, loss, C, problem.beta, problem.gamma, T, BLOCK=ENTRIES, num_warps=4
        )
        if not problem.need_gradient:
            return loss, torch.empty(0, device=device)
        h, w = problem.grid
        cells = torch.empty((B, C, h, w), device=device)
        laid = walked.laid
        relations_gradient_kernel[(B * laid.blocks,)](
            *laid.samples, walked.cells, walked.factors, walked.sums, cells, C, h, w, h * w, laid.blocks,
            largest_logit(T), LOG2_E.value / T, problem.beta, T, **laid.flat, BLOCK=laid.block, num_warps=1,
        )  # fmt: skip
        return loss, on_own_grid(problem, laid, cells)


def relation_moments(problem: RelationProblem) -> Tensor:
    """Compute `kdcache_kernels.relation_moments` on CUDA from checked arguments.

    Returns: (6, C) float64. For each class: the sum of the cells' weights, the student's and the teacher's weighted
        mean probability, and three sums over the cells. They are of weight * a * b, weight * a * a and weight * b * b.
        a and b are the deviations of the student's and the teacher's probability from these means.
    """
    if problem.student.shape[0] == 0:
        shape = (MOMENTS, problem.student.shape[1])
        return torch.zeros(shape, dtype=torch.float64, device=problem.student.device)
    check_offsets(problem)
    with torch.cuda.device_of(problem.student):
        return _walk(problem).moments


def _walk(problem: RelationProblem) -> _Walked:
    (B, C), (h, w), device = problem.student.shape[:2], problem.grid, problem.student.device
    laid = lay(problem)
    num_blocks = B * laid.blocks

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    cells, moments, inter = (
        empty(B, PLANES, h * w),
        empty(MOMENTS, C, num_blocks),
        empty(num_blocks, dtype=torch.float64),
    )
    relations_kernel[(num_blocks,)](
        *laid.samples, laid.counted, laid.weight, cells, moments, inter, C, h, w, h * w, laid.blocks, num_blocks,
        largest_logit(problem.temperature), LOG2_E.value / problem.temperature, **laid.flat, BLOCK=laid.block,
        num_warps=1,
    )  # fmt: skip
    process_moments, intra, sums = (empty(*shape, dtype=torch.float64) for shape in ((MOMENTS, C), (C,), (2,)))
    factors = empty(4, C)
    shared = None if problem.moments is None else problem.moments.contiguous()
    classes_kernel[(C + 1,)](
        moments, inter, laid.counts, problem.count, shared, process_moments, factors, intra, sums, C, num_blocks,
        0 if laid.counts is None else num_blocks, B * h * w, problem.gamma, BLOCK=ENTRIES, num_warps=4,
    )  # fmt: skip
    return _Walked(laid, cells, factors, intra, sums, process_moments)
