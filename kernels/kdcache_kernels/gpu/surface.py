"""One bilinear cell: a class's surface, its exponentials at the cell's pixels and their moments; what pixels count.

Between four corners the logits of a class are a surface `value + r dx + q (dy + r dxy)` over the pixels (q, r). Its
exponentials are therefore geometric sequences: 4 exp2 per cell and one multiplication per pixel replace an exp2 per
pixel. The gradient at the corners needs four moments of the pixels' gradients, and prefix sums yield them at 1.5
instructions per pixel: summing the partial sums of G[0], G[1], ..., G[S-1] weighs G[r] by S - 1 - r.

Every contraction is written as `tl.fma` and the kernels are compiled without automatic fusion, so that a result does
not depend on how a compiler groups the rest of a kernel.

Legend: S pixels of a cell's row; ROWS pixel rows of the cell that are done at a time; q row, r column of a pixel. A
grid is a tuple: pointers to the left pixels of the rows above and below a cell, elements of a class, first and step of
`interpolation`, and what multiplies its logits, the step included; None for 1. Per-pixel values are tuples of ROWS * S
blocks, because Triton keeps those in registers.
"""

import triton
import triton.language as tl

from .common import VOID, load_label, power


@triton.jit
def reciprocal(x):
    """Return 1 / x to within one unit in the last place, for 2^-126 < x < 2^126, in 7 instructions.

    The first estimate is at most 12% off, and each of two cubic steps cubes that error. A division costs 9 instructions
    and predicates, which are scarcer than registers here.
    """
    estimate = (0x7EF311C7 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    error = tl.fma(-x, estimate, 1.0)
    estimate = tl.fma(estimate, tl.fma(error, error, error), estimate)
    error = tl.fma(-x, estimate, 1.0)
    return tl.fma(estimate, tl.fma(error, error, error), estimate)


@triton.jit
def interpolation(low, width, flip, S: tl.constexpr):
    """Return where the S pixels of a cell from student column `low` to `low + 1` lie in a grid of `width` columns.

    Pixel r reads (1 - f) * x[column] + f * x[column + 1] with f = first + r * step. Before the first and after the last
    column, f is 0 or 1 for all pixels. With `flip`, the pixels run from right to left.

    Returns: (column, first, step). column and column + 1 lie in the grid, which has at least 2 columns.
    """
    inner = (low >= 0) & (low < width - 1)
    first = tl.where(flip, 1.0 - 0.5 / S, 0.5 / S)
    first = tl.where(inner, first, tl.where(low < 0, 0.0, 1.0))
    step = tl.where(inner, tl.where(flip, -1.0 / S, 1.0 / S), 0.0)
    return tl.minimum(tl.maximum(low, 0), width - 2), first, step


@triton.jit
def load_corners(grid, c):
    """Return class c's values at the corners of every lane's cell: top left, top right, bottom left, bottom right."""
    offset = c * grid[2]
    return (
        tl.load(grid[0] + offset),
        tl.load(grid[0] + offset + 1),
        tl.load(grid[1] + offset),
        tl.load(grid[1] + offset + 1),
    )


@triton.jit
def make_surface(corners, grid, y_first, S: tl.constexpr):
    """Return (value, dx, dy, dxy), a class's bilinear logits in a cell: the value at pixel (0, 0) and its steps.

    The logit of pixel (q, r) is value + r * dx + q * (dy + r * dxy). `y_first` is how far the first row of pixels lies
    from the upper corners to the lower, 0 to 1. `corners` is from `load_corners`, and the module defines `grid`.
    """
    first, step, scale = grid[3], grid[4], grid[5]
    # Converted here and not where they are loaded, classes ahead.
    top_left = corners[0].to(tl.float32)
    bottom_left = corners[2].to(tl.float32)
    top = corners[1].to(tl.float32) - top_left
    bottom = corners[3].to(tl.float32) - bottom_left
    upper = tl.fma(top, first, top_left)
    rise = tl.fma(bottom, first, bottom_left) - upper
    twist = (bottom - top) * step
    value = tl.fma(rise, y_first, upper)
    per_row = 1.0 / S
    if scale is not None:
        value = value * scale
        per_row = scale * (1.0 / S)
    return value, tl.fma(twist, y_first, top * step), rise * per_row, twist * (1.0 / S)


@triton.jit
def exponentials(surface):
    """Return exp2 of a surface (value, dx, dy, dxy) as (first, x ratio, y ratio, ratio of two rows' x ratios)."""
    return tl.exp2(surface[0]), tl.exp2(surface[1]), tl.exp2(surface[2]), tl.exp2(surface[3])


@triton.jit
def scaled(surface, factor):
    """Return the surface (value, dx, dy, dxy) times a scalar."""
    return surface[0] * factor, surface[1] * factor, surface[2] * factor, surface[3] * factor


@triton.jit
def difference(a, b):
    """Return the surface a - b, each (value, dx, dy, dxy)."""
    return a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]


