"""The generic Triton loss kernel: any ratio of sizes, any window, any range of logits, aligned corners or not.

A cell is the square between four neighbouring student pixels, and the label pixels in it depend on these four alone:

            lane j     lane j + 1              cells -1 to w - 1 across and -1 to h - 1 down, those at the edges with
    row i     +----------+----------+          half of their corners clamped to the grid
              | . . . .  | . . . .  |  rows q  a dot is a label pixel; up to four rows that share the two student
              | . . . .  | . . . .  |          rows and at most three target rows are done at once, column by column:
    row i + 1 +----------+----------+          10 loads serve 4 pixels of a class

One lane owns a column of cells in a strip of `strip_rows` rows, and walks down it. The classes run twice in each group
of rows: first for the sums of the softmaxes (`sample.visit`), then for the gradient (`_gradient`); in between, up to
eight numbers per pixel wait in a scratch buffer that the next group uses again. Over a cell, a lane adds up what its
pixels give the four corners. The right half goes to the neighbouring lane, the lower half into sums that the next row
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
    gpu,
    integer_power,
    launch_options,
    load_label_factors,
    multiprocessors,
    pixels_of,
    power,
    power_of_2,
    strides_of,
)
from .geometry import student_tables, target_tables
from .prep import Prepared
from .sample import (
    ROWS,
    VALUES,
    along_rows,
    first_pixel,
    load_columns,
    student_group,
    student_logits,
    target_logits,
    target_row,
    visit,
)

REGISTERS = 168
"""Per lane, so that 12 warps share a multiprocessor; left alone, ptxas takes 255, with the same innermost loops."""


@triton.jit
def _row_factors(at_n, pixels, PEAKS: tl.constexpr, LANES: tl.constexpr):
    """What `visit` kept of a pixel: what multiplies 2^(T u), 2^u and 2^v; the maxima; label, and what pulls at it."""
    label = at_n
    k_ce = at_n
    ku = at_n
    kv = at_n
    peaks = (at_n, at_n)
    pulls = (at_n, at_n)
    if pixels.USE_CE:
        label = tl.load(at_n)
        k_ce = tl.load(at_n + LANES)
        if pixels.WEIGHED or pixels.SMOOTH:
            pulls = (tl.load(at_n + 6 * LANES), tl.load(at_n + 7 * LANES))
    if pixels.USE_KL:
        ku = tl.load(at_n + 2 * LANES)
        kv = tl.load(at_n + 3 * LANES)
    if PEAKS:
        peaks = (tl.load(at_n + 4 * LANES), tl.load(at_n + 5 * LANES))
    return label, k_ce, ku, kv, peaks, pulls


@triton.jit
def _pixel_gradient(
    u, lines, blend_q, factors, class_c, k_label_c, pixels, temperature, POWER: tl.constexpr, PEAKS: tl.constexpr
):
    """The gradient by u of a row's pixels, of one block of classes."""
    label, k_ce, ku, kv, peaks, pulls = factors
    if PEAKS:
        u -= peaks[0][None, :]
    if pixels.USE_KL:
        v = target_logits(lines, blend_q)
        if PEAKS:
            v -= peaks[1][None, :]
        eu = tl.exp2(u)
        k_all = ku[None, :]
        if pixels.USE_CE and POWER == 1:
            k_all += k_ce[None, :]
        if pixels.USE_CE and POWER > 1:
            k_all += k_ce[None, :] * power(eu, POWER - 1)
        # Spelt out, so that no choice of which product is fused is left to the compiler.
        g = tl.fma(eu, k_all, -(tl.exp2(v) * kv[None, :]))
        if pixels.USE_CE and POWER == 0:
            g += tl.exp2(temperature * u) * k_ce[None, :]
    else:
        g = tl.exp2(temperature * u) * k_ce[None, :]
    if pixels.USE_CE:
        k_label = k_label_c[:, None]
        if pixels.SMOOTH:
            g -= k_label * pulls[1][None, :]
        if pixels.WEIGHED:
            k_label = k_label * pulls[0][None, :]
        g -= tl.where(label[None, :] == class_c.to(tl.float32)[:, None], k_label, 0.0)
    return g


