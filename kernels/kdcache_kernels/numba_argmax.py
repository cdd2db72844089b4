# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls
"""The teacher's class and its probability at label size on the CPU, without a tensor of label size times classes.

A task is a strip of label rows. It keeps the two target rows that the current label row lies between, dense in float32
(a packed row is densified once and serves every label row near it), blends them, and stretches the blend to a block of
label columns, where it finds the largest class and then the sum of exponentials. Scratch: C rows of the target's width,
three times, and C x 256 numbers at most. On two cores 8 x 21 x 128^2, k = 8, to 512^2 takes XX ms, 2 x 150 x 128^2
XX ms (reference: XX and XX ms).

Legend: B batch, C classes, k kept classes, H W label size, h w the target's own size.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .numba_topk import OPTIONS, block_width, densify_block, exp, float_to_half, half_to_float, larger, packed_memory
from .reference import argmax_confidence_reference
from .threads import run
from .topk import PackedTarget, check_ids
from .window import view_positions

STRIP_ROWS = 16
"""Label rows of a task: two target rows more than it needs are read for each."""

_i = np.int32
_f = np.float32
_INFINITY = _f(np.inf)
_NAN = _f(np.nan)
_USABLE = _f(np.finfo(np.float32).max / 8)
"""As in the loss: a logit beyond it is lost, for a difference of two overflows."""


@njit(**OPTIONS)
def _taps(position, n_view, n_in, align_corners):
    """One position of an axis: (cell, weight of it, weight of the next cell), as `window.hat_matrix` computes them."""
    if not align_corners:
        source = position * n_in / n_view - 0.5
    elif n_view == 1:
        source = 0.0
    else:
        source = (position - 0.5) * (n_in - 1) / (n_view - 1)
    if source != source:
        return 0, _NAN, _NAN
    source = min(max(source, 0.0), float(n_in - 1))
    cell = int(source)
    return cell, _f(1.0 - (source - cell)), _f(1.0 - (cell + 1 - source))


@njit(**OPTIONS)
def _read_row(values, indices, tail, shape, image, row, w, out, lost, work):
    """Write a target row to `out` (C, w), zeros where it is lost; return whether a class id is out of range."""
    num_classes, k, pixels = shape
    wrong = False
    if k == num_classes:
        for c in range(num_classes):
            start = (image * k + c) * pixels + row * w
            given, line = values[start : start + w], out[c]
            for j in range(w):
                line[j] = half_to_float(given[j])
    else:
        flat = out.reshape(num_classes * w)
        wrong = densify_block(values, indices, tail, shape, image, row * w, w, flat, 0, w, work)
    lost.fill(0)
    for c in range(num_classes):
        line = out[c]
        for j in range(w):
            lost[j] |= _i(0) if abs(line[j]) <= _USABLE else _i(1)
    for c in range(num_classes):
        line = out[c]
        for j in range(w):
            line[j] = _f(0) if lost[j] != _i(0) else line[j]
    return wrong


@njit(**OPTIONS)
def _stretch(blend, cells, next_cells, weights, next_weights, block, largest, ids):
    """Resample rows of classes to a block of columns; find the largest class of each, the lowest of equal ones."""
    num_classes = blend.shape[0]
    n = cells.size
    largest.fill(-_INFINITY)
    ids.fill(0)
    for c in range(num_classes):
        given, line, this = blend[c], block[c], _i(c)
        for j in range(n):
            line[j] = _f(given[cells[j]] * weights[j]) + _f(given[next_cells[j]] * next_weights[j])
        for j in range(n):
            x, so_far, id = line[j], largest[j], ids[j]
            ids[j] = this if x > so_far else id
            largest[j] = larger(x, so_far)


@njit(**OPTIONS)
def _exponentials(block, largest, n, total):
    total.fill(0)
    for c in range(block.shape[0]):
        line = block[c]
        for j in range(n):
            total[j] += exp(_f(line[j] - largest[j]))


@njit(**OPTIONS, cache=True)
def _argmax_tasks(first, last, values, indices, tail, shape, grid, axes, view_size, align_corners, width, out, wrong):
    """Do the strips `first` to `last`. `axes`: float64 positions of rows (Bt, H) and columns (Bt, W) in the view."""
    num_classes = shape[0]
    h, w = grid
    rows, columns = axes
    argmax, confidence = out
    H, W = rows.shape[1], columns.shape[1]
    strips = (H + STRIP_ROWS - 1) // STRIP_ROWS
    pair, pair_lost = np.empty((2, num_classes, w), np.float32), np.empty((2, w), np.int32)
    blend, blend_lost = np.empty((num_classes, w), np.float32), np.empty(w, np.int32)
    block, work = np.empty((num_classes, width), np.float32), np.empty((2, w), np.float32)
    largest, total, ids = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.int32)
    cells, next_cells = np.empty(W, np.uint32), np.empty(W, np.uint32)
    weights, next_weights = np.empty(W, np.float32), np.empty(W, np.float32)
    outside = np.empty(W, np.bool_)
    held = np.empty(2, np.int64)
    for task in range(first, last):
        image, strip = task // strips, task % strips
        b = image if rows.shape[0] > 1 else 0
        held.fill(-1)
        for X in range(W):
            x = columns[b, X]
            cell, weights[X], next_weights[X] = _taps(x, view_size[1], w, align_corners)
            cells[X], next_cells[X] = cell, min(cell + 1, w - 1)
            outside[X] = x < 0 or x > view_size[1]
        for Y in range(strip * STRIP_ROWS, min(H, (strip + 1) * STRIP_ROWS)):
            y = rows[b, Y]
            row, weight, next_weight = _taps(y, view_size[0], h, align_corners)
            next_row = row + 1 if next_weight > 0 else row
            for needed in (row, next_row):
                if held[needed % 2] != needed:
                    slot = needed % 2
                    wrong[task] |= _read_row(
                        values, indices, tail, shape, image, needed, w, pair[slot], pair_lost[slot], work
                    )
                    held[slot] = needed
            upper, lower = pair[row % 2], pair[next_row % 2]
            for c in range(num_classes):
                above, below, line = upper[c], lower[c], blend[c]
                for j in range(w):
                    line[j] = _f(above[j] * weight) + _f(below[j] * next_weight)
            for j in range(w):
                blend_lost[j] = pair_lost[row % 2, j] | pair_lost[next_row % 2, j]
            for start in range(0, W, width):
                stop = min(W, start + width)
                n = stop - start
                _stretch(
                    blend,
                    cells[start:stop],
                    next_cells[start:stop],
                    weights[start:stop],
                    next_weights[start:stop],
                    block,
                    largest,
                    ids,
                )
                _exponentials(block, largest, n, total)
                for j in range(n):
                    X = start + j
                    probability = _f(_f(1) / total[j])
                    if blend_lost[cells[X]] != 0 or (next_weights[X] > 0 and blend_lost[next_cells[X]] != 0):
                        probability = _NAN
                    if outside[X] or y < 0 or y > view_size[0]:
                        probability = _f(0)
                    argmax[image, Y, X] = ids[j]
                    confidence[image, Y, X] = float_to_half(probability)


def argmax_confidence(
    target: PackedTarget, size: tuple[int, int], window_B4: Tensor | None, flip_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute what `kdcache_kernels.target_argmax_confidence` documents; bitwise the same for any number of threads."""
    if target.tail is not None and target.tail.dtype != torch.float16:  # never so from `pack`
        return argmax_confidence_reference(target, size, window_B4, flip_B)
    B, num_classes = target.batch_size, target.num_classes
    _, k, h, w = target.values.shape
    H, W = size
    argmax_BHW = torch.empty((B, H, W), dtype=torch.uint8 if num_classes <= 256 else torch.int16)
    confidence_BHW = torch.empty((B, H, W), dtype=torch.float16)
    if B > 0:
        positions = view_positions(window_B4, flip_B, target.view_size, size, target.device)
        wrong = np.zeros(B * -(-H // STRIP_ROWS), np.uint8)
        run(
            _argmax_tasks,
            len(wrong),
            *packed_memory(target.values, target.indices, target.tail),
            *((num_classes, k, h * w), (h, w)),
            (positions.y.contiguous().numpy(), positions.x.contiguous().numpy()),
            *(target.view_size, target.align_corners, block_width(num_classes, W)),
            (argmax_BHW.numpy(), confidence_BHW.view(torch.int16).numpy()),
            wrong,
        )
        if wrong.any() and target.indices is not None:
            check_ids(target.indices, num_classes)
    return argmax_BHW, confidence_BHW
