"""The gradient of the kernel for bilinear cells (`cells`): from a class's moments to the corners of the cell.

A logit's gradient takes from four cells. See `cells` for lanes, strips and edges, and `surface` for moments.
"""

import triton
import triton.language as tl

from .surface import (
    class_moments,
    contract,
    difference,
    exponentials,
    label_moments,
    load_corners,
    make_surface,
    moments,
    subtract,
)


@triton.jit
def _spread(
    m, s_first, s_step, left_lane, upper_last, upper_step, step, g, writes, gradient_ptrs, edge_ptrs, plane,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Distribute a class's moments to the corners. Write the upper row of logits, and keep what its edges need."""
    left = tl.fma(s_step, m[1], s_first * m[0])
    left_upper = tl.fma(s_step, m[3], s_first * m[2])
    column = left + tl.gather(m[0] - left, left_lane, 0)
    column_upper = left_upper + tl.gather(m[2] - left_upper, left_lane, 0)
    top = tl.fma(upper_step, column_upper, upper_last * column)
    bottom = column - top
    closes = writes & (g == GROUPS - 1)
    bottom_plane = plane
    before_plane = plane
    if GROUPS > 1:
        # Over the turns of a row of cells, plane 3 sums the upper row and planes 1 and 2 in turns the lower one.
        bottom_plane = plane * (1 + step % 2)
        before_plane = plane * (2 - step % 2)
        later = writes & (g > 0)
        top = tl.load(edge_ptrs + 3 * plane, mask=later, other=0.0) + top
        bottom = tl.load(edge_ptrs + bottom_plane, mask=later, other=0.0) + bottom
        tl.store(edge_ptrs + 3 * plane, top, mask=writes)
    before = tl.load(edge_ptrs + before_plane, mask=closes & (step > 0), other=0.0)
    tl.store(gradient_ptrs, (before + top).to(gradient_ptrs.dtype.element_ty), mask=closes & (step > 0))
    tl.store(edge_ptrs, top, mask=closes & (step == 0))
    tl.store(edge_ptrs + bottom_plane, bottom, mask=writes)


@triton.jit
def write_gradient(
    student, target, y_first, labels, label_gate_ptrs, label_gate_stride_h, label_gate_stride_w, present, even, ce, kl,
    teacher, kl_cell, left_lane, upper_last, upper_step, step, g, writes, gradient_ptrs, edge_ptrs, k_ce, k_kl,
    label_factors, pixels, w, temperature,
    S: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Write the CE + KL gradient from ROWS pixel rows of every lane's bilinear cell to the logits at its corners.

    A bilinear cell is the S x S label pixels between four neighbouring logits, its corners. u and v are the student's
    and the target's logits times log2(e) / T at a pixel.

    Shapes and units:
        student, target: both logit maps, each a tuple as `grid` of `surface.make_surface`.
        y_first: weight of the bottom corners in the cell's first pixel row, 0 to 1.
        labels: packed class ids, from `read_labels`.
        label_gate_ptrs: pointers to the weight in CE of each cell's first pixel, or None for weights of 1.
        label_gate_stride_h, label_gate_stride_w: strides of these weights in elements.
        present: int32. Bit (id modulo 32) is set for each class id in `labels` of any lane.
        even: moments of the weights in CE of all labelled pixels, read only with label smoothing.
        ce, kl, teacher: each pixel's factors in the gradient, the first three results of `pixel_factors`.
        kl_cell: the cell's sum of logarithms for KL, `kl_log` of `pixel_factors`.
        left_lane: index of the lane with the cell to the left. writes: bool, which lanes write.
        upper_last, upper_step: weight of the top corners in the last pixel row, and its decrease per row.
        step: number of the cell's row in its strip (see `cells_kernel`), from 0.
        g: number of this group of ROWS pixel rows in the cell, 0 to S / ROWS - 1.
        gradient_ptrs: pointers to the gradient's class 0 at each cell's top left corner, or None for no gradient.
        edge_ptrs: pointers to class 0 of the same column in the strip's part of `cells_kernel`'s `edges_ptr`, or None.
        k_ce, k_kl: factors of the terms in the gradient. label_factors: from `load_label_factors`.
        pixels: `Pixels`. w: columns of logits. temperature: T.
        S, ROWS: pixels per row, and pixel rows. POWER: T if it is 1 to 4, else 0.
    Returns: (kl, label)
        kl: `kl_cell` plus the sum over pixels and classes of gate * the target's probability * (v - u).
        label: the sum over labelled pixels of class weight * weight in CE * u of the label. With label smoothing, it
            is times the share that a label keeps.
    """
    ce_label = kl_cell * 0.0
    last = pixels.num_classes - 1
    a = load_corners(student, last)
    b = a
    if pixels.USE_KL:
        b = load_corners(target, last)
    # Backwards: the classes that the first loop read last are still in the cache.
    for back in range(pixels.num_classes):
        c = last - back
        surface = make_surface(a, student, y_first, S)
        sequence = exponentials(surface)
        following = tl.maximum(c - 1, 0)
        a = load_corners(student, following)
        share = surface
        if pixels.USE_KL:
            teacher_surface = make_surface(b, target, y_first, S)
            b = load_corners(target, following)
            share = moments(exponentials(teacher_surface), teacher, teacher, True, 0, S, ROWS)
            kl_cell += contract(difference(teacher_surface, surface), share, S, ROWS)
        if gradient_ptrs is not None:
            m = class_moments(surface, sequence, share, ce, kl, k_kl, pixels, temperature, S, ROWS, POWER)
            if pixels.SMOOTH:
                of_class = k_ce * label_factors[1]
                if pixels.class_weight is not None:
                    of_class *= tl.load(pixels.class_weight + c).to(tl.float32)
                m = subtract(m, of_class, even)
        if pixels.USE_CE:
            # Few classes are in a warp's labels; for most, this is skipped.
            bit = (present >> (c & 31)) & 1
            if bit != 0:
                hits = label_moments(
                    labels, label_gate_ptrs, label_gate_stride_h, label_gate_stride_w, c, False, S, ROWS
                )
                weight = 1.0
                if pixels.class_weight is not None:
                    weight = tl.load(pixels.class_weight + c).to(tl.float32)
                if pixels.SMOOTH:
                    weight = weight * label_factors[0]
                # Loaded again: to keep the surface would cost registers at every class.
                again = make_surface(load_corners(student, c), student, y_first, S)
                ce_label += contract(again, hits, S, ROWS) * weight
                if gradient_ptrs is not None:
                    m = subtract(m, k_ce * weight, hits)
        if gradient_ptrs is not None:
            _spread(
                m, student[3], student[4], left_lane, upper_last, upper_step, step, g, writes,
                gradient_ptrs + c * student[2], edge_ptrs + c * w, pixels.num_classes * w, S // ROWS,
            )  # fmt: skip
    return kl_cell, ce_label
