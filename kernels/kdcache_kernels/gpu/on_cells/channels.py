"""The loss of channels on CUDA: a class of an image per program, three loops over its cells.

One kernel beside those of `cells.py`: the first loop finds the largest logits, the second the sums, the third writes
the gradient; nothing is kept between them. With few classes and images a large GPU is not full. Exponentials are in
base 2.

Legend: B batch, C classes, h w the target's cells.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...on_cells.problem import ChannelProblem, largest_logit
from ..common import LN2
from .cells import (
    ENTRIES,
    LOG2_E,
    check_offsets,
    corners,
    inverse_count,
    launch_images,
    lay,
    logit,
    on_own_grid,
    total_kernel,
    weigh,
)

LANES = 1024
"""Cells that a program reads at a time."""


@triton.jit
def _read(
    start, image, image64, student, s_ptr, s_stride_h, s_stride_w, teacher, t_ptr, t_stride_h, t_stride_w, t_batched,
    maximum_ptr, m_stride_h, m_stride_w, counted_ptr, weight_ptr, h, w, limit,
    S_FLAT: tl.constexpr, T_FLAT: tl.constexpr, M_FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both logits of a block of cells, 0 where they are lost, their weights and offsets; NaN weighs what spoils all."""
    offs_n = start + tl.arange(0, BLOCK)
    exists = offs_n < h * w
    cell_n = tl.where(exists, offs_n, 0)
    s_corners = corners(student, image, 0, cell_n, h, w, s_stride_h, s_stride_w, S_FLAT)
    t_corners = corners(teacher, image, t_batched, cell_n, h, w, t_stride_h, t_stride_w, T_FLAT)
    x = logit(s_ptr, s_corners, exists, student.rows is not None)
    y = logit(t_ptr, t_corners, exists, teacher.rows is not None)
    if maximum_ptr is not None:
        m_corners = corners(teacher, image, t_batched, cell_n, h, w, m_stride_h, m_stride_w, M_FLAT)
        y += logit(maximum_ptr, m_corners, exists, teacher.rows is not None)
    usable = (tl.abs(x) <= limit) & (tl.abs(y) <= limit)
    lost = tl.where(usable, 0, 1)
    weight = weigh(counted_ptr, weight_ptr, image64 * h * w + cell_n, exists, lost)
    weight = tl.where(tl.abs(weight) <= 3e38, tl.maximum(weight, 0.0), float("nan"))
    return tl.where(usable, x, 0.0), tl.where(usable, y, 0.0), weight, offs_n


