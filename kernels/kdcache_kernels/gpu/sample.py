"""Bilinear samples and softmax sums of groups of label pixels, as the generic loss kernel needs them.

A group is the pixels of one label column per lane in up to ROWS label rows that lie between the same two rows of
student pixels and, of the target's, between three: a class then costs 10 loads for 4 pixels, where each pixel by
itself would cost 8. Tables of neighbours say where a pixel lies (`geometry`), so any ratio and window will do.

The rows of a group are tuples of blocks of lanes, not a dimension of a block. Triton spreads a block of two dimensions
over a warp as it sees fit: its version 3.6 gave a lane's rows to other lanes, through shared memory and barriers.

Legend: u, v the student's and the target's base-2 logits / T at a label pixel. Blocks: c classes (one on a GPU), n
lanes; q is a row of a group. Tuples: taps are a table, `geometry.Taps`; columns are the pixels left and right of a
label column and its fraction; blend has for each q the weights by which it mixes rows, `student_group`'s fraction and
`target_row`'s weights.
"""

import triton
import triton.language as tl

from .common import LN2, label_terms, load_pixel, power

ROWS = tl.constexpr(4)
LOWEST_LOGIT = tl.constexpr(-2.5e38)
"""Below any logit, and the difference to any is finite."""
SMALL = tl.constexpr(2.0**-12)
"""Keeps a sum over classes of such differences finite."""
LOWEST_SUM = tl.constexpr(2.0**-60)
VALUES = tl.constexpr(8)
"""Numbers kept per pixel: label, factors of 2^(T u), 2^u and 2^v, maxima of u and v, pulls at its label and at all."""


@triton.jit
def cell_of(index, fraction):
    """Return for each label pixel the number of the bilinear cell in which it lies along one axis.

    Cell j is between logits j and j + 1. Pixels before the centre of logit 0 lie in cell -1. `index` and `fraction` are
    the pixels' entries in a `geometry.Taps`.
    """
    return tl.where((index == 0) & (fraction == 0), -1, index)


@triton.jit
def first_pixel(taps, cell_n, size, steps):
    """Return the index of the first label pixel along an axis that lies in bilinear cell `cell_n` or a later one.

    Cell j lies between logits j and j + 1. If there is no such pixel, the result is `size`.

    Shapes and units:
        taps: `geometry.Taps` of the axis in the student's logits. cell_n: number of a cell, one per lane.
        size: number of label pixels along the axis. steps: steps of the binary search, with size < 2 ** steps.
    """
    low_n = cell_n * 0
    high_n = low_n + size
    for _ in range(steps):
        middle_n = (low_n + high_n) // 2
        at_n = tl.minimum(middle_n, size - 1)
        reached_n = cell_of(tl.load(taps.index + at_n), tl.load(taps.fraction + at_n)) >= cell_n
        open_n = low_n < high_n
        low_n = tl.where(open_n & (reached_n == 0), middle_n + 1, low_n)
        high_n = tl.where(open_n & reached_n, middle_n, high_n)
    return low_n


@triton.jit
def load_logits(ptrs):
    """Return as float32 the logits at the pointers `ptrs` into `Prepared.student` or `Prepared.target`.

    In a target that is stored as float16, NaN and infinity become 0.
    """
    x = tl.load(ptrs)
    if x.dtype == tl.float16:
        x = x.to(tl.float32)
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    return x


@triton.jit
def along_row(row_n, columns, offset_c):
    """Interpolate a row of logits at each lane's label column, for a block of c classes. Return (c, n) float32 logits.

    Shapes and units:
        row_n: pointers to the row of class 0, one for each of the n lanes.
        columns: from `load_columns`, one per lane: the indices of two neighbouring logits in the row, and the weight of
            the right one.
        offset_c: offset of each class in elements.
    """
    left_cn = load_logits((row_n + columns[0])[None, :] + offset_c[:, None])
    right_cn = load_logits((row_n + columns[1])[None, :] + offset_c[:, None])
    return left_cn + columns[2][None, :] * (right_cn - left_cn)