@triton.jit
def _gradient(
    student_rows, target_rows, blend, cell_n, left_n, right_n, first_n, target_at_n, columns, values_ptr, now_ptr,
    next_ptr, taps, target_taps, pixels, k_ce, sizes, W, wt, temperature,
    POWER: tl.constexpr, PEAKS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add what a group of rows gives the corners of its cells to the sums of this row of cells and the next."""
    lane = tl.arange(0, LANES)
    shift_cn = tl.zeros((BLOCK, LANES), tl.int32) + tl.maximum(lane - 1, 0)[None, :]
    zero_cn = tl.zeros((BLOCK, LANES), tl.float32)
    for start in range(0, sizes[0], BLOCK * UNROLL):
        corners = ()
        k_labels = ()
        sums = ()
        for k in tl.static_range(UNROLL):
            c = tl.minimum(start + k * BLOCK + tl.arange(0, BLOCK), sizes[0] - 1)
            offset_cn = (c * sizes[1])[:, None]
            top_cn = tl.load((student_rows[0] + left_n)[None, :] + offset_cn)
            top_step_cn = tl.load((student_rows[0] + right_n)[None, :] + offset_cn) - top_cn
            bottom_cn = tl.load((student_rows[1] + left_n)[None, :] + offset_cn)
            bottom_step_cn = tl.load((student_rows[1] + right_n)[None, :] + offset_cn) - bottom_cn
            corners += ((top_cn, top_step_cn, bottom_cn, bottom_step_cn),)
            k_label_c = tl.zeros((BLOCK,), tl.float32) + k_ce
            if pixels.class_weight is not None:
                k_label_c *= tl.load(pixels.class_weight + c).to(tl.float32)
            k_labels += (k_label_c,)
            # Sums over the cell of g, g * row fraction, g * column fraction, g * both.
            sums += ((zero_cn, zero_cn, zero_cn, zero_cn),)
        for r in range(columns):
            x_n = tl.minimum(first_n + r, W - 1)
            fraction_n = tl.load(taps.fraction + x_n)[None, :]
            factors = ()
            for q in tl.static_range(ROWS):
                factors += (_row_factors(values_ptr + (r * ROWS + q) * (VALUES * LANES) + lane, pixels, PEAKS, LANES),)
            t_columns = (left_n, right_n)
            if pixels.USE_KL:
                t_columns = load_columns(target_at_n + x_n, target_taps, wt)  # type: ignore[assignment]
            new_sums = ()
            for k in tl.static_range(UNROLL):
                class_c = start + k * BLOCK + tl.arange(0, BLOCK)
                top_cn, top_step_cn, bottom_cn, bottom_step_cn = corners[k]
                upper_cn = top_cn + fraction_n * top_step_cn
                lower_cn = bottom_cn + fraction_n * bottom_step_cn
                lines = (upper_cn,)
                if pixels.USE_KL:
                    lines = along_rows(target_rows, t_columns, tl.minimum(class_c, sizes[0] - 1) * sizes[2])  # type: ignore[assignment]
                for q in tl.static_range(ROWS):
                    u = student_logits(upper_cn, lower_cn, blend[q])
                    g = _pixel_gradient(
                        u, lines, blend[q], factors[q], class_c, k_labels[k], pixels, temperature, POWER, PEAKS
                    )
                    if q == 0:
                        sum_cn = g
                        sum_low_cn = g * blend[q][0][None, :]
                    else:
                        sum_cn += g
                        sum_low_cn = tl.fma(g, blend[q][0][None, :], sum_low_cn)
                all_cn, low_cn, right_cn, right_low_cn = sums[k]
                new_sums += (
                    (
                        all_cn + sum_cn,
                        low_cn + sum_low_cn,
                        tl.fma(fraction_n, sum_cn, right_cn),
                        tl.fma(fraction_n, sum_low_cn, right_low_cn),
                    ),
                )
            sums = new_sums
        for k in tl.static_range(UNROLL):
            class_c = start + k * BLOCK + tl.arange(0, BLOCK)
            exists_cn = (class_c < sizes[0])[:, None]
            all_cn, low_cn, right_cn, right_low_cn = sums[k]
            # Before the first centre, everything is the right pixel's, which is both.
            right_cn = tl.where((cell_n < 0)[None, :], all_cn, right_cn)
            right_low_cn = tl.where((cell_n < 0)[None, :], low_cn, right_low_cn)
            left_low_cn = low_cn - right_low_cn
            left_cn = all_cn - right_cn - left_low_cn
            now_cn = left_cn + tl.gather(right_cn - right_low_cn, shift_cn, 1)
            next_cn = left_low_cn + tl.gather(right_low_cn, shift_cn, 1)
            offset_cn = class_c[:, None] * LANES + lane[None, :]
            tl.store(now_ptr + offset_cn, tl.load(now_ptr + offset_cn, mask=exists_cn) + now_cn, mask=exists_cn)
            tl.store(next_ptr + offset_cn, tl.load(next_ptr + offset_cn, mask=exists_cn) + next_cn, mask=exists_cn)


@triton.jit
def _finish_row(
    sums_ptr, gradient_n, writes_n, num_classes, plane,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write out the sums of a row of student pixels and set them to 0."""
    for start in range(0, num_classes, BLOCK * UNROLL):
        for k in tl.static_range(UNROLL):
            c = start + k * BLOCK + tl.arange(0, BLOCK)
            exists_cn = (c < num_classes)[:, None]
            sum_ptrs = sums_ptr + c[:, None] * LANES + tl.arange(0, LANES)[None, :]
            sums_cn = tl.load(sum_ptrs, mask=exists_cn, other=0.0)
            tl.store(sum_ptrs, tl.zeros((BLOCK, LANES), tl.float32), mask=exists_cn)
            gradient_ptrs = gradient_n[None, :] + (c * plane)[:, None]
            tl.store(gradient_ptrs, sums_cn.to(gradient_ptrs.dtype.element_ty), mask=exists_cn & writes_n[None, :])


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
    UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Each program does every num_programs-th block of lanes; lanes are the cell columns -1 to w - 1 of all strips."""
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
                _finish_row(sums_ptr, student_n, lane < 0, 2 * num_classes, 0, BLOCK_C, UNROLL, LANES)
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
                        target_rows = (target_n + row0, target_n + row1, target_n + row2)  # type: ignore[assignment]
                        target_lost_rows = (target_lost_n + row0, target_lost_n + row1, target_lost_n + row2)  # type: ignore[assignment]
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
                            shown = ()
                            for q in tl.static_range(ROWS):
                                exists += (live[q] & (r < count),)
                                shown += (in_view[q] & (r < count),)
                            ce, kl, has_peaks = visit(
                                r, first_y, student_rows, student_lost_rows, target_rows, target_lost_rows, mix_rows,
                                blend, target_places, left, right, first, target_image * W, exists, shown, label_n,
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
                                _gradient(
                                    student_rows, target_rows, blend, j, left, right, first, target_image * W, columns,
                                    values_ptr, now_ptr, next_ptr, column_taps, target_column_taps, pixels, k_ce,
                                    sizes, W, wt, temperature, POWER, True, BLOCK_C, UNROLL, LANES,
                                )  # fmt: skip
                            else:
                                _gradient(
                                    student_rows, target_rows, blend, j, left, right, first, target_image * W, columns,
                                    values_ptr, now_ptr, next_ptr, column_taps, target_column_taps, pixels, k_ce,
                                    sizes, W, wt, temperature, POWER, False, BLOCK_C, UNROLL, LANES,
                                )  # fmt: skip
                            tl.debug_barrier()
                if HAS_GRADIENT:
                    written = alive & (lane > 0) & (j >= 0) & (i >= first_row) & (i < h)
                    gradient_n = gradient_ptr + image64 * num_classes * sizes[1] + (top + left)
                    _finish_row(now_ptr, gradient_n, written, num_classes, sizes[1], BLOCK_C, UNROLL, LANES)
                    tl.debug_barrier()
                i += 1
    partials_ptr += 2 * (first_partial + pid)
    tl.store(partials_ptr, tl.sum(ce_n, 0))
    tl.store(partials_ptr + 1, tl.sum(kl_n, 0))


class Tiling(NamedTuple):
    """The sizes into which the work is cut; of these, only the class blocks can change a bit of the result.

    Attributes:
        strip_rows: rows of student pixels per strip.
        lanes: lanes per program, one warp of them on a GPU.
        block_sums: classes that are summed at once; divides their number.
        block_classes: classes of a block whose gradient is computed at once. One, on a GPU: then each lane is a thread
            in every block, whatever the compiler's choice of layouts.
        unroll: such blocks at once.
        programs: at most; each has a scratch buffer of 21 KiB at stride 4 and 21 classes.
    """

    strip_rows: int
    lanes: int
    block_sums: int
    block_classes: int
    unroll: int
    programs: int


def choose_tiling(problem: LossProblem, *, all_images: bool = True) -> Tiling:
    """One wave of ten warps per multiprocessor; for the interpreter, blocks that are large.

    Where the fast kernel takes whole views, only images whose logits span too much come here: programs of two warps per
    multiprocessor do them, so that the rest does not pay the memory of a wave.
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
    """At most this many of W label columns lie in one of the cells -1 to w - 1."""
    if w == 1:
        return W
    return max(1, -(-(W - 1) // (w - 1))) if align_corners else -(-W // w)


def _blocks(problem: LossProblem, tiling: Tiling) -> tuple[int, int]:
    """Lanes, and blocks of them."""
    B, _, h, w = problem.student.shape
    num_lanes = B * cdiv(h, tiling.strip_rows) * (w + 1)
    return num_lanes, cdiv(num_lanes, tiling.lanes - 1)


def _scratch_size(problem: LossProblem, tiling: Tiling) -> int:
    """Scratch of a program."""
    C, w = problem.student.shape[1], problem.student.shape[3]
    columns = most_columns(w, problem.size[1], problem.align_corners)
    return int(columns * ROWS.value * VALUES.value + 2 * C) * tiling.lanes


def needs(problem: LossProblem, tiling: Tiling) -> Needs:
    """What `launch` needs."""
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
    """Run the kernel on all images, or on those whose route is 0.

    Args:
        gradient: (B, C, h, w) contiguous; the kernel writes the part of its images. None leaves it out.
        buffers: with what `needs` says.
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
        enable_fp_fusion=True, **launch_options(tiling.lanes, REGISTERS, device),
    )  # fmt: skip
