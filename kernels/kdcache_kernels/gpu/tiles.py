"""The generic Triton loss kernel: any ratio of sizes, any window, any range of logits, aligned corners or not.

A cell is the square between four neighbouring student pixels, and the label pixels in it depend on these four alone:

            lane j     lane j + 1              cells -1 to w - 1 across and -1 to h - 1 down, those at the edges with
    row i     +----------+----------+          half of their corners clamped to the grid
              | . . . .  | . . . .  |  rows q  a dot is a label pixel; up to four rows that share the two student
              | . . . .  | . . . .  |          rows and at most three target rows are done at once, column by column:
    row i + 1 +----------+----------+          10 loads serve 4 pixels of a class

One lane owns a column of cells in a strip of `strip_rows` rows, and walks down it. The classes run twice in each group
of rows: first for the sums of the softmaxes (`sample.visit`), then for the gradient (`tile_gradient`). In between, up
to eight numbers per pixel wait in a scratch buffer for the next group to use again. Over a cell, a lane adds up what
its pixels give the four corners. The right half goes to the next lane, the lower half into sums that the next row
of cells goes on with, and a row of student pixels whose two rows of cells are done is written out. So one program adds
up all of a gradient element, in an order that depends neither on the tiling nor on the rest of the batch: no atomic
addition, and the same bits every time.

The price is a seam: one lane of 32 and a row of cells per strip are computed twice, for the neighbour and for the
strip above (their loss is counted once). Seams apart, the two loops cost 45 instructions per class of a pixel (sm_90,
counted in the machine code), against 23 of the kernel for aligned cells.

Both softmaxes leave out the usual maximum: the logits of a low-resolution pixel have maximum 0, and between them a
pixel's is rarely far below. Where a sum falls under 2^-60, the pixels are done again relative to their true maxima.

Legend: B batch, C classes, H W label size, h w the student's own size, ht wt the target's; u, v the student's and the
target's base-2 logits / T at a label pixel. Blocks: c classes (one on a GPU), n lanes. The rows q that are done at once
and the classes k of a turn of the second loop are tuples of blocks, see `sample`.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..problem import LossProblem
from .common import (
    Buffers,
    Needs,
    cdiv,
    dependent,
    gpu,
    integer_power,
    launch_options,
    load_label_factors,
    multiprocessors,
    pixels_of,
    power_of_2,
    strides_of,
    take_turn,
)
from .geometry import student_tables, target_tables
from .prepared import Prepared
from .sample import ROWS, VALUES, first_pixel, student_group, target_row, visit
from .tile_gradient import add_gradient, finish_row

REGISTERS = 168
"""Per lane, so that 12 warps share a multiprocessor; left alone, ptxas takes 255, with the same innermost loops."""


@triton.jit(
    do_not_specialize=[
        "h", "w", "H", "W", "ht", "wt", "target_batch", "first_partial",
        "strips", "strip_rows", "num_lanes", "num_blocks",
        "most_columns", "scratch_size", "steps",
        "label_stride_b", "label_stride_h", "label_stride_w",
        "label_gate_stride_b", "label_gate_stride_h", "label_gate_stride_w",
        "gate_stride_b", "gate_stride_h", "gate_stride_w",
    ],
)  # fmt: skip
def tiles_kernel(
    student_ptr, student_lost_ptr, target_ptr, target_lost_ptr, tables_ptr, route_ptr, factors_ptr, mix_ptr,
    gradient_ptr, scratch_ptr, partials_ptr, first_partial, pixels, h, w, H, W, ht, wt,
    target_batch, strips, strip_rows, num_lanes, num_blocks, most_columns, scratch_size, steps, target_scale,
    label_stride_b, label_stride_h, label_stride_w, label_gate_stride_b, label_gate_stride_h, label_gate_stride_w,
    gate_stride_b, gate_stride_h, gate_stride_w, temperature,
    ALL_IMAGES: tl.constexpr, POWER: tl.constexpr, BLOCK_SUMS: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Compute the fused CE + KL loss and its gradient for any sizes, windows and logits.

    Each lane handles one bilinear cell at a time. A bilinear cell is the label pixels between four neighbouring logits.
    A strip is `strip_rows` rows of logits with the rows of cells that touch them. A block is LANES - 1 cell columns,
    counted through all strips. Of N programs, each handles every N-th block, from top to bottom. Unless ALL_IMAGES,
    images with route 1 are skipped, see `Prepared.route`.

    Shapes and units:
        student_ptr, target_ptr: (B, C, h, w) and (B, C, ht, wt) logits, as in `Prepared`.
        student_lost_ptr, target_lost_ptr: (B, h, w) and (B, ht, wt) uint8, 1 where a logit is unusable.
        tables_ptr, route_ptr, factors_ptr, mix_ptr, target_scale, target_batch: the fields of `Prepared`.
        pixels: `Pixels`, labels and pixel weights. label_stride_b to gate_stride_w: their strides in elements.
        H, W: label size. temperature: T. strips: strips per image.
        num_lanes, num_blocks: the number of columns of cells of all strips of the batch, and the number of blocks.
        most_columns: the largest number of label columns of a cell. steps: bit length of max(H, W).
        scratch_ptr: float32, `scratch_size` elements per program.
        POWER: T if it is 1 to 4 and both terms are computed, else 0.
        DEPENDENT: whether the kernel may start before the previous one ends.
        BLOCK_SUMS, BLOCK_C: classes at a time in the sums and in the gradient. UNROLL: blocks of BLOCK_C classes per
            iteration of the loop. LANES: lanes per program.
    Results:
        gradient_ptr: (B, C, h, w), or None for no gradient.
        partials_ptr: `Buffers.partials`. Row first_partial + program gets the program's sums of CE and KL in nats.
    """
    take_turn(DEPENDENT)
    HAS_GRADIENT: tl.constexpr = gradient_ptr is not None
    row_taps, column_taps = student_tables(tables_ptr, H, W)
    target_row_taps, target_column_taps = row_taps, column_taps
    if pixels.USE_KL:
        target_row_taps, target_column_taps = target_tables(tables_ptr, H, W, target_batch)
    num_classes = pixels.num_classes
    pid = tl.program_id(0)
    lane = tl.arange(0, LANES)
    sizes = (num_classes, h * w, ht * wt)
    k_ce = tl.load(factors_ptr)
    k_kl = tl.load(factors_ptr + 1)
    label_factors = load_label_factors(pixels, factors_ptr)
    values_ptr = scratch_ptr + pid.to(tl.int64) * scratch_size
    sums_ptr = values_ptr + most_columns * (ROWS * VALUES * LANES)
    ce_n = tl.zeros((LANES,), tl.float64)
    kl_n = tl.zeros((LANES,), tl.float64)
    for block in range(pid, num_blocks, tl.num_programs(0)):
        # Lane 0 is the last lane of the block before, once more for what lane 1 needs of it.
        n = block * (LANES - 1) + lane - 1
        alive = (n >= 0) & (n < num_lanes)
        n = tl.where(alive, n, 0)
        j = n % (w + 1) - 1
        image = n // (w + 1) // strips
        first_row = n // (w + 1) % strips * strip_rows
        if not ALL_IMAGES:
            alive = alive & (tl.load(route_ptr + 4 * image) == 0)
        if tl.max(alive.to(tl.int32), 0) > 0:
            image64 = image.to(tl.int64)
            student_n = student_ptr + image64 * num_classes * sizes[1]
            student_lost_n = student_lost_ptr + image64 * sizes[1]
            target_n = target_ptr + image64 * num_classes * sizes[2]
            target_lost_n = target_lost_ptr + image64 * sizes[2]
            target_image = tl.where(target_batch > 1, image, 0)
            label_n = pixels.labels
            if label_n is not None:
                label_n += image64 * label_stride_b
            label_gate_n = pixels.label_gate
            if label_gate_n is not None:
                label_gate_n += image64 * label_gate_stride_b
            gate_n = pixels.gate
            if gate_n is not None:
                gate_n += image64 * gate_stride_b
            left = tl.maximum(j, 0)
            right = tl.minimum(j + 1, w - 1)
            first = first_pixel(column_taps, j, W, steps)
            count = tl.where(alive, first_pixel(column_taps, j + 1, W, steps) - first, 0)
            columns = tl.max(count, 0)
            # From the row of cells above the strip; without a gradient only that above the image has pixels to count.
            i = first_row - 1
            start = i if HAS_GRADIENT else tl.where(i < 0, -1, first_row)
            y = first_pixel(row_taps, start, H, steps)
            if HAS_GRADIENT:
                finish_row(sums_ptr, student_n, lane < 0, 2 * num_classes, 0, BLOCK_C, UNROLL, LANES)
                # A row of cells without label pixels is finished next, perhaps by other threads.
                tl.debug_barrier()
            for step in range(strip_rows + 1):
                top = tl.minimum(tl.maximum(i, 0), h - 1) * w
                bottom = tl.minimum(i + 1, h - 1) * w
                student_rows = (student_n + top, student_n + bottom)
                student_lost_rows = (student_lost_n + top, student_lost_n + bottom)
                mix_rows = student_rows
                if pixels.SMOOTH:
                    mix_n = mix_ptr + image64 * sizes[1]
                    mix_rows = (mix_n + top, mix_n + bottom)
                counted = alive & (lane > 0) & ((i >= first_row) | (i < 0))
                now_ptr = sums_ptr + step % 2 * num_classes * LANES
                next_ptr = sums_ptr + (1 - step % 2) * num_classes * LANES
                pending = 1
                while pending > 0:
                    found, fractions = student_group(y, i, row_taps, H)
                    live = ()
                    in_view = ()
                    blend = ()
                    target_places = ()
                    target_rows = student_rows
                    target_lost_rows = student_lost_rows
                    if pixels.USE_KL:
                        t_row = tl.load(target_row_taps.index + target_image * H + tl.minimum(y, H - 1))
                        row0 = t_row * wt
                        row1 = tl.minimum(t_row + 1, ht - 1) * wt
                        row2 = tl.minimum(t_row + 2, ht - 1) * wt
                        target_rows = (target_n + row0, target_n + row1, target_n + row2)
                        target_lost_rows = (target_lost_n + row0, target_lost_n + row1, target_lost_n + row2)
                    taken = tl.zeros((LANES,), tl.int32)
                    for q in tl.static_range(ROWS):
                        has = found[q] & alive
                        shows = has
                        if pixels.USE_KL:
                            t_at = target_image * H + tl.minimum(y + q, H - 1)
                            reached, inside, place, weights = target_row(t_at, t_row, target_row_taps, target_scale)
                            has = has & reached
                            shows = has & inside
                            blend += ((fractions[q], weights[0], weights[1], weights[2]),)
                            target_places += (place,)
                        else:
                            blend += ((fractions[q],),)
                        live += (has,)
                        in_view += (shows,)
                        taken += has.to(tl.int32)
                    first_y = y
                    y += taken
                    pending = tl.max(taken, 0)
                    if pending > 0:
                        any_peaks = 0
                        for r in range(columns):
                            exists = ()
                            visible = ()
                            for q in tl.static_range(ROWS):
                                exists += (live[q] & (r < count),)
                                visible += (in_view[q] & (r < count),)
                            ce, kl, has_peaks = visit(
                                r, first_y, student_rows, student_lost_rows, target_rows, target_lost_rows, mix_rows,
                                blend, target_places, left, right, first, target_image * W, exists, visible, label_n,
                                label_gate_n, gate_n, label_stride_h, label_stride_w, label_gate_stride_h,
                                label_gate_stride_w, gate_stride_h, gate_stride_w, values_ptr + lane, column_taps,
                                target_column_taps, pixels, k_ce, k_kl, label_factors, sizes, W, wt, temperature,
                                HAS_GRADIENT, POWER, BLOCK_SUMS,
                            )  # fmt: skip
                            ce_n += tl.where(counted, ce, 0.0).to(tl.float64)
                            kl_n += tl.where(counted, kl, 0.0).to(tl.float64)
                            any_peaks = tl.maximum(any_peaks, has_peaks)
                        if HAS_GRADIENT:
                            tl.debug_barrier()
                            if any_peaks > 0:
                                add_gradient(
                                    student_rows, target_rows, blend, j, left, right, first, target_image * W, columns,
                                    values_ptr, now_ptr, next_ptr, column_taps, target_column_taps, pixels, k_ce,
                                    sizes, W, wt, temperature, POWER, True, BLOCK_C, UNROLL, LANES,
                                )  # fmt: skip
                            else:
                                add_gradient(
                                    student_rows, target_rows, blend, j, left, right, first, target_image * W, columns,
                                    values_ptr, now_ptr, next_ptr, column_taps, target_column_taps, pixels, k_ce,
                                    sizes, W, wt, temperature, POWER, False, BLOCK_C, UNROLL, LANES,
                                )  # fmt: skip
                            tl.debug_barrier()
                if HAS_GRADIENT:
                    written = alive & (lane > 0) & (j >= 0) & (i >= first_row) & (i < h)
                    gradient_n = gradient_ptr + image64 * num_classes * sizes[1] + (top + left)
                    finish_row(now_ptr, gradient_n, written, num_classes, sizes[1], BLOCK_C, UNROLL, LANES)
                    tl.debug_barrier()
                i += 1
    partials_ptr += 2 * (first_partial + pid)
    tl.store(partials_ptr, tl.sum(ce_n, 0))
    tl.store(partials_ptr + 1, tl.sum(kl_n, 0))