@triton.jit
def of_rows(x_n):
    """Return a tuple that holds `x_n` `sample.ROWS` times, once per label row that a lane processes at a time."""
    rows = ()
    for _ in tl.static_range(ROWS):
        rows += (x_n,)
    return rows


@triton.jit
def replaced(rows, at: tl.constexpr, x_n):
    """Return a copy of the tuple `rows` (ROWS elements) in which element `at` is `x_n`."""
    new = ()
    for q in tl.static_range(ROWS):
        new += (x_n if q == at else rows[q],)
    return new


@triton.jit
def choose(masks, a, b):
    """Return a tuple that has a[q] where masks[q] is true and b[q] elsewhere, for tuples of ROWS blocks."""
    rows = ()
    for q in tl.static_range(ROWS):
        rows += (tl.where(masks[q], a[q], b[q]),)
    return rows


@triton.jit
def student_logits(top_cn, bottom_cn, blend_q):
    """Return the student's logits of c classes at n pixels of a label row, (c, n): the weighted mean of two logit rows.

    `top_cn` and `bottom_cn` are the rows above and below the label row, (c, n) each. `blend_q[0]` is the weight of the
    row below, (n,) from 0 to 1. Further elements of `blend_q` are for the target.
    """
    return top_cn + blend_q[0][None, :] * (bottom_cn - top_cn)


@triton.jit
def along_rows(rows, columns, offset_c):
    """Interpolate three rows of target logits at each lane's label column, for a block of c classes.

    Shapes and units:
        rows: a tuple with the three rows. Each has n pointers to the row's class 0, one per lane.
        columns: (left, right, weight) from `load_columns`, one per lane: the indices of two neighbouring logits in a
            row, and the weight of the right one.
        offset_c: offset of each class in elements.
    Returns: a tuple of three (c, n) float32 blocks.
    """
    return (
        along_row(rows[0], columns, offset_c),
        along_row(rows[1], columns, offset_c),
        along_row(rows[2], columns, offset_c),
    )


@triton.jit
def target_logits(lines, blend_q):
    """Return the target's logits of c classes at n pixels of a label row, (c, n), as a weighted sum of three rows.

    `lines` has the three rows, (c, n) each, already interpolated along the row. `blend_q` is a tuple. Its elements 1, 2
    and 3 are the rows' weights, (n,) each. Element 0 is not used here.
    """
    v_cn = tl.fma(blend_q[2][None, :], lines[1], blend_q[1][None, :] * lines[0])
    return tl.fma(blend_q[3][None, :], lines[2], v_cn)