@triton.jit
def add_powers(sums, sequence, POWER: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr):
    """Return `sums` (a tuple with each pixel) plus `sequence` (see `exponentials`) to the power POWER."""
    row, ratio, row_ratio, twist = sequence
    new = ()
    for q in tl.static_range(ROWS):
        e = row
        before = row
        for r in tl.static_range(S):
            if POWER > 1:
                new += (tl.fma(power(e, POWER - 1), e, sums[q * S + r]),)
            elif r + 1 < S:
                new += (sums[q * S + r] + e,)
            else:
                new += (tl.fma(before, ratio, sums[q * S + r]),)
            before = e
            e = e * ratio
        if q + 1 < ROWS:
            row = row * row_ratio
            ratio = ratio * twist
    return new


@triton.jit
def moments(sequence, linear, higher, LINEAR: tl.constexpr, HIGHER: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr):
    """Return the four moments over a cell's pixels (q, r) of G = linear * e + higher * e ** HIGHER.

    e is the pixel's value of `sequence` (see `exponentials`). LINEAR turns the first summand on, HIGHER > 0 the second.
    `linear` and `higher` are tuples with a factor for each pixel.

    Returns: the sums of G, (S - 1 - r) G, (ROWS - 1 - q) G and (S - 1 - r) (ROWS - 1 - q) G.
    """
    row, ratio, row_ratio, twist = sequence
    for q in tl.static_range(ROWS):
        e = row
        for r in tl.static_range(S):
            if HIGHER == 0:
                weight = linear[q * S + r]
            elif HIGHER == 1:
                weight = higher[q * S + r]
                if LINEAR:
                    weight += linear[q * S + r]
            elif LINEAR:
                weight = tl.fma(power(e, HIGHER - 1), higher[q * S + r], linear[q * S + r])
            else:
                weight = power(e, HIGHER - 1) * higher[q * S + r]
            if r == 0:
                m0 = e * weight
                m1 = m0
            else:
                m0 = tl.fma(e, weight, m0)
                if r + 1 < S:
                    m1 += m0
            if r + 1 < S:
                e = e * ratio
        if q == 0:
            m00 = m0
            m10 = m1
            m01 = m0
            m11 = m1
        else:
            m00 += m0
            m10 += m1
            if q + 1 < ROWS:
                m01 += m00
                m11 += m10
        if q + 1 < ROWS:
            row = row * row_ratio
            ratio = ratio * twist
    return m00, m10, m01, m11


