"""The label pixels of one bilinear cell: their labels, the factors of their gradient, and what is lost.

A bilinear cell is the S x S label pixels between four neighbouring logits. Per-pixel values are tuples of ROWS * S
blocks, because Triton keeps those in registers.

Legend: S pixels of a cell's row; ROWS pixel rows of the cell that are done at a time; q row, r column of a pixel.
"""

import triton
import triton.language as tl

from ..common import VOID, load_label


@triton.jit
def reciprocal(x):
    """Return 1 / x, exact to one unit in the last place, for 2^-126 < x < 2^126.

    It improves a first estimate, at most 12 % off, in two cubic steps. That takes 7 instructions, and a division takes
    9.
    """
    estimate = (0x7EF311C7 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    error = tl.fma(-x, estimate, 1.0)
    estimate = tl.fma(estimate, tl.fma(error, error, error), estimate)
    error = tl.fma(-x, estimate, 1.0)
    return tl.fma(estimate, tl.fma(error, error, error), estimate)


@triton.jit
def unpack(labels, index: tl.constexpr):
    """Return the int32 class id of pixel `index` from `labels`, a tuple of int32 blocks with two 16-bit ids each.

    VOID (-1) and WRONG (-2) stay negative.
    """
    if index % 2 == 0:
        return (labels[index // 2] << 16) >> 16
    return labels[index // 2] >> 16


@triton.jit
def in_image(q: tl.constexpr, g, i, j, h, w, r: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr):
    """Return whether a pixel of bilinear cell (i, j) lies in the image. Cells at the edge lie half outside.

    Shapes and units:
        q, r: row and column of the pixel in its group. A group is ROWS x S pixels that are processed at a time.
        g: number of the group in the cell, from top to bottom, 0 to S / ROWS - 1.
        i, j: the cell lies between logits i and i + 1 vertically, and j and j + 1 horizontally. -1 is the first.
        h, w: rows and columns of the student's logits. S: label pixels per logit. A cell has S x S pixels.
    """
    column = j >= 0 if r < S // 2 else j < w - 1
    if ROWS == S:
        row = i >= 0 if q < S // 2 else i < h - 1
    else:
        row = ((g >= S // ROWS // 2) | (i >= 0)) & ((g < S // ROWS // 2) | (i < h - 1))
    return row & column


@triton.jit
def read_labels(label_ptrs, stride_h, stride_w, pixels, active, i, j, g, h, w, S: tl.constexpr, ROWS: tl.constexpr):
    """Load the labels of one group of pixels of every lane's bilinear cell.

    A bilinear cell is the S x S label pixels between four neighbouring logits. A group is ROWS of its S pixel rows.

    Shapes and units:
        label_ptrs: pointers to the first of these pixels, one per lane. stride_h and stride_w are in elements.
        pixels: `Pixels`, for the number of classes and the void id. active: bool, whether the lane has a cell.
        i, j: the cell lies between logits i and i + 1 vertically, and j and j + 1 horizontally. -1 is the first.
        g: number of the group in the cell, from top to bottom. h, w: rows and columns of the student's logits.
    Returns: (labels, bits, lowest, highest)
        labels: tuple of int32 blocks with two class ids each, see `unpack`.
        bits: int32, with bit (id modulo 32) set for each id.
        lowest, highest: the lowest id (at most 0) and the highest. VOID is -1, WRONG (out of range) is -2.
    """
    labels = ()
    bits = active.to(tl.int32) * 0
    lowest = bits
    highest = bits + VOID
    for q in tl.static_range(ROWS):
        for r in tl.static_range(S):
            exists = active & in_image(q, g, i, j, h, w, r, S, ROWS)
            ptrs = label_ptrs + q * stride_h + r * stride_w
            label = load_label(ptrs, exists, pixels.num_classes, pixels.IGNORE_INDEX)
            bits = bits | (1 << (label & 31))
            lowest = tl.minimum(lowest, label)
            highest = tl.maximum(highest, label)
            if r % 2 == 0:
                even = label & 0xFFFF
            else:
                labels += (even | (label << 16),)
    return labels, bits, lowest, highest


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
    """Return each pixel's factors in the gradient of CE and KL, and each bilinear cell's sums of logarithms for both.

    Each lane has one cell of S x S label pixels. A call handles a group of them: ROWS of the cell's S pixel rows.

    Shapes and units:
        ce, kl, teacher: tuples of ROWS * S blocks: each pixel's sums of exponentials, from `softmax_denominators`.
        labels: packed class ids, from `read_labels`.
        label_gate_ptrs, gate_ptrs: pointers to the weights in CE and in KL of the group's first pixel, with strides in
            elements.
        row_inside_ptrs, column_inside_ptrs: uint8, whether label rows and columns lie in the target's view, or None for
            all.
        pixels: the settings of the loss, `Pixels`. label_factors: from `load_label_factors`.
        k_ce, k_kl: factors of the terms in the gradient. zero: a float32 block of zeros.
        active: bool, whether the lane has a cell. g: number of the group in the cell, from the top.
        i, j: the cell lies between rows i and i + 1, and columns j and j + 1, of the h x w logits of the student.
    Returns: (ce_factors, kl_factors, teacher_factors, ce_log, kl_log, kl_any)
        ce_factors, kl_factors, teacher_factors: per pixel, k_ce * weight / ce, k_kl * gate / kl, and gate / teacher.
            weight is the pixel's weight in CE times its class weight, after label smoothing. It is 0 if CE does not
            count the pixel. gate is its weight in KL. It is 0 if KL does not count the pixel.
        ce_log, kl_log: per cell, the sums of weight * log2(ce) and of gate * log2(kl / teacher).
        kl_any: whether KL counts any pixel of the cell.
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
def any_lost(lost_ptr, top, bottom, low, width):
    """Return whether any of the four corners of a bilinear cell is lost, which makes all pixels of the cell unusable.

    Shapes and units:
        lost_ptr: uint8 marks of one image's logits, 1 for lost (NaN, infinite or too large).
        top, bottom: offsets in elements of the rows of marks above and below the cell.
        low: column to the left of the cell. Columns outside 0 to width - 1 are clamped.
    """
    left = tl.minimum(tl.maximum(low, 0), width - 1)
    right = tl.minimum(tl.maximum(low + 1, 0), width - 1)
    upper = tl.load(lost_ptr + top + left) | tl.load(lost_ptr + top + right)
    return (upper | tl.load(lost_ptr + bottom + left) | tl.load(lost_ptr + bottom + right)) != 0
