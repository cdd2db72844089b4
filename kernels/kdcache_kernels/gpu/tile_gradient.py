"""The second loop over the classes of the generic loss kernel (`tiles`): a group's part of the gradient.

Legend: u, v the student's and the target's base-2 logits / T at a label pixel. Blocks: c classes (one on a GPU), n
lanes. The rows q of a group and the classes k of a turn are tuples of blocks, see `sample`.
"""

import triton
import triton.language as tl

from .common import power
from .sample import ROWS, VALUES, along_rows, load_columns, student_logits, target_logits


@triton.jit
def _row_factors(at_n, pixels, PEAKS: tl.constexpr, LANES: tl.constexpr):
    """Return the numbers that `visit` stored for a pixel: label, factors of 2^(T u), 2^u and 2^v, maxima, pulls."""
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
    """Return the gradient by u of a row's pixels, of one block of classes."""
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
def add_gradient(
    student_rows, target_rows, blend, cell_n, left_n, right_n, first_n, target_at_n, columns, values_ptr, now_ptr,
    next_ptr, taps, target_taps, pixels, k_ce, sizes, W, wt, temperature,
    POWER: tl.constexpr, PEAKS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add the CE + KL gradient from a few label rows to running sums of the gradient at the student's logits.

    Each lane has one bilinear cell, the label pixels between four neighbouring logits. Its pixels add to these four.

    Shapes and units:
        now_ptr, next_ptr: (C, LANES) float32 running sums for the student's row of logits above the cells, and for the
            row below.
        values_ptr: the eight numbers per pixel that `sample.visit` stored. columns: the largest number of label columns
            of a cell.
        student_rows, target_rows: pointers to the two student rows and three target rows around the pixels, one per
            lane.
        blend: for each label row, the weight of the lower student row and those of the three target rows.
        cell_n: column of the cell, -1 before the first logit. left_n, right_n: the student's columns left and right of
            it.
        first_n: the cell's first label column. target_at_n: first entry of the image in `target_taps`.
        taps, target_taps: `geometry.Taps` of the label columns in the student's and the target's logits.
        pixels: `Pixels`, the labels and pixel weights. k_ce: factor of CE in the gradient.
        sizes: (number of classes, elements from one student class to the next, the same for the target).
        W, wt: label columns, and columns of the target's logits. temperature: T.
        POWER: T if it is an integer up to 4, else 0.
        PEAKS: whether the stored factors are relative to the largest logits.
        BLOCK, UNROLL: classes of a block, and blocks per iteration of the loop over the classes. LANES: lanes of the
            program.
    """
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
                t_columns = load_columns(target_at_n + x_n, target_taps, wt)
            new_sums = ()
            for k in tl.static_range(UNROLL):
                class_c = start + k * BLOCK + tl.arange(0, BLOCK)
                top_cn, top_step_cn, bottom_cn, bottom_step_cn = corners[k]
                upper_cn = top_cn + fraction_n * top_step_cn
                lower_cn = bottom_cn + fraction_n * bottom_step_cn
                lines = (upper_cn,)
                if pixels.USE_KL:
                    lines = along_rows(target_rows, t_columns, tl.minimum(class_c, sizes[0] - 1) * sizes[2])
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
def finish_row(
    sums_ptr, gradient_n, writes_n, num_classes, plane,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the finished sums of a row of student logits to the gradient, and set the sums to 0.

    Shapes and units:
        sums_ptr: (num_classes, LANES) float32 sums.
        gradient_n: pointers to class 0 of the gradient, one per lane. writes_n: bool, which lanes write.
        plane: elements of a class of the gradient. LANES: lanes of the program.
        BLOCK, UNROLL: classes of a block, and blocks per iteration of the loop over the classes.
    """
    for start in range(0, num_classes, BLOCK * UNROLL):
        for k in tl.static_range(UNROLL):
            c = start + k * BLOCK + tl.arange(0, BLOCK)
            exists_cn = (c < num_classes)[:, None]
            sum_ptrs = sums_ptr + c[:, None] * LANES + tl.arange(0, LANES)[None, :]
            sums_cn = tl.load(sum_ptrs, mask=exists_cn, other=0.0)
            tl.store(sum_ptrs, tl.zeros((BLOCK, LANES), tl.float32), mask=exists_cn)
            gradient_ptrs = gradient_n[None, :] + (c * plane)[:, None]
            tl.store(gradient_ptrs, sums_cn.to(gradient_ptrs.dtype.element_ty), mask=exists_cn & writes_n[None, :])
