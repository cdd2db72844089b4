"""Positions of label pixels in the logits, as tables for the CPU kernels.

Positions are float64 and come from `window.py`, as in the reference. There are two layouts of the columns, one for each
kernel. In both a row of label pixels is cut into tiles, so the data of all classes for a tile stays in the L2 cache.

- Cells: nodes every four columns, straight lines between them. Phase p holds the p-th pixel of every span. It exists
  if every kink of both resizes falls on a node, which is true for strides 4, 8, 12, ... without aligned corners, in
  views that are whole, flipped or cropped by whole cells.
- Pixels: label columns in order, in one phase. It always exists.

Legend: B batch, Bt B or 1 (the same for all images), H W label size, h w a tensor's own size, N positions of an axis,
n nodes or columns of a tile.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..window import Size, source_cells, view_positions
from .math import TILE

Array = np.ndarray[Any, np.dtype[Any]]

SPAN = 4
"""Pixels between two nodes."""

SCRATCH_FLOATS = 96 * 1024
"""Floats that a tile may use: 384 KiB, of an L2 cache of 512."""


class Taps(NamedTuple):
    """A neighbour table: the two neighbouring logits of each position on an axis, with their bilinear weights.

    It is not a tap of a model's layer. With logits x along the axis, a position has the value (1 - fraction) * x[low] +
    fraction * x[low + 1].

    Attributes:
        low: uint32 array with one element per position, index of the first neighbour.
        fraction: float32 array of the same shape, weight of the second neighbour, 0 to 1.
    """

    low: Array
    fraction: Array

    @classmethod
    def of(cls, source: Array, n_in: int) -> "Taps":
        """Return the neighbours of positions on an axis of `n_in` logits.

        `source` is a float64 array of any shape, in which 0 is the centre of the first logit and 1 the centre of the
        second. Positions before the first or after the last centre are moved to it. A NaN position gets weight NaN.
        """
        clamped = np.clip(source, 0, n_in - 1)
        low = np.floor(clamped)
        index = np.nan_to_num(low).astype(np.uint32)
        return cls(index, (clamped - low).astype(np.float32))

    def reaches(self, marked_hw: Array, axis: int) -> Array:
        """Return which positions of this table interpolate from a marked logit. Neighbours of weight 0 do not count.

        Args:
            marked_hw: (h, w) bool, True for marked logits.
            axis: the axis of `marked_hw` on which the table's positions lie.
        Returns: bool, (N, w) for N positions on axis 0, or (h, N) on axis 1. If the table has several axes, all of them
            replace N.
        """
        following = self.low + (self.fraction > 0)
        spread: Array = marked_hw.take(self.low, axis) | marked_hw.take(following, axis)
        return spread


class Plan(NamedTuple):
    """The neighbour tables and the layout of label columns that one call of the CPU loss needs.

    There are two layouts: by cells, for the kernel `cells.cells`, and by pixels, for the kernel `pixels.pixels`. In
    both layouts, a row of label pixels is cut into tiles. By cells, a tile has four phases, each with every fourth of
    its label columns. By pixels, a tile has one phase. Bt is B, or 1 if all images share an array. For the student's
    arrays, Bt is always 1.

    Attributes:
        student_rows, student_columns: `Taps` (H,) and (W,), neighbours of label rows and columns in the student's
            logits.
        target_rows, target_columns: `Taps` (Bt, H) and (Bt, W), neighbours of label rows and columns in the target's
            logits.
        inside_y, inside_x: (Bt, H) and (Bt, W) bool, whether label rows and columns lie in the target's view.
        first_target_rows: (Bt, H), a copy of `target_rows.low` in int64, which the kernels take.
        starts: (h + 1,) int64, the first label row of each cell row. A cell row is the label rows between two of the
            student's h logit rows.
        phases, tiles, pitch, offset, n: layout of the label columns, an array (tiles, phases, n). Entry k of phase p of
            tile t is column phases * (t * pitch + k) + p - offset, if that exists and k < pitch. By cells, `pitch` is n
            - 1, and the last entry of a phase is unused. By pixels, `pitch` is n.
        student_nodes, target_nodes: `Taps` of the nodes, the positions on a row of logits whose values a kernel reads.
            By cells, they are (Bt, tiles, n), four label pixels apart. By pixels, there is one at each of the student's
            or the target's w logits, and the last one twice: (1, 1, w + 1).
        student_runs, target_runs: (Bt, tiles, 2) int64, or (1, 1, 2) by pixels. For each tile, the first and the end
            index of a run of nodes that lie exactly on consecutive logits. Both indices are 0 if there is no run.
        columns: None by cells. By pixels, (low, fraction, low, fraction): the fields of the student's `Taps` of the
            label columns, (tiles, n) each, then of the target's, (Bt, tiles, n) each.
    """

    student_rows: Taps
    student_columns: Taps
    target_rows: Taps
    target_columns: Taps
    inside_y: Array
    inside_x: Array
    first_target_rows: Array
    starts: Array
    phases: int
    tiles: int
    pitch: int
    offset: int
    n: int
    student_nodes: Taps
    student_runs: Array
    target_nodes: Taps
    target_runs: Array
    columns: tuple[Array, Array, Array, Array] | None


class Geometry(NamedTuple):
    """The sizes that determine all positions of a loss without a window or flip. It is hashable, to be a cache key.

    Attributes:
        classes: C.
        size: (H, W) of the labels in pixels.
        student, target: (rows, columns) of the student's and the target's logits.
        align_corners, target_align_corners: whether the student's and the target's resize aligns corners.
        view_size: (height, width) of the target's view in pixels.
    """

    classes: int
    size: Size
    student: Size
    align_corners: bool
    target: Size
    view_size: Size
    target_align_corners: bool


def plans(geometry: Geometry, window_B4: Tensor | None, flip_B: Tensor | None) -> Iterator[Plan]:
    """Yield the plans that suit a problem, the fastest first: by cells if the sizes allow it, then by pixels.

    `Plan` describes these two layouts.

    Args:
        geometry: the sizes of the problem.
        window_B4: (B, 4) float64 edges (y0, x0, y1, x1) in pixels of the view, or None for the whole view.
        flip_B: (B,) bool, whether to mirror left to right, or None.
    """
    for for_cells in (True, False):
        if window_B4 is None and flip_B is None:
            plan = plan_of_whole_view(geometry, for_cells)
        else:
            plan = _plan(geometry, for_cells, window_B4, flip_B)
        if plan is not None:
            yield plan


@lru_cache(maxsize=32)
def plan_of_whole_view(geometry: Geometry, for_cells: bool) -> Plan | None:
    """Return the plan of a problem without window and flip. The last 32 plans are cached.

    If `for_cells`, the plan has the layout by cells (see `Plan`), or is None if the sizes do not allow this layout.
    Otherwise it has the layout by pixels.
    """
    return _plan(geometry, for_cells, None, None)


def _plan(geometry: Geometry, for_cells: bool, window_B4: Tensor | None, flip_B: Tensor | None) -> Plan | None:
    size, (h, w), (ht, wt), view = geometry.size, geometry.student, geometry.target, geometry.view_size
    image_positions = view_positions(None, None, size, size, torch.device("cpu"))
    view_pixels = view_positions(window_B4, flip_B, view, size, torch.device("cpu"))
    y, x = view_pixels.y.numpy(), view_pixels.x.numpy()
    aligned, target_aligned = geometry.align_corners, geometry.target_align_corners
    columns = source_cells(image_positions.x, size[1], w, aligned).numpy()
    target_columns = source_cells(view_pixels.x, view[1], wt, target_aligned).numpy()
    rows = Taps.of(source_cells(image_positions.y, size[0], h, aligned)[0].numpy(), h)
    target_rows = Taps.of(source_cells(view_pixels.y, view[0], ht, target_aligned).numpy(), ht)
    fields: dict[str, Any] = {
        "student_rows": rows,
        "student_columns": Taps.of(columns[0], w),
        "target_rows": target_rows,
        "first_target_rows": target_rows.low.astype(np.int64),
        "target_columns": Taps.of(target_columns, wt),
        "inside_y": ~((y < 0) | (y > view[0])),
        "inside_x": ~((x < 0) | (x > view[1])),
        "starts": np.searchsorted(rows.low, np.arange(h + 1)),
    }
    layout = _cells if for_cells else _pixels
    columns_fields = layout(geometry, columns, target_columns)
    return None if columns_fields is None else Plan(**fields, **columns_fields)


def _cells(geometry: Geometry, columns: Array, target_columns: Array) -> dict[str, Any] | None:
    W, w, wt = geometry.size[1], geometry.student[1], geometry.target[1]
    if W == 1:
        return None
    for offset in (SPAN // 2, 0):
        spans = -(-(W + offset) // SPAN)
        places = SPAN * np.arange(spans + 1) - offset - 0.5
        student, target = (_extended(sources, places) for sources in (columns, target_columns))
        if _straight(student, w) and _straight(target, wt):
            break
    else:
        return None
    tiles, n = _tiles(spans, min(TILE, SCRATCH_FLOATS // (16 * geometry.classes)) - 1, 1)
    nodes = np.minimum(np.arange(tiles)[:, None] * (n - 1) + np.arange(n), spans)
    student_nodes, target_nodes = Taps.of(student[:, nodes], w), Taps.of(target[:, nodes], wt)
    return {
        **{"phases": SPAN, "tiles": tiles, "pitch": n - 1, "offset": offset, "n": n, "columns": None},
        **{"student_nodes": student_nodes, "student_runs": _runs(student_nodes)},
        **{"target_nodes": target_nodes, "target_runs": _runs(target_nodes)},
    }


def _pixels(geometry: Geometry, columns: Array, target_columns: Array) -> dict[str, Any]:
    W, w, wt = geometry.size[1], geometry.student[1], geometry.target[1]
    tiles, n = _tiles(W, min(4 * TILE, SCRATCH_FLOATS // (9 * geometry.classes)), 0)
    pixels = np.minimum(np.arange(tiles * n).reshape(tiles, n), W - 1)
    student, target = Taps.of(columns[0, pixels], w), Taps.of(target_columns[:, pixels], wt)
    student_nodes, target_nodes = (Taps.of(np.arange(m + 1.0)[None, None], m) for m in (w, wt))
    return {
        **{"phases": 1, "tiles": tiles, "pitch": n, "offset": 0, "n": n, "columns": (*student, *target)},
        **{"student_nodes": student_nodes, "student_runs": _runs(student_nodes)},
        **{"target_nodes": target_nodes, "target_runs": _runs(target_nodes)},
    }


def _tiles(items: int, most: int, extra: int) -> tuple[int, int]:
    """Cut items into tiles of equal size plus `extra`, a multiple of 8: return how many and that size."""
    tiles = -(-items // max(most, 32 - extra))
    return tiles, -(-(-(-items // tiles) + extra) // 8) * 8


def _extended(sources_BN: Array, places: Array) -> Array:
    """Return the sources at other places of the axis, on its line, and exact next to a cell's centre."""
    first = sources_BN[:, :1]
    slope = (sources_BN[:, -1:] - first) / (sources_BN.shape[1] - 1)
    sources = first + slope * places
    centres = np.round(sources)
    result: Array = np.where(np.abs(sources - centres) < 1e-9, centres, sources)
    return result


def _straight(nodes_BN: Array, n_in: int) -> bool:
    """Return whether no cell's centre lies between two nodes, where interpolation or clamp would have a kink."""
    low = np.minimum(nodes_BN[:, 1:], nodes_BN[:, :-1])
    high = np.maximum(nodes_BN[:, 1:], nodes_BN[:, :-1])
    centre = np.maximum(np.floor(low) + 1, 0)
    return n_in == 1 or bool(((centre >= high) | (centre > n_in - 1)).all())


def _runs(nodes: Taps) -> Array:
    """Return the first run of consecutive cells in every tile, (Bt, tiles, 2): copied where others are interpolated."""
    on_cell = nodes.fraction == 0
    goes_on = (np.diff(nodes.low.astype(np.int64)) == 1) & on_cell[..., 1:] & on_cell[..., :-1]
    starts = goes_on.argmax(-1)
    steps = np.arange(goes_on.shape[-1])
    broken = ~goes_on & (steps >= starts[..., None])
    ends = np.where(broken.any(-1), broken.argmax(-1), goes_on.shape[-1]) + 1
    none = ~goes_on.any(-1)
    return np.stack([np.where(none, 0, starts), np.where(none, 0, ends)], -1)
