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
    """The neighbouring logits and bilinear weights with which to read a logit map at the centres of the target's cells.

    Attributes:
        rows, columns: three arrays (low, following, fraction) with an element per row or column of cells. low and
            following are the uint32 indices of the two neighbours in the map. fraction is the float32 weight of the
            second neighbour. The arrays are (B, h) for rows and (B, w) for columns. B is 1 if all images share them.
        moved: True if reading needs interpolation. False if the map's elements are exactly the cells.
    """

    rows: _Sampling
    columns: _Sampling
    moved: bool

    @classmethod
    def of(cls, window: Tensor | None, flip: Tensor | None, view_size: Size, array: Size, grid: Size) -> "Grid":
        """Return the `Grid` with which to read a logit map of the whole view at the centres of a window's cells.

        Args:
            window: (B, 4) float64 edges (y0, x0, y1, x1) in pixels of the view, or None for the whole view.
            flip: (B,) bool, whether to mirror left to right, or None.
            view_size: (height, width) of the view in pixels.
            array: (rows, columns) of the logit map.
            grid: (h, w), the numbers of cells of the window.
        """
        at = view_positions(window, flip, view_size, grid, torch.device("cpu"))
        rows = _Sampling.of(at.y, view_size[0], array[0])
        columns = _Sampling.of(at.x, view_size[1], array[1])
        return cls(rows, columns, array != grid or not (rows.is_identity and columns.is_identity))

    @property
    def arguments(self) -> tuple[Array | bool, ...]:
        """The fields as one flat tuple: three arrays of `rows`, three arrays of `columns`, and the bool `moved`.

        A numba function takes it, because numba is slow to find the type of a nested tuple.
        """
        return (*self.rows, *self.columns, self.moved)


@lru_cache(maxsize=32)
def whole_grid(view_size: Size, array: Size, grid: Size) -> Grid:
    """Return the `Grid` with which to read a logit map at the centres of the cells of a whole, unmirrored view.

    Results are cached.

    Args:
        view_size: (height, width) of the view in pixels.
        array: (rows, columns) of the map, which covers the view.
        grid: (h, w), the numbers of cells that tile the view.
    """
    return Grid.of(None, None, view_size, array, grid)


@njit(**OPTIONS)
def read_row(c, row, start, limit, n, line, largest, usable):
    """Copy n logits of class c to `line[c]`, and update `largest` and `usable` of each cell.

    TILE is the most cells that are processed at a time, so n is at most TILE.

    Shapes and units:
        row: float32 logits of one class and one row. The n logits begin at element `start`.
        limit: the largest magnitude of a usable logit.
        line: (C, TILE) float32 result.
        largest: (TILE,) float32, raised to the logit where the logit is larger.
        usable: (TILE,) uint8, set to 0 where the logit is NaN or its magnitude exceeds `limit`.
    """
    part = row[start : start + n]
    for j in range(n):
        x = part[j]
        line[c, j] = x
        usable[j] &= abs(x) <= limit
        largest[j] = max(largest[j], x)


