"""The teacher's class and its probability at label size on the CPU, without a tensor of label size times classes.

A task is a row of labels. It blends the two target rows that it lies between, stretches the blend to a block of label
columns (128 of them at 150 classes), and finds there the largest class and then the sum of exponentials. Blending
again for every row costs a pass over 2 * C * w numbers, an eighth of what follows at stride 4; keeping rows would save
it and need strips of rows. On one core 4 x 150 x 128^2 to 512^2 takes 0.55 s, a fifth of the reference's time, and
21 classes 85 ms, a quarter.

A packed target is densified first, at its own size.

Legend: B batch, C classes, H W label size, h w the target's own size.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..topk import PackedTarget, argmax_dtype
from ..window import source_cells, view_positions
from .math import exp2, njit
from .threads import run
from .topk import LOG2_E, OPTIONS, block_width, densify, exact_kernel, larger

_USABLE = torch.finfo(torch.float32).max / 8
"""As in the loss: a logit beyond it is lost, for a difference of two overflows."""
_f = np.float32


class _Taps(NamedTuple):
    """The two neighbouring logits of each label pixel along an axis, with their weights: (Bt, N) each, Bt = B or 1."""

    cell: np.ndarray[tuple[int, ...], np.dtype[np.uint32]]
    next_cell: np.ndarray[tuple[int, ...], np.dtype[np.uint32]]
    weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    next_weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    outside: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

    @classmethod
    def of(cls, position: Tensor, n_view: int, n_in: int, align_corners: bool) -> "_Taps":
        """Compute the neighbours as `window.hat_matrix` does. NaN has NaN weights.

        If the weight of the second neighbour is 0, it is the first neighbour.
        """
        source = source_cells(position, n_view, n_in, align_corners).clamp(0, n_in - 1)
        cell = source.floor()
        weight, next_weight = 1 - (source - cell), 1 - (cell + 1 - source)
        cell = cell.nan_to_num(0)
        return cls(
            # Unsigned, for numba checks whether a signed index is negative.
            cell.numpy().astype(np.uint32),
            (cell + (next_weight > 0)).numpy().astype(np.uint32),
            weight.float().numpy(),
            next_weight.float().numpy(),
            ((position < 0) | (position > n_view)).numpy(),
        )


@njit(**OPTIONS)
def _blend_rows(upper, lower, weight, next_weight, lost, out):
    """Write `weight * upper + next_weight * lower`, each (C, w), to `out`, or 0 if `lost`."""
    for c in range(out.shape[0]):
        above, below, line = upper[c], lower[c], out[c]
        for j in range(line.size):
            x = _f(above[j] * weight) + _f(below[j] * next_weight)
            line[j] = _f(0) if lost[j] else x


@njit(**OPTIONS)
def _stretch(blend, cells, next_cells, weights, next_weights, block, largest, ids):
    """Resample rows of classes to a block of columns, and find each column's largest class, lowest of equals."""
    n = cells.size
    largest[:n] = -np.inf
    ids[:n] = 0
    for c in range(blend.shape[0]):
        source, line, this = blend[c], block[c], np.int32(c)
        for j in range(n):
            line[j] = _f(source[cells[j]] * weights[j]) + _f(source[next_cells[j]] * next_weights[j])
        for j in range(n):
            x, so_far, id = line[j], largest[j], ids[j]
            ids[j] = this if x > so_far else id
            largest[j] = larger(x, so_far)


@njit(**OPTIONS)
def _sum_exponentials(block, largest, total):
    total.fill(0)
    for c in range(block.shape[0]):
        line = block[c]
        for j in range(total.size):
            total[j] += exp2(_f(line[j] - largest[j]) * LOG2_E)


