"""The target's cells on the CPU: their places in both sets of logits, how much they count, and the way back.

A kernel is `kernel(first, last, *laid.arguments, ...)`. It reads a tile of a row of cells, of all classes.

Legend: B batch, Bt B or 1 (the same for all images), C classes, H W the image, hs ws the student's own size, h w the
target's cells.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...on_cells.problem import RelationProblem
from ...window import Size, source_cells, view_positions
from ..geometry import Array, Taps
from ..math import OPTIONS, kernel, njit
from ..threads import run

TILE = 128
"""Most cells of a tile: rows of scratch have this length, a constant."""

_f = np.float32


class _Sampling(NamedTuple):
    """The places of a row's or column's cells between an array's, each (Bt, n)."""

    low: Array
    following: Array
    fraction: Array

    @classmethod
    def of(cls, position: Tensor, extent: int, cells: int) -> "_Sampling":
        """Compute them from positions in a view of `extent` pixels with `cells` cells. NaN has NaN weight."""
        taps = Taps.of(source_cells(position, extent, cells, False).numpy(), cells)
        return cls(taps.low, taps.low + (taps.fraction > 0), taps.fraction)

    @property
    def is_identity(self) -> bool:
        """Whether every cell is one of the array's, in their order."""
        return bool((self.fraction == 0).all()) and bool((self.low == np.arange(self.low.shape[1])).all())


class Grid(NamedTuple):
    """How to read an array of logits at the target's cells.

    Attributes:
        rows, columns: the two rows (columns) of the array around each cell's centre, and the second's weight.
        moved: True if the array is interpolated, False if its elements are the cells.
    """

    rows: _Sampling
    columns: _Sampling
    moved: bool

    @classmethod
    def of(cls, window: Tensor | None, flip: Tensor | None, view_size: Size, array: Size, grid: Size) -> "Grid":
        """Compute where the cells of a view lie in an array that covers the view.

        Args:
            window: (B, 4) float64 edges (y0, x0, y1, x1) in pixels of the view, or None for the whole view.
            flip: (B,) bool, whether to mirror left to right, or None.
            view_size: (height, width) of the view in pixels.
            array: (rows, columns) of the array.
            grid: (h, w), the number of cells.
        """
        at = view_positions(window, flip, view_size, grid, torch.device("cpu"))
        rows = _Sampling.of(at.y, view_size[0], array[0])
        columns = _Sampling.of(at.x, view_size[1], array[1])
        return cls(rows, columns, array != grid or not (rows.is_identity and columns.is_identity))

    @property
    def arguments(self) -> tuple[Array | bool, ...]:
        """Return the fields in a flat tuple, because numba is slow to find the type of a nested one."""
        return (*self.rows, *self.columns, self.moved)


@lru_cache(maxsize=32)
def whole_grid(view_size: Size, array: Size, grid: Size) -> Grid:
    """Return the `Grid` of an array (rows, columns) for `grid` = (h, w) cells of a whole, unmirrored view."""
    return Grid.of(None, None, view_size, array, grid)


@njit(**OPTIONS)
def read_row(c, row, start, limit, n, line, largest, usable):
    """Copy n logits of class c from `row`, starting at element `start`, to `line[c]`.

    Raise `largest[j]` to the logit of cell j. Set `usable[j]` to 0 if its magnitude exceeds `limit` or is NaN.
    """
    own = row[start : start + n]
    for j in range(n):
        x = own[j]
        line[c, j] = x
        usable[j] &= abs(x) <= limit
        largest[j] = max(largest[j], x)


@njit(**OPTIONS)
def sample_row(c, upper, lower, down, left, following, right, limit, n, line, largest, usable):
    """Interpolate n logits of class c between the rows `upper` and `lower` of an array, and write them to `line[c]`.

    Raise `largest[j]` to the logit of cell j. Set `usable[j]` to 0 if its magnitude exceeds `limit` or is NaN.

    Shapes and units:
        down: weight of `lower`, a number in [0, 1].
        left, following, right: (n,) columns to the left and right of each cell's centre, and the right column's weight.
    """
    for j in range(n):
        k, m, f = left[j], following[j], right[j]
        a = upper[k] + f * (upper[m] - upper[k])
        b = lower[k] + f * (lower[m] - lower[k])
        x = a + down * (b - a)
        line[c, j] = x
        usable[j] &= abs(x) <= limit
        largest[j] = max(largest[j], x)