@njit(**OPTIONS)
def sample_row(c, upper, lower, down, left, following, right, limit, n, line, largest, usable):
    """Interpolate the logits of class c at the centres of n cells in a row, and write them to `line[c]`.

    It also updates `largest` and `usable` of each cell. TILE is the most cells that are processed at a time.

    Shapes and units:
        upper, lower: (w,) float32, class c in the logit rows above and below the cells' centres.
        down: weight of `lower`, 0 to 1.
        left, following: (n,) the columns to the left and to the right of each cell's centre.
        right: (n,) weight of the column `following`, 0 to 1.
        limit: the largest magnitude of a usable logit.
        line: (C, TILE) float32 result.
        largest: (TILE,) float32, raised to the logit where the logit is larger.
        usable: (TILE,) uint8, set to 0 where the logit is NaN or its magnitude exceeds `limit`.
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
    """Read the logits of all classes at n neighbouring cells of one row, interpolating them if `moved`.

    TILE is the most cells that are processed at a time, so n is at most TILE.

    Shapes and units:
        b, i, start: indices of the image, of the row of cells, and of the first cell.
        logits: (B, C, rows, columns) float32 logit map.
        above, below, down: (Bt, h) the map's rows above and below each row of cells, and the weight of the row below.
            Bt is B, or 1 if all images share them.
        left, following: (Bt, w) the columns to the left and to the right of each cell's centre.
        right: (Bt, w) weight of the column `following`, 0 to 1.
        limit: the largest magnitude of a usable logit.
        line: (C, TILE) result, the logits.
        largest: (TILE,) result, raised to each cell's largest logit.
        usable: (TILE,) uint8 result, set to 0 where a logit is NaN or its magnitude exceeds `limit`.
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
    """Write the loss weights of n neighbouring cells of row i of image b to `own`, from cell `start` on.

    Shapes and units:
        weighted: False if every cell counts and weighs 1. `counted` and `weight` are then not read.
        counted: (B, h, w) float32, the share of each cell's area that counts. A cell with a share above 0 counts.
        weight: (B, h, w) float32, the weight of each cell.
        usable: (n,) uint8, 0 for a cell with an unusable logit.
        own: (n,) float32 result: `weight` for usable cells. Unusable cells get NaN if they count, else 0.
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
    """Compute which share of each cell counts in a mean over cells, and the cell's weight.

    A cell is the area of the image that one target logit covers. The rows of cells are `first` to `last` - 1. Row i of
    image b has the number b * h + i.

    Shapes and units:
        inside_y, inside_x: (Bt, H) and (Bt, W) bool, whether a label row or column lies in the target's view. Bt is B
            (the batch size), or 1 if all images share one view.
        counts: (B, H, W) uint8, 0 for pixels to leave out, or (B, 0, 0) to count all pixels inside the view.
        gate: (B, H, W) float32 pixel weights, or (B, 0, 0) for weights of 1.
        counted: (B, h, w) float32 result, the share of each cell's area whose pixels count, 0 to 1.
        weight: (B, h, w) float32 result, the same share with each pixel multiplied by its gate.
    """
    _, h, w = counted.shape
    H, W = inside_y.shape[1], inside_x.shape[1]
    masked, gated = counts.shape[1] > 0, gate.shape[1] > 0
    counted_W, weight_W, valid_W = np.empty(W, _f), np.empty(W, _f), np.empty(W, np.uint8)
    for task in range(first, last):
        b, i = task // h, task % h
        bt = b if inside_y.shape[0] > 1 else 0
        counted_W[:], weight_W[:] = 0, 0
        for y in range(i * H // h, ((i + 1) * H + h - 1) // h):
            if not inside_y[bt, y]:
                continue
            share = _share(i, h, y, H)
            valid_W[:] = inside_x[bt]
            if masked:
                row = counts[b, y]
                for x in range(W):
                    valid_W[x] &= row[x]
            for x in range(W):
                counted_W[x] += share if valid_W[x] != 0 else _f(0)
            if gated:
                line = gate[b, y]
                for x in range(W):
                    # Chosen, not multiplied: a gate of a pixel that does not count may be NaN.
                    weight_W[x] += share * line[x] if valid_W[x] != 0 else _f(0)
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
    """Carry a gradient from the target's cells back to the student's logits.

    This is the transpose of the student's bilinear resize. It handles planes `first` to `last` - 1. The plane of class
    c of image b has the number b * C + c.

    Shapes and units:
        cells: (B, C, h, w) float32, the gradient by the resized logits.
        above, below, down: (1, h) the student's rows above and below each row of cells, and the weight of the row
            below.
        left, following: (1, w) the columns to the left and to the right of each cell's centre.
        right: (1, w) weight of the column `following`, 0 to 1.
        gradient: (B, C, hs, ws) float32 result, in the size of the student's logits.
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
    """Return the share of each cell's area whose pixels count, and the cell's weight.

    The weight is the same share, but with each pixel multiplied by its `pixel_weight`.

    Returns: (counted, weight), float32 arrays of shape (B, h, w), or (0, h, w) if every cell counts and weighs 1.
    """
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
    """The inputs of the relation loss on the CPU: both logit maps, and neighbour tables to read them at the cells.

    A cell is the area of the image that one target logit covers.

    Attributes:
        student, teacher: the `Grid` with which to read each map.
        logits_s: (B, C, hs, ws) contiguous float32 logits of the student.
        logits_t: (B, C, h, w) contiguous float32 logits of the teacher.
        counted: (B, h, w) float32, the counted share of each cell: the share of its area whose pixels count, 0 to 1.
            (0, h, w) if every cell counts and weighs 1.
        weight: the weight of each cell: the same share with each pixel multiplied by its gate. It has the shape of
            `counted`.
    """

    student: Grid
    teacher: Grid
    logits_s: Tensor
    logits_t: Tensor
    counted: Array
    weight: Array

    @property
    def arguments(self) -> tuple[Array | bool, ...]:
        """The arguments by which a kernel gets this data, as a flat tuple.

        They are the student's logits and the fields of its `Grid`, the same for the teacher, then `counted` and
        `weight`.
        """
        student = self.logits_s.numpy(), *self.student.arguments
        return *student, self.logits_t.numpy(), *self.teacher.arguments, self.counted, self.weight

    @property
    def cells_counted(self) -> float:
        """The sum of `counted` over all cells of the batch, the denominator of a mean over cells."""
        B, _, h, w = self.logits_t.shape
        return float(self.counted.sum(dtype=np.float64)) if len(self.counted) else float(B * h * w)