@triton.jit
def unpack(labels, index: tl.constexpr):
    """Return the class id of pixel `index` from `labels`, two ids of 16 bits each. VOID and WRONG stay negative."""
    if index % 2 == 0:
        return (labels[index // 2] << 16) >> 16
    return labels[index // 2] >> 16


@triton.jit
def label_moments(
    labels, gate_ptrs, gate_stride_h, gate_stride_w, c, ANY: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr
):
    """Return the four moments (see `moments`) of G, the CE weight of each pixel with label c, and 0 at other pixels.

    With ANY, take the labelled pixels of every class. `labels` is from `read_labels`. `gate_ptrs` points to the first
    pixel's weight, or is None for weights of 1. (Weights are loaded again, because keeping them costs a register per
    pixel.)
    """
    for q in tl.static_range(ROWS):
        for r in tl.static_range(S):
            label = unpack(labels, q * S + r)
            wanted = label >= 0 if ANY else label == c
            hit = tl.where(wanted, 1.0, 0.0)
            if gate_ptrs is not None:
                ptrs = gate_ptrs + q * gate_stride_h + r * gate_stride_w
                hit = tl.load(ptrs, mask=wanted, other=0).to(tl.float32)
            if r == 0:
                m0 = hit
                m1 = m0
            else:
                m0 += hit
                if r + 1 < S:
                    m1 += m0
        if q == 0:
            m00 = m0
            m10 = m1
            m01 = m0
            m11 = m1
        else:
            m00 += m0
            m10 += m1
            if q + 1 < ROWS:
                m01 += m00
                m11 += m10
    return m00, m10, m01, m11


@triton.jit
def subtract(a, factor, b):
    """Return a - factor * b for two tuples of four moments (see `moments`)."""
    return (
        tl.fma(-factor, b[0], a[0]),
        tl.fma(-factor, b[1], a[1]),
        tl.fma(-factor, b[2], a[2]),
        tl.fma(-factor, b[3], a[3]),
    )


@triton.jit
def contract(surface, m, S: tl.constexpr, ROWS: tl.constexpr):
    """Return the sum over a cell's pixels of surface * G, from the surface (value, dx, dy, dxy) and the moments m of G.

    The moments weigh a pixel by its distance to the last one, so the surface is first expressed relative to the last
    pixel.
    """
    value, dx, dy, dxy = surface
    last_dx = tl.fma(dxy, ROWS - 1.0, dx)
    last_dy = tl.fma(dxy, S - 1.0, dy)
    last = tl.fma(last_dy, ROWS - 1.0, tl.fma(dx, S - 1.0, value))
    total = tl.fma(-last_dx, m[1], last * m[0])
    return tl.fma(dxy, m[3], tl.fma(-last_dy, m[2], total))


@triton.jit
def in_image(q: tl.constexpr, g, i, j, h, w, r: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr):
    """Return whether pixel (q, r) of turn g of cell (i, j) lies in the image. Half of an edge cell does not."""
    column = j >= 0 if r < S // 2 else j < w - 1
    if ROWS == S:
        row = i >= 0 if q < S // 2 else i < h - 1
    else:
        row = ((g >= S // ROWS // 2) | (i >= 0)) & ((g < S // ROWS // 2) | (i < h - 1))
    return row & column


@triton.jit
def read_labels(label_ptrs, stride_h, stride_w, pixels, active, i, j, g, h, w, S: tl.constexpr, ROWS: tl.constexpr):
    """Load labels for turn g of cell (i, j): ROWS of its S pixel rows. A cell's S x S pixels lie between four logits.

    `label_ptrs` has the address of each cell's first pixel of the turn. Strides are in elements. `active` masks cells.
    Returns: tuple of int32 with two class ids each (see `unpack`), an int32 with a bit for each label modulo 32, and
        the lowest and the highest label.
    """
    labels = ()
    seen = active.to(tl.int32) * 0
    lowest = seen
    highest = seen + VOID
    for q in tl.static_range(ROWS):
        for r in tl.static_range(S):
            exists = active & in_image(q, g, i, j, h, w, r, S, ROWS)
            ptrs = label_ptrs + q * stride_h + r * stride_w
            label = load_label(ptrs, exists, pixels.num_classes, pixels.IGNORE_INDEX)
            seen = seen | (1 << (label & 31))
            lowest = tl.minimum(lowest, label)
            highest = tl.maximum(highest, label)
            if r % 2 == 0:
                even = label & 0xFFFF
            else:
                labels += (even | (label << 16),)
    return labels, seen, lowest, highest


@triton.jit
def _split(value, counted, exponent, product):
    """Multiply a running product by `value` where counted, in two parts: the exponent's bits and the mantissas'.

    One logarithm then does for all pixels of a cell.
    """
    bits = tl.where(counted, value, 1.0).to(tl.int32, bitcast=True)
    return exponent + (bits >> 23), product * ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def pixel_factors(
    ce, kl, teacher, labels, label_gate_ptrs, label_gate_stride_h, label_gate_stride_w, pixels, gate_ptrs,
    gate_stride_h, gate_stride_w, row_inside_ptrs, column_inside_ptrs, k_ce, k_kl, label_factors, active,
    i, j, g, h, w, zero, S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return the factors of every pixel's exponentials in the gradient, and the cell's sums of the loss.

    Shapes and units:
        ce, kl, teacher: tuples with each pixel's sum of exponentials, from `softmax_denominators`.
        labels: from `read_labels`.
        k_ce, k_kl: factors of the terms in the gradient.
    Returns: three tuples with a factor per pixel: k_ce * weight / ce, k_kl * gate / kl, and gate / teacher. Then the
        cell's sums of weight * log2(ce) and of gate * log2(kl / teacher), and whether KL counts any of its pixels.
        weight and gate are the pixel's weights in CE and in KL, 0 if not counted.
    """
    ce_factors = ()
    kl_factors = ()
    teacher_factors = ()
    ce_log = zero
    kl_log = zero
    ce_exponent = zero.to(tl.int32)
    kl_exponent = ce_exponent
    ce_product = zero + 1.0
    kl_product = ce_product
    kl_any = active != active
    for q in tl.static_range(ROWS):
        for r in tl.static_range(S):
            if pixels.USE_CE:
                label = unpack(labels, q * S + r)
                factor = reciprocal(ce[q * S + r]) * k_ce
                if pixels.class_weight is not None or pixels.label_gate is not None:
                    weight = tl.where(label >= 0, 1.0, 0.0)
                    if pixels.class_weight is not None:
                        weight = tl.load(pixels.class_weight + label, mask=label >= 0, other=0.0).to(tl.float32)
                        if pixels.SMOOTH:
                            weight = tl.where(label >= 0, tl.fma(weight, label_factors[0], label_factors[2]), 0.0)
                    if pixels.label_gate is not None:
                        ptrs = label_gate_ptrs + q * label_gate_stride_h + r * label_gate_stride_w
                        weight = weight * tl.load(ptrs, mask=label >= 0, other=0).to(tl.float32)
                    ce_log = tl.fma(weight, tl.log2(ce[q * S + r]), ce_log)
                    factor = factor * weight
                else:
                    ce_exponent, ce_product = _split(ce[q * S + r], label >= 0, ce_exponent, ce_product)
                    factor = tl.where(label >= 0, factor, 0.0)
                ce_factors += (factor,)
            if pixels.USE_KL:
                counted = active & in_image(q, g, i, j, h, w, r, S, ROWS)
                if row_inside_ptrs is not None:
                    counted = counted & (tl.load(row_inside_ptrs + q, mask=counted, other=0) != 0)
                    counted = counted & (tl.load(column_inside_ptrs + r, mask=counted, other=0) != 0)
                if not pixels.DISTILL_VOID:
                    counted = counted & (unpack(labels, q * S + r) != VOID)
                kl_any = kl_any | counted
                inverse = reciprocal(teacher[q * S + r])
                ratio = kl[q * S + r] * inverse
                factor = reciprocal(kl[q * S + r]) * k_kl
                if pixels.gate is not None:
                    ptrs = gate_ptrs + q * gate_stride_h + r * gate_stride_w
                    gate = tl.load(ptrs, mask=counted, other=0).to(tl.float32)
                    kl_log = tl.fma(gate, tl.log2(ratio), kl_log)
                    factor = factor * gate
                    inverse = inverse * gate
                else:
                    kl_exponent, kl_product = _split(ratio, counted, kl_exponent, kl_product)
                    factor = tl.where(counted, factor, 0.0)
                    inverse = tl.where(counted, inverse, 0.0)
                kl_factors += (factor,)
                teacher_factors += (inverse,)
    if pixels.class_weight is None and pixels.label_gate is None:
        ce_log = (ce_exponent - 127 * ROWS * S).to(tl.float32) + tl.log2(ce_product)
    if pixels.gate is None:
        kl_log = (kl_exponent - 127 * ROWS * S).to(tl.float32) + tl.log2(kl_product)
    return ce_factors, kl_factors, teacher_factors, ce_log, kl_log, kl_any


@triton.jit
def softmax_denominators(
    student, target, y_first, pixels, temperature, zero, S: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr
):
    """Return each pixel's sum of exponentials over classes: student at T = 1, student at T, target at T."""
    ce = ()
    kl = ()
    teacher = ()
    for _ in tl.static_range(ROWS * S):
        ce += (zero,)
        kl += (zero,)
        teacher += (zero,)
    a = load_corners(student, 0)
    b = a
    if pixels.USE_KL:
        b = load_corners(target, 0)
    for c in range(pixels.num_classes):
        surface = make_surface(a, student, y_first, S)
        sequence = exponentials(surface)
        if pixels.USE_KL:
            teacher_sequence = exponentials(make_surface(b, target, y_first, S))
        # The next class's corners are on their way while this one's pixels are computed.
        following = tl.minimum(c + 1, pixels.num_classes - 1)
        a = load_corners(student, following)
        if pixels.USE_KL:
            b = load_corners(target, following)
            kl = add_powers(kl, sequence, 1, S, ROWS)
            teacher = add_powers(teacher, teacher_sequence, 1, S, ROWS)
        if pixels.USE_CE and POWER == 0:
            ce = add_powers(ce, exponentials(scaled(surface, temperature)), 1, S, ROWS)
        elif pixels.USE_CE and (POWER > 1 or not pixels.USE_KL):
            ce = add_powers(ce, sequence, POWER, S, ROWS)
    if POWER == 1 and pixels.USE_KL:
        ce = kl
    return ce, kl, teacher


@triton.jit
def class_moments(
    surface, sequence, share, ce, kl, k_kl, pixels, temperature,
    S: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Return the four moments (see `moments`) of a class's gradient at a cell's pixels, without the part of its labels.

    Shapes and units:
        surface: the student's logits in the cell times log2(e) / T, (value, dx, dy, dxy).
        sequence: their exponentials, from `exponentials`.
        share: the moments of the target's probability of the class times the pixel's gate.
        ce, kl: tuples with the factor of each pixel's exponentials in CE and in KL, from `pixel_factors`.
        k_kl: factor of KL in the gradient, applied to `share`.
    """
    if pixels.USE_CE and POWER == 0:
        m = moments(exponentials(scaled(surface, temperature)), ce, ce, False, 1, S, ROWS)
        if pixels.USE_KL:
            m = subtract(m, -1.0, moments(sequence, kl, kl, True, 0, S, ROWS))
    elif pixels.USE_CE:
        m = moments(sequence, kl, ce, pixels.USE_KL, POWER, S, ROWS)
    else:
        m = moments(sequence, kl, kl, True, 0, S, ROWS)
    if pixels.USE_KL:
        m = subtract(m, k_kl, share)
    return m


@triton.jit
def any_lost(lost_ptr, top, bottom, low, width):
    """Return whether one of a cell's four corners is lost, which affects all pixels of the cell.

    `top` and `bottom` are the offsets of the upper and the lower row in `lost_ptr`, `low` is the left column, and
    `width` the number of columns. Columns outside are clamped.
    """
    left = tl.minimum(tl.maximum(low, 0), width - 1)
    right = tl.minimum(tl.maximum(low + 1, 0), width - 1)
    upper = tl.load(lost_ptr + top + left) | tl.load(lost_ptr + top + right)
    return (upper | tl.load(lost_ptr + bottom + left) | tl.load(lost_ptr + bottom + right)) != 0