@triton.jit(
    do_not_specialize=[
        "s_stride_b", "s_stride_h", "t_stride_b", "t_stride_h", "m_stride_b", "m_stride_h", "m_stride_w", "images",
        "num_classes", "h", "w",
    ],
)  # fmt: skip
def channels_kernel(
    student, s_stride_b, s_stride_c, s_stride_h, s_stride_w, teacher, t_stride_b, t_stride_c, t_stride_h, t_stride_w,
    t_batched, maximum_ptr, m_stride_b, m_stride_h, m_stride_w, counted_ptr, weight_ptr, images_ptr, count_ptr,
    gradient_ptr, losses_ptr, images, num_classes, h, w, plane, limit, scale, temperature,
    S_FLAT: tl.constexpr, T_FLAT: tl.constexpr, M_FLAT: tl.constexpr, BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Write the classes' losses (B, C) float64, in bits; and the gradient (B, C, h, w) float32 where it is wanted.

    Args:
        maximum_ptr, images_ptr, count_ptr, gradient_ptr: None without; see `inverse_count`.
    """
    program = tl.program_id(0)
    image, c = program // num_classes, program % num_classes
    image64, c64 = image.to(tl.int64), c.to(tl.int64)
    s_ptr = student.logits + image64 * s_stride_b + c64 * s_stride_c
    t_ptr = teacher.logits + image64 * t_stride_b + c64 * t_stride_c
    m_ptr = None if maximum_ptr is None else maximum_ptr + image64 * m_stride_b

    s_top_n = tl.full((BLOCK,), -3e38, tl.float32)
    t_top_n = s_top_n
    for start in range(0, plane, BLOCK):
        x, y, weight, _ = _read(
            start, image, image64, student, s_ptr, s_stride_h, s_stride_w, teacher, t_ptr, t_stride_h, t_stride_w,
            t_batched, m_ptr, m_stride_h, m_stride_w, counted_ptr, weight_ptr, h, w, limit, S_FLAT, T_FLAT, M_FLAT,
            BLOCK,
        )  # fmt: skip
        s_top_n = tl.maximum(s_top_n, tl.where(weight == 0, -3e38, x))
        t_top_n = tl.maximum(t_top_n, tl.where(weight == 0, -3e38, y))
    s_top, t_top = tl.max(s_top_n, 0), tl.max(t_top_n, 0)

    s_sum_n = tl.zeros((BLOCK,), tl.float32)
    t_sum_n, difference_n = s_sum_n, s_sum_n
    for start in range(0, plane, BLOCK):
        x, y, weight, _ = _read(
            start, image, image64, student, s_ptr, s_stride_h, s_stride_w, teacher, t_ptr, t_stride_h, t_stride_w,
            t_batched, m_ptr, m_stride_h, m_stride_w, counted_ptr, weight_ptr, h, w, limit, S_FLAT, T_FLAT, M_FLAT,
            BLOCK,
        )  # fmt: skip
        # What does not weigh may be larger than the largest that does.
        x, y = tl.minimum(x - s_top, 0.0), tl.minimum(y - t_top, 0.0)
        e = weight * tl.exp2(y * scale)
        s_sum_n += weight * tl.exp2(x * scale)
        t_sum_n += e
        difference_n += e * (y - x)
    s_sum, t_sum, difference = tl.sum(s_sum_n, 0), tl.sum(t_sum_n, 0), tl.sum(difference_n, 0)
    # Where nothing weighs, nothing is compared.
    nothing = s_sum == 0
    s_sum, t_sum = tl.where(nothing, 1.0, s_sum), tl.where(nothing, 1.0, t_sum)
    s_log, t_log = tl.log2(s_sum), tl.log2(t_sum)
    tl.store(losses_ptr + program, (scale * difference / t_sum - (t_log - s_log)).to(tl.float64))

    if gradient_ptr is not None:
        per_image = inverse_count(images_ptr, count_ptr, images, plane, True, ENTRIES)
        factor = (temperature * per_image / num_classes).to(tl.float32)
        gradient_ptr += program.to(tl.int64) * plane
        for start in range(0, plane, BLOCK):
            x, y, weight, offs_n = _read(
                start, image, image64, student, s_ptr, s_stride_h, s_stride_w, teacher, t_ptr, t_stride_h, t_stride_w,
                t_batched, m_ptr, m_stride_h, m_stride_w, counted_ptr, weight_ptr, h, w, limit, S_FLAT, T_FLAT, M_FLAT,
                BLOCK,
            )  # fmt: skip
            p, q = tl.minimum(y - t_top, 0.0) * scale - t_log, tl.minimum(x - s_top, 0.0) * scale - s_log
            # No factor of the exponentials: those of equal logits are equal, and leave nothing.
            tl.store(gradient_ptr + offs_n, factor * weight * (tl.exp2(q) - tl.exp2(p)), mask=offs_n < plane)


def channel_loss(problem: ChannelProblem) -> tuple[Tensor, Tensor]:
    """Compute what `kdcache_kernels.channel_loss` documents, and its gradient, both float32; bitwise repeatable.

    Raises: ShapeError for an image of 2^31 logits or more, or whose elements lie so far apart.
    """
    student, T, maximum = problem.student, problem.temperature, problem.teacher_maximum
    device, (B, C) = student.device, student.shape[:2]
    shape = student.shape if problem.need_gradient else (0,)
    if B == 0:
        return torch.zeros((), device=device), torch.zeros(shape, device=device)
    check_offsets(problem, teacher_maximum_Bhw=maximum)
    if maximum is not None and maximum.dtype == torch.float64:
        maximum = maximum.float()
    with torch.cuda.device_of(student):
        laid, (h, w) = lay(problem), problem.grid
        images = launch_images(problem, laid)
        cells = torch.empty((B, C, h, w), device=device) if problem.need_gradient else None
        losses = torch.empty(B * C, dtype=torch.float64, device=device)
        flat = laid.flat | {"M_FLAT": maximum is not None and maximum.stride(1) == w * maximum.stride(2)}
        channels_kernel[(B * C,)](
            *laid.samples, maximum, *((0, 0, 0) if maximum is None else maximum.stride()), laid.counted, laid.weight,
            images, problem.count, cells, losses, B, C, h, w, h * w, largest_logit(T), LOG2_E.value / T, T,
            **flat, BLOCK=LANES, ENTRIES=ENTRIES, num_warps=8,
        )  # fmt: skip
        loss = torch.empty((), device=device)
        total_kernel[(1,)](
            losses, images, problem.count, loss, len(losses), B, h * w, T * T * LN2.value / C,
            OF_IMAGES=True, BLOCK=ENTRIES, num_warps=4,
        )  # fmt: skip
        return loss, torch.empty(0, device=device) if cells is None else on_own_grid(problem, laid, cells)