def lay(problem: RelationProblem) -> Laid:
    """Return the input of the relation loss's kernels: both logit maps, their `Grid`s, and the cells' weights.

    The logits are converted to float32 first.
    """
    size = (problem.student.shape[2], problem.student.shape[3])
    student = whole_grid(problem.grid, size, problem.grid)
    if problem.is_moved:
        teacher = Grid.of(problem.window, problem.flip, problem.view_size, problem.grid, problem.grid)
    else:
        teacher = whole_grid(problem.view_size, problem.grid, problem.grid)
    logits_s, logits_t = (x.detach().float().contiguous() for x in (problem.student, problem.teacher))
    return Laid(student, teacher, logits_s, logits_t, *weigh_cells(problem))


def place_for(logits: Tensor, floats: Tensor, grid: Grid, shape: tuple[int, ...] | None) -> Tensor:
    """Return a float32 tensor of `shape` for a kernel's results. It is `floats` if overwriting it is safe.

    Overwriting is safe if `floats` does not share memory with `logits`, and kernels read it without interpolation. Each
    task then reads only the row of cells that it overwrites.

    Args:
        logits: the original logits.
        floats: the same logits in contiguous float32, perhaps the same memory.
        grid: how kernels read `floats`.
        shape: (B, C, h, w), or None if no result is needed.
    Returns: `floats`, a new uninitialised tensor, or an empty tensor if `shape` is None.
    """
    if shape is None:
        return torch.empty((0,) * 4)
    is_copy = floats.data_ptr() != logits.data_ptr()
    return floats if is_copy and not grid.moved else torch.empty(shape)


def on_own_grid(problem: RelationProblem, laid: Laid, cells: Tensor) -> Tensor:
    """Carry a gradient from the target's cells back to the student's logits, and return it, (B, C, hs, ws) float32.

    Args:
        problem: the checked arguments. Its student's logits have the size (hs, ws), and were resized to (h, w) cells.
        laid: the kernel's inputs, with the bilinear weights of this resize.
        cells: (B, C, h, w) float32, the gradient by the resized logits, returned unchanged if both sizes are equal.
    """
    if not problem.is_resized:
        return cells
    gradient = torch.empty(problem.student.shape)
    rows, columns, _ = laid.student
    run(gather_cells, cells.shape[0] * cells.shape[1], cells.numpy(), *rows, *columns, gradient.numpy())
    return gradient
