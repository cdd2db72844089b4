"""One bilinear cell: a class's surface, its exponentials at the cell's pixels and their moments.

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

from ..common import power
from .pixels import unpack


@triton.jit
def interpolation(low, width, flip, S: tl.constexpr):
    """Return the bilinear weights of the S pixel columns between columns `low` and `low + 1` of a logit map.

    Pixel column r has the value (1 - f) * x[column] + f * x[column + 1] with f = first + r * step. Outside the map, f
    is 0 or 1 for all pixels, which repeats the edge.

    Shapes and units:
        low: int32, the map's column to the left of the pixels. -1 lies before the map, width - 1 is the last column.
        width: columns of the map, at least 2. flip: whether the pixels run from right to left.
        S: label pixels per logit.
    Returns: (column, first, step). Both column and column + 1 lie in the map.
    """
    inner = (low >= 0) & (low < width - 1)
    first = tl.where(flip, 1.0 - 0.5 / S, 0.5 / S)
    first = tl.where(inner, first, tl.where(low < 0, 0.0, 1.0))
    step = tl.where(inner, tl.where(flip, -1.0 / S, 1.0 / S), 0.0)
    return tl.minimum(tl.maximum(low, 0), width - 2), first, step


@triton.jit
def load_corners(grid, c):
    """Return class c's logits at the four corners of every lane's bilinear cell.

    The result is (top left, top right, bottom left, bottom right), a block each. `grid` begins with (top, bottom, class
    stride): pointers to class 0 of the top left and of the bottom left corners, and the elements between two classes.
    The right corners are the next elements in memory. Further elements of `grid` are not read.
    """
    offset = c * grid[2]
    return (
        tl.load(grid[0] + offset),
        tl.load(grid[0] + offset + 1),
        tl.load(grid[1] + offset),
        tl.load(grid[1] + offset + 1),
    )


@triton.jit
def make_surface(corners, grid, y_first, S: tl.constexpr):
    """Return one class's logits at all pixels of every lane's bilinear cell, as a surface (value, dx, dy, dxy).

    A bilinear cell is the S x S pixels between four neighbouring logits. The logit of the pixel in row q, column r is
    value + r * dx + q * (dy + r * dxy).

    Shapes and units:
        corners: the class's logits at the four corners (top left, top right, bottom left, bottom right).
        grid: (top, bottom, class stride, first, step, scale). top and bottom point to class 0 of the top left corners
            and of the bottom left corners. The stride is in elements. first is the weight of the right corners in the
            first pixel column. step is what this weight grows by per column, times scale. scale is a factor of the
            logits, or None for 1.
        y_first: weight of the bottom corners in the first pixel row, 0 to 1.
        S: label pixels per logit.
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
    """Return exp2 of the four numbers of a surface (value, dx, dy, dxy), see `make_surface`.

    The result (first, x_ratio, y_ratio, twist) gives the exponential of the pixel in row q, column r without another
    exp2: first * x_ratio^r * y_ratio^q * twist^(q r).
    """
    return tl.exp2(surface[0]), tl.exp2(surface[1]), tl.exp2(surface[2]), tl.exp2(surface[3])


@triton.jit
def scaled(surface, factor):
    """Return a surface with all logits multiplied by the number `factor`.

    A surface is a tuple (value, dx, dy, dxy), from which every logit in a bilinear cell follows (see `make_surface`).
    """
    return surface[0] * factor, surface[1] * factor, surface[2] * factor, surface[3] * factor


@triton.jit
def difference(a, b):
    """Return the difference a - b of two surfaces (value, dx, dy, dxy), see `make_surface`."""
    return a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]


