"""The decoupled loss on CUDA: a cell of the target per lane, three dynamic loops over the classes.

One kernel beside those of `cells.py`: the first loop finds the teacher's best class, the second both softmaxes over the
classes that are not the target, the third their divergence and the gradient. Exponentials and logarithms are in base 2.

Legend: B batch, C classes, H W the student's image, h w the target's cells.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...on_cells.problem import DecoupledProblem, largest_logit
from ..common import LN2
from .cells import (
    ENTRIES,
    LOG2_E,
    cells_of_program,
    check_offsets,
    corners,
    inverse_count,
    launch_images,
    lay,
    logit,
    on_own_grid,
    take,
    total_kernel,
    weigh,
)


@triton.jit
def _pair(a):
    """Of a target's log-odds: the probabilities of target and rest, and the logarithm that both have in common."""
    e = tl.exp2(-tl.abs(a))
    more = 1.0 / (1.0 + e)
    less = e * more
    return tl.where(a > 0, more, less), tl.where(a > 0, less, more), tl.log2(1.0 + e)


@triton.jit(
    do_not_specialize=[
        "s_stride_b", "s_stride_h", "t_stride_b", "t_stride_h", "labels_stride_b", "labels_stride_h",
        "labels_stride_w", "images", "num_classes", "h", "w", "H", "W", "blocks", "alpha", "beta",
    ],
)  # fmt: skip
def decoupled_kernel(
    student, s_stride_b, s_stride_c, s_stride_h, s_stride_w, teacher, t_stride_b, t_stride_c, t_stride_h, t_stride_w,
    t_batched, counted_ptr, weight_ptr, labels_ptr, labels_stride_b, labels_stride_h, labels_stride_w,
    images_ptr, count_ptr, gradient_ptr, losses_ptr, images, num_classes, h, w, H, W, plane, blocks,
    limit, scale, alpha, beta, temperature,
    S_FLAT: tl.constexpr, T_FLAT: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Write the programs' sums of losses, float64, in bits; and the gradient (B, C, h, w) float32 where it is wanted.

    Args:
        labels_ptr, images_ptr, count_ptr, gradient_ptr: None without; see `inverse_count`.
    """
    image, cell_n, exists = cells_of_program(plane, blocks, BLOCK)
    image64 = image.to(tl.int64)
    S_SAMPLED: tl.constexpr = student.rows is not None
    T_SAMPLED: tl.constexpr = teacher.rows is not None
    s_corners = corners(student, image, 0, cell_n, h, w, s_stride_h, s_stride_w, S_FLAT)
    t_corners = corners(teacher, image, t_batched, cell_n, h, w, t_stride_h, t_stride_w, T_FLAT)
    s_start, t_start = student.logits + image64 * s_stride_b, teacher.logits + image64 * t_stride_b

    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    target = tl.zeros((BLOCK,), tl.int32)
    t_ptr = t_start
    for c in range(num_classes):
        x = logit(t_ptr, t_corners, exists, T_SAMPLED)
        target = tl.where(x > best, c, target)
        best = tl.maximum(best, x)
        t_ptr += t_stride_c
    if labels_ptr is not None:
        y_n, x_n = (2 * (cell_n // w) + 1) * H // (2 * h), (2 * (cell_n % w) + 1) * W // (2 * w)
        offs = image64 * labels_stride_b + y_n.to(tl.int64) * labels_stride_h + x_n.to(tl.int64) * labels_stride_w
        label = tl.load(labels_ptr + offs, mask=exists, other=0).to(tl.int64)
        target = tl.where((label >= 0) & (label < num_classes), label.to(tl.int32), target)

    s_top = tl.full((BLOCK,), -3e38, tl.float32)
    t_top = s_top
    s_sum = tl.zeros((BLOCK,), tl.float32)
    t_sum, s_own, t_own = s_sum, s_sum, s_sum
    lost = tl.zeros((BLOCK,), tl.int32)
    s_ptr, t_ptr = s_start, t_start
    for c in range(num_classes):
        x, y = logit(s_ptr, s_corners, exists, S_SAMPLED), logit(t_ptr, t_corners, exists, T_SAMPLED)
        top, total, lost = take(x, limit, scale, s_top, s_sum, lost)
        t_top_next, t_total, lost = take(y, limit, scale, t_top, t_sum, lost)
        own = target == c
        s_own, t_own = tl.where(own, x, s_own), tl.where(own, y, t_own)
        s_top, s_sum = tl.where(own, s_top, top), tl.where(own, s_sum, total)
        t_top, t_sum = tl.where(own, t_top, t_top_next), tl.where(own, t_sum, t_total)
        s_ptr += s_stride_c
        t_ptr += t_stride_c
    weight = weigh(counted_ptr, weight_ptr, image64 * plane + cell_n, exists, lost)
    # Of a lost cell all is 0 but the weight; of a class alone the others have no largest logit.
    compared = (lost == 0) & (t_sum > 0)
    s_log, t_log = tl.log2(tl.where(compared, s_sum, 1.0)), tl.log2(tl.where(compared, t_sum, 1.0))
    a = tl.where(compared, (t_own - t_top) * scale - t_log, 0.0)
    b = tl.where(compared, (s_own - s_top) * scale - s_log, 0.0)
    p, p_rest, a_log = _pair(a)
    q, q_rest, b_log = _pair(b)
    # What is largest is taken out of both logarithms, so that no difference of large numbers is left.
    loss = p * (tl.minimum(a, 0.0) - tl.minimum(b, 0.0)) + p_rest * (tl.maximum(b, 0.0) - tl.maximum(a, 0.0))
    loss = alpha * (loss + (b_log - a_log))
    pull = alpha * weight * tl.where(a > 0, p_rest - q_rest, q - p)
    factor = (temperature * inverse_count(images_ptr, count_ptr, images, plane, False, ENTRIES)).to(tl.float32)

    difference = tl.zeros((BLOCK,), tl.float32)
    s_ptr, t_ptr = s_start, t_start
    gradient_ptrs = None
    if gradient_ptr is not None:
        gradient_ptrs = gradient_ptr + image64 * num_classes * plane + cell_n
    for c in range(num_classes):
        x, y = logit(s_ptr, s_corners, exists, S_SAMPLED), logit(t_ptr, t_corners, exists, T_SAMPLED)
        own = target == c
        other = compared & ~own
        x, y = tl.where(other, x - s_top, 0.0), tl.where(other, y - t_top, 0.0)
        # No factor of the exponentials: those of equal logits are equal, and leave nothing.
        p_other, q_other = tl.exp2(y * scale - t_log), tl.exp2(x * scale - s_log)
        p_other, q_other = tl.where(other, p_other, 0.0), tl.where(other, q_other, 0.0)
        difference += p_other * (y - x)
        if gradient_ptr is not None:
            g = tl.where(own, pull, beta * weight * (q_other - p_other) - pull * q_other)
            tl.store(gradient_ptrs, factor * g, mask=exists)
            gradient_ptrs += plane
        s_ptr += s_stride_c
        t_ptr += t_stride_c
    loss += beta * (scale * difference - (t_log - s_log))
    total = tl.sum(tl.where(exists, weight * loss, 0.0).to(tl.float64), 0)
    tl.store(losses_ptr + tl.program_id(0), total)


def decoupled_loss(problem: DecoupledProblem) -> tuple[Tensor, Tensor]:
    """Compute what `kdcache_kernels.decoupled_loss` documents, and its gradient, both float32; bitwise repeatable.

    Raises: ShapeError for an image of 2^31 logits or more, or whose elements lie so far apart.
    """
    student, T, labels = problem.student, problem.temperature, problem.labels
    device, (B, C) = student.device, student.shape[:2]
    shape = student.shape if problem.need_gradient else (0,)
    if B == 0:
        return torch.zeros((), device=device), torch.zeros(shape, device=device)
    check_offsets(problem)
    with torch.cuda.device_of(student):
        laid, (h, w) = lay(problem), problem.grid
        images = launch_images(problem, laid)
        cells = torch.empty((B, C, h, w), device=device) if problem.need_gradient else None
        losses = torch.empty(B * laid.blocks, dtype=torch.float64, device=device)
        decoupled_kernel[(B * laid.blocks,)](
            *laid.samples, laid.counted, laid.weight, labels, *((0, 0, 0) if labels is None else labels.stride()),
            images, problem.count, cells, losses, B, C, h, w, *problem.size, h * w, laid.blocks,
            largest_logit(T), LOG2_E.value / T, problem.alpha, problem.beta, T,
            **laid.flat, BLOCK=laid.block, ENTRIES=ENTRIES, num_warps=1,
        )  # fmt: skip
        loss = torch.empty((), device=device)
        total_kernel[(1,)](
            losses, images, problem.count, loss, len(losses), B, h * w, T * T * LN2.value,
            OF_IMAGES=False, BLOCK=ENTRIES, num_warps=4,
        )  # fmt: skip
        return loss, torch.empty(0, device=device) if cells is None else on_own_grid(problem, laid, cells)