@njit(**OPTIONS)
def read_tile(b, i, start, n, logits, above, below, down, left, following, right, moved, limit, line, largest, usable):
    """Read the logits of n neighbouring cells of one row, all classes, interpolating them if `moved`.

    Shapes and units:
        b, i, start: image, row of cells, and first cell of the tile.
        logits: (B, C, rows, columns) float32.
        above, below, down: (Bt, h) rows of the array around each row of cells, and the lower row's weight. Bt is B, or
            1 if all images are equal.
        left, following, right: (Bt, w) columns of the array around each cell, and the right column's weight.
        limit: the largest magnitude of a usable logit.
        line: (C, TILE) result, the logits.
        largest: (TILE,) result, raised to each cell's largest logit.
        usable: (TILE,) uint8 result, set to 0 where a logit exceeds `limit` or is NaN.
    """
    bt = b if above.shape[0] > 1 else 0
    if moved:
        here = slice(start, start + n)
        before, after, share = left[bt][here], following[bt][here], right[bt][here]
        for c in range(logits.shape[1]):
            upper, lower = logits[b, c, above[bt, i]], logits[b, c, below[bt, i]]
            sample_row(c, upper, lower, down[bt, i], before, after, share, limit, n, line, largest, usable)
    else:
        for c in range(logits.shape[1]):
            read_row(c, logits[b, c, i], start, limit, n, line, largest, usable)


@njit(**OPTIONS)
def weigh(weighted, counted, weight, b, i, start, usable, own, n):
    """Write the weights of n cells of row i of image b, from cell `start` on, to `own`.

    A cell that is not `usable` gets NaN if it counts, else 0. If not `weighted`, every cell counts and weighs 1.
    `counted` and `weight` are the results of `weigh_rows`.
    """
    if not weighted:
        for j in range(n):
            own[j] = _f(1) if usable[j] != 0 else _f(np.nan)
        return
    counts, weighs = counted[b, i][start : start + n], weight[b, i][start : start + n]
    for j in range(n):
        own[j] = weighs[j] if usable[j] != 0 else (_f(np.nan) if counts[j] > 0 else _f(0))


@njit(**OPTIONS)
def _share(cell, cells, pixel, pixels):
    """Return the part of a cell that a pixel fills along an axis."""
    return _f(min((cell + 1) * pixels, (pixel + 1) * cells) - max(cell * pixels, pixel * cells)) / _f(pixels)