@triton.jit
def add_powers(sums, sequence, POWER: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr):
    """Return each pixel's sum increased by the POWER-th power of the pixel's exponential, as a tuple like `sums`.

    Shapes and units:
        sums: tuple of ROWS * S blocks. The pixel in row q, column r of a bilinear cell has index q * S + r.
        sequence: the four numbers from `exponentials` that give the exponential of every pixel of the cell.
        POWER: 1 to 4. S, ROWS: pixels per row, and pixel rows.
    """
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
    """Return four weighted sums (moments) of a number G over the pixels of a bilinear cell.

    At the pixel in row q, column r, G = linear * e + higher * e ** HIGHER, with e the pixel's exponential. If G is the
    gradient by the pixel's logit, its moments determine the gradient at the cell's corners.

    Shapes and units:
        sequence: (first, x_ratio, y_ratio, twist), with e = first * x_ratio^r * y_ratio^q * twist^(q r).
        linear, higher: tuples of ROWS * S blocks, a factor per pixel.
        LINEAR: whether to include the first summand. HIGHER: exponent of the second, or 0 to leave it out.
        S, ROWS: pixels per row, and pixel rows.
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
def label_moments(
    labels, gate_ptrs, gate_stride_h, gate_stride_w, c, ANY: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr
):
    """Return the four moments (see `moments`) of the weights in CE of a bilinear cell's pixels with label c.

    Shapes and units:
        labels: packed class ids, from `read_labels`.
        gate_ptrs: pointers to the weight in CE of each cell's first pixel, or None for weights of 1. gate_stride_h
            and gate_stride_w are in elements.
        c: the class id. ANY: True to take the labelled pixels of all classes instead of class c.
        S, ROWS: pixels per row, and pixel rows.
    """
    for q in tl.static_range(ROWS):
        for r in tl.static_range(S):
            label = unpack(labels, q * S + r)
            selected = label >= 0 if ANY else label == c
            hit = tl.where(selected, 1.0, 0.0)
            if gate_ptrs is not None:
                ptrs = gate_ptrs + q * gate_stride_h + r * gate_stride_w
                hit = tl.load(ptrs, mask=selected, other=0).to(tl.float32)
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
    """Return the sum of surface * G over the pixels of a bilinear cell, computed from the moments of G.

    G is a number for each pixel, such as the gradient by its logit.

    Shapes and units:
        surface: (value, dx, dy, dxy), see `make_surface`.
        m: the four moments of G, from `moments`.
        S, ROWS: pixels per row, and pixel rows.
    """
    value, dx, dy, dxy = surface
    last_dx = tl.fma(dxy, ROWS - 1.0, dx)
    last_dy = tl.fma(dxy, S - 1.0, dy)
    last = tl.fma(last_dy, ROWS - 1.0, tl.fma(dx, S - 1.0, value))
    total = tl.fma(-last_dx, m[1], last * m[0])
    return tl.fma(dxy, m[3], tl.fma(-last_dy, m[2], total))


@triton.jit
def softmax_denominators(
    student, target, y_first, pixels, temperature, zero, S: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr
):
    """Return the softmax denominators (sums over the classes) at each pixel of every lane's bilinear cell.

    Shapes and units:
        student, target: the two logit maps, each as a tuple (top, bottom, class stride, first, step, scale). top and
            bottom point to class 0 of the cells' upper and lower corners. `make_surface` explains all six as `grid`.
        y_first: weight of the bottom corners in the first pixel row, 0 to 1.
        pixels: a `Pixels` tuple, of which only `num_classes`, `USE_CE` and `USE_KL` are read. They are the number of
            classes, and whether CE and KL are computed.
        temperature: T. zero: a float32 block of zeros.
        S, ROWS: pixels per row, and pixel rows. POWER: T if it is 1 to 4, else 0.
    Returns: (ce, kl, teacher), tuples of ROWS * S blocks: the sums for the student at T = 1, the student at T, and the
        target at T.
    """
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
    """Return the four moments of the gradient of CE + KL by one class's logit, over the pixels of a bilinear cell.

    They are the weighted sums that `moments` returns, with this gradient as the number G. The gradient of CE lacks its
    negative part, which comes from the labels. The caller subtracts it with `label_moments`.

    Shapes and units:
        surface: the student's logits times log2(e) / T at the pixels, (value, dx, dy, dxy), see `make_surface`.
        sequence: `exponentials(surface)`, the exponentials of these logits.
        share: the four moments of gate * the target's probability of this class, read only with KL.
        ce, kl: tuples of ROWS * S blocks: each pixel's factors of the exponentials in CE and in KL, from
            `pixel_factors`.
        k_kl: factor of KL in the gradient, applied to `share`. pixels: `Pixels`, for the terms to compute.
        temperature: T. S, ROWS: pixels per row, and pixel rows. POWER: T if it is 1 to 4, else 0.
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