@exact_kernel
def argmax_tasks(first, last, logits, lost, rows, columns, width, argmax, confidence):
    """Compute the teacher's class and its probability for a range of label rows.

    `argmax_confidence` makes the arguments. The rows are `first` to `last` - 1. Row y of image b has the number b * H +
    y.

    Shapes and units:
        logits: (B, C, h, w) float32 teacher logits, with 0 at lost positions.
        lost: (B, h, w) bool, whether the position has an unusable logit (NaN, infinite or too large).
        rows, columns: the neighbours of each label row and label column. Each is a named tuple of five arrays, (Bt, H)
            for rows and (Bt, W) for columns. Bt is B, or 1 if all images share them. The fields are: cell and next_cell
            (uint32 indices of the two neighbouring logits), weight and next_weight (their float32 bilinear weights),
            and outside (bool, True beyond the view).
        width: label columns that are processed at a time.
        argmax: (B, H, W) int32 result, class ids.
        confidence: (B, H, W) float32 result, probabilities. 0 outside the view, NaN if a lost
            position has a weight above 0.
    """
    _, num_classes, _, w = logits.shape
    H, W = argmax.shape[1:]
    blend, block = np.empty((num_classes, w), np.float32), np.empty((num_classes, width), np.float32)
    largest, total, ids = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.int32)
    for task in range(first, last):
        b, y = task // H, task % H
        at = b if rows.cell.shape[0] > 1 else 0
        row, next_row = rows.cell[at, y], rows.next_cell[at, y]
        lost_w = lost[b, row] | lost[b, next_row]
        weight, next_weight = rows.weight[at, y], rows.next_weight[at, y]
        _blend_rows(logits[b, :, row], logits[b, :, next_row], weight, next_weight, lost_w, blend)
        for start in range(0, W, width):
            here = slice(start, min(start + width, W))
            n = here.stop - start
            cells, next_cells = columns.cell[at][here], columns.next_cell[at][here]
            weights, next_weights = columns.weight[at][here], columns.next_weight[at][here]
            _stretch(blend, cells, next_cells, weights, next_weights, block, largest, ids)
            _sum_exponentials(block, largest, total[:n])
            argmax[b, y][here] = ids[:n]
            for j in range(n):
                probability = _f(1) / total[j]
                if lost_w[cells[j]] or lost_w[next_cells[j]]:
                    probability = _f(np.nan)
                if rows.outside[at, y] or columns.outside[at, start + j]:
                    probability = _f(0)
                confidence[b, y, start + j] = probability


def argmax_confidence(
    target: PackedTarget, size: tuple[int, int], window_B4: Tensor | None, flip_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `kdcache_kernels.target_argmax_confidence` on the CPU, with the same bits for any number of threads.

    Args:
        target: packed teacher logits.
        size: (H, W) of the result in pixels.
        window_B4: (B, 4) float64 edges in pixels of the view, or None for the whole view. A NaN edge makes all
            confidences of the image NaN.
        flip_B: (B,) bool, whether to mirror left to right, or None.
    Returns: (class ids, float16 probabilities), (B, H, W) each.
    Memory: the result in int32 and float32, and 4 * B*C*h*w bytes.
    """
    logits_BChw = densify(target.values, target.indices, target.tail, target.num_classes)
    B, num_classes, h, w = logits_BChw.shape
    argmax_BHW = torch.empty((B, *size), dtype=torch.int32)
    confidence_BHW = torch.empty((B, *size))
    if B > 0:
        lowest_Bhw, highest_Bhw = logits_BChw.aminmax(dim=1)  # NaN where there is one
        usable_Bhw = (lowest_Bhw >= -_USABLE) & (highest_Bhw <= _USABLE)
        positions = view_positions(window_B4, flip_B, target.view_size, size, target.device)
        run(
            argmax_tasks,
            B * size[0],
            *(logits_BChw.numpy(), (~usable_Bhw).numpy()),
            _Taps.of(positions.y, target.view_size[0], h, target.align_corners),
            _Taps.of(positions.x, target.view_size[1], w, target.align_corners),
            *(block_width(num_classes, size[1]), argmax_BHW.numpy(), confidence_BHW.numpy()),
        )
    return argmax_BHW.to(argmax_dtype(num_classes)), confidence_BHW.half()