class Tiling(NamedTuple):
    """How `tiles_kernel` divides the work. Only `block_sums` and `block_classes` can change bits of the result.

    Attributes:
        strip_rows: rows of logits per strip.
        lanes: lanes per program, one warp on a GPU.
        block_sums: classes that are summed at a time, a divisor of C.
        block_classes: classes whose gradient is computed at a time. It is 1 on a GPU, where each lane is one thread,
            and up to 4 in Triton's interpreter.
        unroll: blocks of block_classes per iteration of the loop.
        programs: the largest number of programs to launch. Each has a scratch buffer, 21 KiB at stride 4 and 21
            classes.
    """

    strip_rows: int
    lanes: int
    block_sums: int
    block_classes: int
    unroll: int
    programs: int


def choose_tiling(problem: LossProblem, *, all_images: bool = True) -> Tiling:
    """Return the `Tiling` of a problem.

    On a GPU, strips are so short that all programs run at the same time, about ten warps per multiprocessor. On the CPU
    (Triton's interpreter), return large blocks.

    `all_images` is False if the kernel computes only those images that a fast kernel cannot. These are usually few, so
    the tiling has fewer programs to save scratch memory.
    """
    B, C, h, w = problem.student.shape
    device = problem.student.device
    unroll = min(4, power_of_2(C))
    if device.type == "cpu":
        return Tiling(h, min(512, power_of_2(B * (w + 1) + 1)), C & -C, unroll, 1, 2)
    wave = 10 * multiprocessors(device)
    lanes = gpu(device).warp_size
    strip_rows = min(h, max(2, cdiv(B * h * (w + 1), (lanes - 1) * wave)))
    rare = not all_images and problem.window is None
    return Tiling(strip_rows, lanes, 1, 1, unroll, wave // 5 if rare else wave + wave // 5)


def most_columns(w: int, W: int, align_corners: bool) -> int:
    """Return the largest number of label columns between two neighbouring student columns, or outside the outer ones.

    `w` is the number of student columns and `W` the number of label columns. `align_corners` says whether the resize of
    the student's logits to the labels aligns corners.
    """
    if w == 1:
        return W
    return max(1, -(-(W - 1) // (w - 1))) if align_corners else -(-W // w)


def _blocks(problem: LossProblem, tiling: Tiling) -> tuple[int, int]:
    """Return the number of lanes, and of the blocks of lanes."""
    B, _, h, w = problem.student.shape
    num_lanes = B * cdiv(h, tiling.strip_rows) * (w + 1)
    return num_lanes, cdiv(num_lanes, tiling.lanes - 1)


def _scratch_size(problem: LossProblem, tiling: Tiling) -> int:
    """Return the number of float32 elements of scratch that a program needs."""
    C, w = problem.student.shape[1], problem.student.shape[3]
    columns = most_columns(w, problem.size[1], problem.align_corners)
    return int(columns * ROWS.value * VALUES.value + 2 * C) * tiling.lanes


def needs(problem: LossProblem, tiling: Tiling) -> Needs:
    """Return how many programs and float32 elements of scratch `launch` needs for the same problem and tiling."""
    programs = min(_blocks(problem, tiling)[1], tiling.programs)
    return Needs(programs, programs * _scratch_size(problem, tiling))


def launch(
    problem: LossProblem,
    prepared: Prepared,
    gradient: Tensor | None,
    buffers: Buffers,
    tiling: Tiling,
    *,
    all_images: bool,
) -> None:
    """Launch `tiles_kernel`, which computes CE and KL of images. `loss.add_up` then computes the loss from the sums.

    Shapes and units:
        problem, prepared: the checked arguments, and the result of `prepare` for them.
        gradient: (B, C, h, w) contiguous result, written for the computed images. None computes no gradient.
        buffers: memory of the size that `needs` returns. The sums of CE and KL are written into `buffers.partials`.
        tiling: from `choose_tiling`.
        all_images: True computes all images, False only those with route 0 (see `Prepared.route`).
    """
    h, w = problem.student.shape[2:]
    (H, W), device = problem.size, problem.student.device
    strips = cdiv(h, tiling.strip_rows)
    num_lanes, num_blocks = _blocks(problem, tiling)
    columns = most_columns(w, W, problem.align_corners)
    tiles_kernel[(needs(problem, tiling).programs,)](
        prepared.student, prepared.student_lost, prepared.target, prepared.target_lost, prepared.tables,
        prepared.route, prepared.factors, prepared.mix, gradient, buffers.scratch, buffers.partials, buffers.first,
        pixels_of(problem)._replace(label_strides=None, gate_strides=None, label_gate_strides=None),
        h, w, H, W, *prepared.target.shape[2:],
        prepared.target_batch, strips, tiling.strip_rows, num_lanes, num_blocks, columns,
        _scratch_size(problem, tiling),
        max(H, W).bit_length(), prepared.target_scale, *strides_of(problem), problem.temperature, ALL_IMAGES=all_images,
        POWER=integer_power(problem.temperature) if problem.use_ce and problem.use_kl else 0,
        BLOCK_SUMS=tiling.block_sums, BLOCK_C=tiling.block_classes, UNROLL=tiling.unroll, LANES=tiling.lanes,
        enable_fp_fusion=True, **dependent(device), **launch_options(tiling.lanes, REGISTERS, device),
    )  # fmt: skip