@kernel
def weigh_rows(first, last, inside_y, inside_x, counts, gate, counted, weight):
    """Compute how much each cell counts and weighs. A cell is the area of one target logit.

    It does the rows of cells `first` to `last` - 1. Row i of image b has the number b * h + i.

    Shapes and units:
        inside_y, inside_x: (Bt, H) and (Bt, W) bool, whether a pixel lies in the view along each axis. Bt is B, or 1 if
            all images share one view.
        counts: (B, H, W) uint8, 0 for pixels to leave out, or (B, 0, 0) to count all pixels inside.
        gate: (B, H, W) float32 pixel weights, or (B, 0, 0) for weights of 1.
        counted: (B, h, w) float32 result, the share of each cell's area whose pixels count, 0 to 1.
        weight: (B, h, w) float32 result, the same share with each pixel multiplied by its gate.
    """
    _, h, w = counted.shape
    H, W = inside_y.shape[1], inside_x.shape[1]
    masked, gated = counts.shape[1] > 0, gate.shape[1] > 0
    counted_W, weight_W, own = np.empty(W, _f), np.empty(W, _f), np.empty(W, np.uint8)
    for task in range(first, last):
        b, i = task // h, task % h
        bt = b if inside_y.shape[0] > 1 else 0
        counted_W[:], weight_W[:] = 0, 0
        for y in range(i * H // h, ((i + 1) * H + h - 1) // h):
            if not inside_y[bt, y]:
                continue
            share = _share(i, h, y, H)
            own[:] = inside_x[bt]
            if masked:
                row = counts[b, y]
                for x in range(W):
                    own[x] &= row[x]
            for x in range(W):
                counted_W[x] += share if own[x] != 0 else _f(0)
            if gated:
                line = gate[b, y]
                for x in range(W):
                    # Chosen, not multiplied: a gate of a pixel that does not count may be NaN.
                    weight_W[x] += share * line[x] if own[x] != 0 else _f(0)
        for j in range(w):
            count, total = _f(0), _f(0)
            for x in range(j * W // w, ((j + 1) * W + w - 1) // w):
                share = _share(j, w, x, W)
                count += share * counted_W[x]
                total += share * weight_W[x]
            counted[b, i, j] = count
            weight[b, i, j] = total if gated else count


@kernel
def gather_cells(first, last, cells, above, below, down, left, following, right, gradient):
    """Apply the transpose of the student's resize to the planes `first` to `last`, numbered b * C + c.

    Shapes and units:
        cells: (B, C, h, w) gradient by the logits on the cells.
        above, below, down: (1, h) rows of the student's array around each row of cells, and the lower row's weight.
        left, following, right: (1, w) columns around each cell, and the right column's weight.
        gradient: (B, C, hs, ws) result.
    """
    _, C, h, w = cells.shape
    line = np.empty(gradient.shape[3], _f)
    for task in range(first, last):
        source, plane = cells[task // C, task % C], gradient[task // C, task % C]
        plane[:] = 0
        for i in range(h):
            line[:] = 0
            for j in range(w):
                share = right[0, j] * source[i, j]
                line[left[0, j]] += source[i, j] - share
                line[following[0, j]] += share
            upper, lower = plane[above[0, i]], plane[below[0, i]]
            for k in range(line.size):
                upper[k] += line[k] - down[0, i] * line[k]
            for k in range(line.size):
                lower[k] += down[0, i] * line[k]


def weigh_cells(problem: RelationProblem) -> tuple[Array, Array]:
    """Return how much each cell counts and weighs, see `weigh_rows`: (B, h, w) each, or (0, h, w) if all are 1."""
    B, (h, w) = problem.student.shape[0], problem.grid
    ones = np.empty((0, h, w), _f)
    if not problem.is_weighted:
        return ones, ones
    at = view_positions(problem.window, problem.flip, problem.view_size, problem.size, torch.device("cpu"))
    inside_y, inside_x = ((~((x < 0) | (x > n))).numpy() for x, n in zip((at.y, at.x), problem.view_size, strict=True))
    if problem.counted is None and problem.pixel_weight is None and inside_y.all() and inside_x.all():
        return ones, ones
    none = torch.empty((B, 0, 0))
    counts = none.to(torch.uint8) if problem.counted is None else problem.counted.contiguous().view(torch.uint8)
    gate = none if problem.pixel_weight is None else problem.pixel_weight.float().contiguous()
    counted, weight = np.empty((B, h, w), _f), np.empty((B, h, w), _f)
    run(weigh_rows, B * h, inside_y, inside_x, counts.numpy(), gate.numpy(), counted, weight)
    return counted, weight


class Laid(NamedTuple):
    """The student's and the teacher's logits, with where the target's cells lie in each.

    Attributes:
        student, teacher: where the cells lie in each array of logits.
        logits_s: (B, C, hs, ws) float32, the student's logits, contiguous.
        logits_t: (B, C, h, w) float32, the teacher's logits, contiguous.
        counted, weight: (B, h, w) float32, how much each cell counts (0 to 1) and weighs (that times the gate), or
            (0, h, w) if every cell counts and weighs 1.
    """

    student: Grid
    teacher: Grid
    logits_s: Tensor
    logits_t: Tensor
    counted: Array
    weight: Array

    @property
    def arguments(self) -> tuple[Array | bool, ...]:
        """Return the arguments of every kernel: each array of logits with its `Grid`, then `counted` and `weight`."""
        student = self.logits_s.numpy(), *self.student.arguments
        return *student, self.logits_t.numpy(), *self.teacher.arguments, self.counted, self.weight

    @property
    def cells_counted(self) -> float:
        """Return the sum of `counted` over all cells, the denominator of a mean over cells."""
        B, _, h, w = self.logits_t.shape
        return float(self.counted.sum(dtype=np.float64)) if len(self.counted) else float(B * h * w)


def lay(problem: RelationProblem) -> Laid:
    """Convert both sets of logits to float32, locate the target's cells in them, and weigh the cells."""
    own = (problem.student.shape[2], problem.student.shape[3])
    student = whole_grid(problem.grid, own, problem.grid)
    if problem.is_moved:
        teacher = Grid.of(problem.window, problem.flip, problem.view_size, problem.grid, problem.grid)
    else:
        teacher = whole_grid(problem.view_size, problem.grid, problem.grid)
    logits_s, logits_t = (x.detach().float().contiguous() for x in (problem.student, problem.teacher))
    return Laid(student, teacher, logits_s, logits_t, *weigh_cells(problem))


def place_for(logits: Tensor, floats: Tensor, grid: Grid, shape: tuple[int, ...] | None) -> Tensor:
    """Return a float32 tensor of `shape` (B, C, h, w) to write results to, reusing `floats` if that is safe.

    `floats` holds `logits` in float32. It is reused if it is a copy of `logits` and `grid` does not interpolate it: a
    task then reads only the row of cells that it overwrites.

    Returns: `floats`, a new uninitialised tensor, or an empty tensor if `shape` is None.
    """
    if shape is None:
        return torch.empty((0,) * 4)
    is_copy = floats.data_ptr() != logits.data_ptr()
    return floats if is_copy and not grid.moved else torch.empty(shape)


def on_own_grid(problem: RelationProblem, laid: Laid, cells: Tensor) -> Tensor:
    """Turn a gradient (B, C, h, w) by the logits on the cells into one by the student's (B, C, hs, ws) logits."""
    if not problem.is_resized:
        return cells
    gradient = torch.empty(problem.student.shape)
    rows, columns, _ = laid.student
    run(gather_cells, cells.shape[0] * cells.shape[1], cells.numpy(), *rows, *columns, gradient.numpy())
    return gradient