@triton.jit
def softmax_sums(
    student_rows, student_columns, target_rows, target_columns, blend, sizes, temperature, pixels,
    POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return four sums over all classes for ROWS label rows: of 2^(T u), 2^u, 2^v and 2^v (v - u).

    u and v are the student's and the target's logits times log2(e) / T at a label pixel. Each lane has one label
    column.

    Shapes and units:
        student_rows, target_rows: pointers to the two student rows and the three target rows around the label rows.
        student_columns, target_columns: (left, right, weight) from `load_columns`, one per lane: the indices of two
            neighbouring logits in a row, and the weight of the right one.
        blend: for each label row, a tuple with the weight of the lower student row and those of the three target rows.
        sizes: number of classes, and the offset in elements from one class to the next of the student and of the
            target.
        temperature: T. POWER: T if it is an integer up to 4, else 0.
        pixels: `Pixels`. Its USE_CE and USE_KL say which sums are needed.
        BLOCK: classes that are read at a time, a divisor of the number of classes.
    Returns: four tuples of ROWS float32 blocks. Sums that no term needs are 0.
    """
    s1 = of_rows(tl.zeros(blend[0][0].shape, tl.float32))
    su = s1
    sv = s1
    cross = s1
    for start in range(0, sizes[0], BLOCK):
        c = start + tl.arange(0, BLOCK)
        top = along_row(student_rows[0], student_columns, c * sizes[1])
        bottom = along_row(student_rows[1], student_columns, c * sizes[1])
        lines = (top,)
        if pixels.USE_KL:
            lines = along_rows(target_rows, target_columns, c * sizes[2])
        for q in tl.static_range(ROWS):
            u = student_logits(top, bottom, blend[q])
            if pixels.USE_KL:
                v = target_logits(lines, blend[q])
                eu = tl.exp2(u)
                ev = tl.exp2(v)
                su = replaced(su, q, su[q] + tl.sum(eu, 0))
                sv = replaced(sv, q, sv[q] + tl.sum(ev, 0))
                cross = replaced(cross, q, cross[q] + tl.sum(ev * (v - u), 0))
                if pixels.USE_CE and POWER > 1:
                    s1 = replaced(s1, q, s1[q] + tl.sum(power(eu, POWER), 0))
            if pixels.USE_CE and POWER == 0:
                s1 = replaced(s1, q, s1[q] + tl.sum(tl.exp2(temperature * u), 0))
    if pixels.USE_CE and POWER == 1:
        s1 = su
    return s1, su, sv, cross


@triton.jit
def softmax_sums_below_peaks(
    student_rows, student_columns, target_rows, target_columns, blend, sizes, temperature, pixels
):
    """Return four sums over all classes and two maxima for ROWS label rows, for logits of any range.

    u and v are the student's and the target's logits times log2(e) / T at a label pixel. The sums are of 2^(T u), 2^u,
    2^v and 2^v (v - u), after subtracting the pixel's largest u from every u and its largest v from every v.

    Shapes and units:
        student_rows, target_rows: pointers to the two student rows and the three target rows around the label rows.
        student_columns, target_columns: (left, right, weight) from `load_columns`, as in `softmax_sums`.
        blend: for each label row, a tuple with the weight of the lower student row and those of the three target rows.
        sizes: (number of classes, elements from one student class to the next, the same for the target).
        temperature: T. pixels: `Pixels`, for the terms to compute.
    Returns: the four sums, the last one times 2^-12, then the largest u and the largest v. Each is a tuple of ROWS
        blocks, one per label row.
    """
    zero = tl.zeros(blend[0][0].shape, tl.float32)
    s1 = of_rows(zero)
    su = s1
    sv = s1
    cross = s1
    peaks_u = of_rows(zero + LOWEST_LOGIT / tl.maximum(temperature, 1.0))
    peaks_v = of_rows(zero + LOWEST_LOGIT)
    for start in range(sizes[0]):
        c = start + tl.arange(0, 1)
        top = along_row(student_rows[0], student_columns, c * sizes[1])
        bottom = along_row(student_rows[1], student_columns, c * sizes[1])
        lines = (top,)
        if pixels.USE_KL:
            lines = along_rows(target_rows, target_columns, c * sizes[2])
        for q in tl.static_range(ROWS):
            u = tl.sum(student_logits(top, bottom, blend[q]), 0)
            higher = tl.maximum(peaks_u[q], u)
            step_u = peaks_u[q] - higher
            peaks_u = replaced(peaks_u, q, higher)
            u -= higher
            if pixels.USE_CE:
                s1 = replaced(s1, q, s1[q] * tl.exp2(temperature * step_u) + tl.exp2(temperature * u))
            if pixels.USE_KL:
                v = tl.sum(target_logits(lines, blend[q]), 0)
                higher = tl.maximum(peaks_v[q], v)
                step_v = peaks_v[q] - higher
                peaks_v = replaced(peaks_v, q, higher)
                v -= higher
                ev = tl.exp2(v)
                before = sv[q] * tl.exp2(step_v)
                of_both = cross[q] * tl.exp2(step_v) + before * SMALL * (step_v - step_u) + ev * SMALL * (v - u)
                cross = replaced(cross, q, of_both)
                sv = replaced(sv, q, before + ev)
                su = replaced(su, q, su[q] * tl.exp2(step_u) + tl.exp2(u))
    return s1, su, sv, cross, peaks_u, peaks_v


@triton.jit
def student_group(y_n, cell_n, taps, H):
    """Return which of ROWS consecutive label rows lie in a given row of bilinear cells, and their bilinear weights.

    Row i of bilinear cells lies between logit rows i and i + 1.

    Shapes and units:
        y_n: the first of the label rows, one per lane. cell_n: the number i of the row of cells, one per lane.
        taps: `geometry.Taps` of the H label rows in the student's logits.
    Returns: (live, fractions), tuples with a block per label row
        live: bool, whether the label row lies in row i of cells.
        fractions: float32, the weight of logit row i + 1 in the label row.
    """
    live = ()
    fractions = ()
    for q in tl.static_range(ROWS):
        row_n = tl.minimum(y_n + q, H - 1)
        fraction_n = tl.load(taps.fraction + row_n)
        own_cell_n = cell_of(tl.load(taps.index + row_n), fraction_n)
        live += ((y_n + q < H) & (own_cell_n == cell_n),)
        fractions += (tl.where(own_cell_n < 0, 1.0, fraction_n),)
    return live, fractions


@triton.jit
def target_row(at_n, first_n, taps, scale):
    """Return the weights with which three consecutive rows of target logits are interpolated to a label row.

    The rows of logits are `first_n` to `first_n + 2`. Two of them are the label row's neighbours.

    Shapes and units:
        at_n: index of the label row's entry in `taps`, one per lane.
        taps: `geometry.Taps` of the label rows in the target's logits.
        scale: factor of the weights, or None for 1.
    Returns: (reached, inside, (fraction, below), weights)
        reached: whether both neighbours are among the three rows. Only then are `below` and `weights` valid.
        inside: whether the label row lies in the view.
        fraction: weight of the lower neighbour.
        below: True if the neighbours are the last two of the three rows, False if they are the first two.
        weights: the weights of the three rows, times `scale`.
    """
    index_n = tl.load(taps.index + at_n)
    fraction_n = tl.load(taps.fraction + at_n)
    reached_n = (index_n >= first_n) & (index_n <= first_n + 1)
    below_n = index_n > first_n
    upper_n = 1.0 - fraction_n
    weights = (
        tl.where(below_n, 0.0, upper_n),
        tl.where(below_n, upper_n, fraction_n),
        tl.where(below_n, fraction_n, 0.0),
    )
    if scale is not None:
        weights = (weights[0] * scale, weights[1] * scale, weights[2] * scale)
    return reached_n, tl.load(taps.inside + at_n) != 0, (fraction_n, below_n), weights


@triton.jit
def load_columns(at_n, taps, width):
    """Return (left, right, weight) of label columns: indices of two neighbouring logits, and the right one's weight.

    `at_n` has indices of entries in `taps`, the `geometry.Taps` of the label columns. `width` is the number of logits
    of a row.
    """
    left_n = tl.load(taps.index + at_n)
    return left_n, tl.minimum(left_n + 1, width - 1), tl.load(taps.fraction + at_n)


@triton.jit
def lost_on_row(lost_n, columns):
    """Return for each lane 1 (int32) if a lost logit of a row enters its label column with a weight above 0, else 0.

    `lost_n` points to the row's uint8 marks, one pointer per lane. `columns` is from `load_columns`.
    """
    left_n = tl.load(lost_n + columns[0]).to(tl.int32)
    return left_n | tl.load(lost_n + columns[1], mask=columns[2] > 0, other=0).to(tl.int32)


@triton.jit
def label_logit(rows, columns, fraction_n, offset_n):
    """Return the student's logit of one class at each lane's label pixel, interpolated bilinearly between four.

    The logits are as `prepare_kernel` wrote them: (logit - maximum over the classes) * log2(e) / T.

    Shapes and units:
        rows: pointers to the rows of these logits above and below the pixel. fraction_n: weight of the row below.
        columns: (index of the logit to the left, index of the logit to the right, weight of the right one).
        offset_n: offset of the class in elements. n is the number of lanes.
    """
    left_n, right_n, column_n = columns
    top_n = tl.load(rows[0] + left_n + offset_n)
    top_n += column_n * (tl.load(rows[0] + right_n + offset_n) - top_n)
    bottom_n = tl.load(rows[1] + left_n + offset_n)
    bottom_n += column_n * (tl.load(rows[1] + right_n + offset_n) - bottom_n)
    return top_n + fraction_n * (bottom_n - top_n)


@triton.jit
def visit(
    r, y_n, student_rows, student_lost_rows, target_rows, target_lost_rows, mix_rows, blend, target_places, left_n,
    right_n, first_n, target_at_n, live, in_view, label_n, label_gate_n, gate_n, label_stride_h, label_stride_w,
    label_gate_stride_h, label_gate_stride_w, gate_stride_h, gate_stride_w, value_ptrs, taps, target_taps, pixels, k_ce,
    k_kl, label_factors, sizes, W, wt, temperature, HAS_GRADIENT: tl.constexpr, POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute CE and KL of up to ROWS label pixels per lane, and store the factors of their gradient.

    Each lane has a bilinear cell (the label pixels between four neighbouring logits). It handles the cell's label
    column r and the label rows from `y_n` on. u and v are the student's and the target's logits times log2(e) / T at a
    label pixel.

    Shapes and units:
        student_rows, target_rows: pointers to the two student rows and three target rows around the pixels, one per
            lane.
        student_lost_rows, target_lost_rows: pointers to these rows in the uint8 marks of lost positions.
        mix_rows: pointers to the two student rows in `Prepared.mix`, read only with label smoothing.
        blend: for each label row, a tuple with the weight of the lower student row and those of the three target rows.
        target_places: for each label row, (fraction, below) from `target_row`.
        left_n, right_n: the student's columns left and right of the cell. first_n: the cell's first label column.
        target_at_n: first entry of the image in `target_taps`. taps, target_taps: `geometry.Taps` of the label columns.
        live, in_view: per label row, whether it belongs to the cell, and whether it lies in the target's view.
        label_n, label_gate_n, gate_n: pointers to the image's labels and weights in CE and in KL, or None, with strides
            in elements.
        value_ptrs: where to store eight numbers per pixel for `tile_gradient.add_gradient`, if HAS_GRADIENT.
        pixels: `Pixels`. k_ce, k_kl: factors of the terms in the gradient. label_factors: from `load_label_factors`.
        sizes: (number of classes, elements from one student class to the next, the same for the target). W, wt: label
            columns and columns of the target's logits.
        temperature: T. POWER: T if it is an integer up to 4, else 0. BLOCK: classes that are read at a time.
    Returns: each lane's weighted CE and KL in nats, and 1 if the stored factors are relative to the largest u and v,
        else 0.
    """
    x_n = tl.minimum(first_n + r, W - 1)
    columns = (left_n, right_n, tl.load(taps.fraction + x_n))
    target_columns = columns
    if pixels.USE_KL:
        target_columns = load_columns(target_at_n + x_n, target_taps, wt)
    s1, su, sv, cross = softmax_sums(
        student_rows, columns, target_rows, target_columns, blend, sizes, temperature, pixels, POWER, BLOCK
    )
    zero = tl.zeros(x_n.shape, tl.float32)
    low = ()
    any_low = tl.zeros(x_n.shape, tl.int32)
    for q in tl.static_range(ROWS):
        lowest = s1[q]
        if pixels.USE_KL:
            lowest = tl.where(tl.abs(cross[q]) < float("inf"), tl.minimum(su[q], sv[q]), 0.0)
            if pixels.USE_CE:
                lowest = tl.minimum(lowest, s1[q])
        low += (lowest < LOWEST_SUM,)
        any_low = any_low | (lowest < LOWEST_SUM).to(tl.int32)
    peaks_u = of_rows(zero)
    peaks_v = peaks_u
    has_peaks = 0
    if tl.max(any_low, 0) > 0:
        # A pixel keeps its first sums where they serve: its bits must not depend on who shares the program.
        s1_low, su_low, sv_low, cross_low, peaks_u_low, peaks_v_low = softmax_sums_below_peaks(
            student_rows, columns, target_rows, target_columns, blend, sizes, temperature, pixels
        )
        s1 = choose(low, s1_low, s1)
        su = choose(low, su_low, su)
        sv = choose(low, sv_low, sv)
        cross = choose(low, cross_low, cross)
        peaks_u = choose(low, peaks_u_low, peaks_u)
        peaks_v = choose(low, peaks_v_low, peaks_v)
        has_peaks = 1
    student_lost = lost_on_row(student_lost_rows[0], columns)
    student_lost_below = lost_on_row(student_lost_rows[1], columns)
    if pixels.USE_KL:
        column_inside = tl.load(target_taps.inside + target_at_n + x_n) != 0
        lost0 = lost_on_row(target_lost_rows[0], target_columns)
        lost1 = lost_on_row(target_lost_rows[1], target_columns)
        lost2 = lost_on_row(target_lost_rows[2], target_columns)
    ce_n = zero
    kl_n = zero
    for q in tl.static_range(ROWS):
        at_ptrs = value_ptrs + (r * ROWS + q) * (VALUES * x_n.shape[0])
        y64_n = (y_n + q).to(tl.int64)
        label_ptrs = label_n
        if label_n is not None:
            label_ptrs += y64_n * label_stride_h + x_n * label_stride_w
        label_gate_ptrs = label_gate_n
        if label_gate_n is not None:
            label_gate_ptrs += y64_n * label_gate_stride_h + x_n * label_gate_stride_w
        gate_ptrs = gate_n
        if gate_n is not None:
            gate_ptrs += y64_n * gate_stride_h + x_n * gate_stride_w
        in_target = live[q]
        if pixels.USE_KL:
            in_target = in_view[q] & column_inside
        label, ce_weight, label_gate, kl_weight, ce_counted, kl_counted = load_pixel(
            pixels, label_ptrs, label_gate_ptrs, gate_ptrs, live[q], in_target
        )
        lost = (student_lost | tl.where(blend[q][0] > 0, student_lost_below, 0)) != 0
        if pixels.USE_CE:
            ce_weight = ce_weight.to(tl.float32)
            u_label = label_logit(student_rows, columns, blend[q][0], label * sizes[1])
            mix = u_label
            if pixels.SMOOTH:
                # The sum of the class weights times the maximum goes off every class's logit.
                mix = label_logit(mix_rows, columns, blend[q][0], label * 0)
                mix -= label_factors[2] / label_factors[1] * peaks_u[q]
            ce, scale, pull, even = label_terms(
                pixels, label_factors, ce_weight, label_gate, tl.log2(s1[q]), temperature * (u_label - peaks_u[q]),
                temperature * mix,
            )  # fmt: skip
            ce_n += tl.where(ce_counted & lost, float("nan"), ce)
            if HAS_GRADIENT:
                tl.store(at_ptrs, tl.where(ce_counted, label.to(tl.float32), -1.0))
                tl.store(at_ptrs + x_n.shape[0], k_ce * scale / s1[q])
                if pixels.WEIGHED:
                    tl.store(at_ptrs + 6 * x_n.shape[0], pull)
                if pixels.SMOOTH:
                    tl.store(at_ptrs + 7 * x_n.shape[0], even)
        if pixels.USE_KL:
            t_fraction, below = target_places[q]
            below_lost = tl.where(t_fraction > 0, tl.where(below, lost2, lost1), 0)
            lost = lost | ((tl.where(below, lost1, lost0) | below_lost) != 0)
            unit = tl.where(low[q], 1.0 / SMALL, 1.0)
            kl = (cross[q] / sv[q] * unit + tl.log2(su[q] / sv[q])) * kl_weight
            kl_n += tl.where(kl_counted & lost, float("nan"), kl)
            if HAS_GRADIENT:
                tl.store(at_ptrs + 2 * x_n.shape[0], k_kl * kl_weight / su[q])
                tl.store(at_ptrs + 3 * x_n.shape[0], k_kl * kl_weight / sv[q])
        if HAS_GRADIENT:
            tl.store(at_ptrs + 4 * x_n.shape[0], peaks_u[q])
            tl.store(at_ptrs + 5 * x_n.shape[0], peaks_v[q])
    return LN2 * ce_n, LN2 * kl_n, has_peaks
