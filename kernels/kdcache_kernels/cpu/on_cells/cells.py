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
    """The position of an array under the target's cells.

    Attributes:
        moved: whether it is resampled, or read directly.
    """

    rows: _Sampling
    columns: _Sampling
    moved: bool

    @classmethod
    def of(cls, window: Tensor | None, flip: Tensor | None, view_size: Size, array: Size, grid: Size) -> "Grid":
        """Compute an array's position from a window and a flip of the view."""
        at = view_positions(window, flip, view_size, grid, torch.device("cpu"))
        rows = _Sampling.of(at.y, view_size[0], array[0])
        columns = _Sampling.of(at.x, view_size[1], array[1])
        return cls(rows, columns, array != grid or not (rows.is_identity and columns.is_identity))

    @property
    def arguments(self) -> tuple[Array | bool, ...]:
        """The fields one by one, because numba takes longer to find the type of a tuple than for the call."""
        return (*self.rows, *self.columns, self.moved)


@lru_cache(maxsize=32)
def whole_grid(view_size: Size, array: Size, grid: Size) -> Grid:
    """Return the position of an array for a whole, unmirrored view."""
    return Grid.of(None, None, view_size, array, grid)


@njit(**OPTIONS)
def read_row(c, row, start, limit, n, line, largest, usable):
    """Read n logits into row c of `line`, from a row of an array on the cells' grid."""
    own = row[start : start + n]
    for j in range(n):
        x = own[j]
        line[c, j] = x
        usable[j] &= abs(x) <= limit
        largest[j] = max(largest[j], x)


@njit(**OPTIONS)
def sample_row(c, upper, lower, down, left, following, right, limit, n, line, largest, usable):
    """Read n logits into row c of `line`, between two rows of an array."""
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
    """Read the logits of all classes of n cells of row i of image b. Note the largest, and unusable cells."""
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
    """Write the weights of n cells. A lost cell gets 0 if it does not count, and NaN if it counts."""
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
    """Write how much the rows of cells `first` to `last` count, and that times the gate, each (B, h, w).

    `inside_y`, `inside_x`: (Bt, H) and (Bt, W) bool. `counts`, `gate`: (B, H, W) uint8 and float32, or with H = 0 ones.
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
    """Apply the transpose of the student's resize, for the planes `first` to `last`, numbered image by image.

    `cells`: (B, C, h, w). `gradient`: (B, C, hs, ws) result.
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
    """Return how much cells count and weigh, (B, h, w) each, or (0, h, w) if all count 1."""
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
    """Both sets of logits under the target's cells.

    Attributes:
        student, teacher: their positions.
        logits_s, logits_t: (B, C, hs, ws) and (B, C, ht, wt), float32 and contiguous.
        counted, weight: (B, h, w) how much cells count and weigh, or with B = 0 ones.
    """

    student: Grid
    teacher: Grid
    logits_s: Tensor
    logits_t: Tensor
    counted: Array
    weight: Array

    @property
    def arguments(self) -> tuple[Array | bool, ...]:
        """Both arrays of logits, each with its position under the cells, then the weights."""
        student = self.logits_s.numpy(), *self.student.arguments
        return *student, self.logits_t.numpy(), *self.teacher.arguments, self.counted, self.weight

    @property
    def cells_counted(self) -> float:
        """The sum of the shares of all cells that count."""
        B, _, h, w = self.logits_t.shape
        return float(self.counted.sum(dtype=np.float64)) if len(self.counted) else float(B * h * w)


def lay(problem: RelationProblem) -> Laid:
    """Lay both sets of logits of a problem under its cells."""
    own = (problem.student.shape[2], problem.student.shape[3])
    student = whole_grid(problem.grid, own, problem.grid)
    if problem.is_moved:
        teacher = Grid.of(problem.window, problem.flip, problem.view_size, problem.grid, problem.grid)
    else:
        teacher = whole_grid(problem.view_size, problem.grid, problem.grid)
    logits_s, logits_t = (x.detach().float().contiguous() for x in (problem.student, problem.teacher))
    return Laid(student, teacher, logits_s, logits_t, *weigh_cells(problem))


def place_for(logits: Tensor, floats: Tensor, grid: Grid, shape: tuple[int, ...] | None) -> Tensor:
    """Return memory (B, C, h, w) for results of classes and cells: the copy of the logits, if it may be overwritten.

    A row of cells that is not resampled is read only by the task that writes it. A `shape` of None needs no results.
    """
    if shape is None:
        return torch.empty((0,) * 4)
    is_copy = floats.data_ptr() != logits.data_ptr()
    return floats if is_copy and not grid.moved else torch.empty(shape)


def on_own_grid(problem: RelationProblem, laid: Laid, cells: Tensor) -> Tensor:
    """Carry a gradient (B, C, h, w) on the cells back to the student's own grid."""
    if not problem.is_resized:
        return cells
    gradient = torch.empty(problem.student.shape)
    rows, columns, _ = laid.student
    run(gather_cells, cells.shape[0] * cells.shape[1], cells.numpy(), *rows, *columns, gradient.numpy())
    return gradient
