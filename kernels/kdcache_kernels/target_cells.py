"""The grid on which terms compare two maps: the teacher's cells, laid over the student's image.

The teacher's array has h x w cells that tile its view. Equally many cells tile the student's image, which shows a
window of that view, maybe mirrored. The teacher is sampled at their centres through the window. For a whole, unmirrored
view that is the array itself. The student's map tiles the same image in its own cells and is resized.

A pixel counts if it lies in the view and no mask excludes it (grey outside the image, void), and a cell counts by the
share of its pixels that count. Predictions are known only for whole cells, so a cell on the edge of a mask is compared
completely and weighs by its share.

Whatever a head's own resize does at the corners, cells are areas here: both sides are resampled with
`align_corners=False`. Everything is a product of matrices, so the gradient needs no atomic addition.

Legend: B batch, c channels, h w the teacher's cells, H W the student's image in pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .window import Size, area_matrix, view_positions
from .window import resample as resample_eagerly


class Cells(NamedTuple):
    """Two maps for a mean over the target's cells: the share of each cell that counts, and each cell's weight.

    A cell is the area of the image that one target logit covers.

    Attributes:
        counted: (B, h, w), the share of the cell's area whose pixels count, 0 to 1. Its sum is the denominator of the
            mean.
        weight: (B, h, w), the same share with every pixel multiplied by its gate.
    """

    counted: Tensor
    weight: Tensor


def lay_cells(
    window_B4: Tensor | None,
    flip_B: Tensor | None,
    pixel_weight_BHW: Tensor | None,
    counted_BHW: Tensor | None = None,
    *,
    batch_size: int,
    view_size: Size,
    size: Size,
    grid: Size,
    like: Tensor,
) -> Cells:
    """Compute how much each of the h x w cells that tile the student's image counts and weighs in a mean over cells.

    Args:
        window_B4: (B, 4) float64 edges (y0, x0, y1, x1) in pixels of the view, or None for the whole view.
        flip_B: (B,) bool, whether to mirror the window left to right, or None.
        pixel_weight_BHW: gate of every pixel, or None for ones.
        counted_BHW: bool, the image's pixels that count if they lie in the view. None counts all pixels in the view.
        batch_size: B.
        view_size: (height, width) of the view in pixels.
        size: (H, W) of the student's image in pixels.
        grid: (h, w), the rows and columns of cells.
        like: a tensor with the device and dtype of the result.
    """
    counts_BHW = view_positions(window_B4, flip_B, view_size, size, like.device).inside().expand(batch_size, *size)
    if counted_BHW is not None:
        counts_BHW = counts_BHW & counted_BHW
    counted_Bhw = area_mean(counts_BHW[:, None].to(like.dtype), grid)[:, 0]
    if pixel_weight_BHW is None:
        return Cells(counted_Bhw, counted_Bhw)
    # Where, not times: a gate that is not finite at a pixel that does not count must not change the term.
    gated_BHW = torch.where(counts_BHW, pixel_weight_BHW.detach().to(like.dtype), 0)
    return Cells(counted_Bhw, area_mean(gated_BHW[:, None], grid)[:, 0])


def area_mean(map_BcHW: Tensor, grid: Size) -> Tensor:
    """Average a (B, c, H, W) map over each of the h x w equal cells that tile it. Return (B, c, h, w).

    `grid` is (h, w). Cells need not consist of whole pixels.
    """
    pixels = map_BcHW.shape[2:]
    return resample(map_BcHW, *(area_matrix(n, of, map_BcHW)[None] for n, of in zip(grid, pixels, strict=True)))


def sample_view(
    map_Bchw: Tensor, window_B4: Tensor | None, flip_B: Tensor | None, view_size: Size, dtype: torch.dtype
) -> Tensor:
    """Interpolate a (B, c, h, w) map of the view bilinearly at the centres of a window's h x w cells.

    Args:
        map_Bchw: the map, which covers the whole view.
        window_B4: (B, 4) float64 edges (y0, x0, y1, x1) in pixels of the view, or None for the whole view.
        flip_B: (B,) bool, whether to mirror the window left to right, or None.
        view_size: (height, width) of the view in pixels.
        dtype: dtype of the result.
    Returns: (B, c, h, w) without a gradient. If the window is the whole view and nothing is mirrored, it is the map,
        only converted to `dtype`.
    """
    grid = (map_Bchw.shape[2], map_Bchw.shape[3])
    positions = view_positions(window_B4, flip_B, view_size, grid, map_Bchw.device)
    view_Bchw = map_Bchw.detach().to(dtype)
    return view_Bchw if positions.is_whole_view else resample(view_Bchw, *positions.hat_matrices(grid, False, dtype))


def resize(map_Bchw: Tensor, grid: Size, align_corners: bool = False) -> Tensor:
    """Resize a (B, c, h, w) map bilinearly to `grid`, its new (rows, columns). The result is differentiable.

    The map is float32 or float64. `align_corners` is as in `torch.nn.functional.interpolate`.
    """
    own_size = (map_Bchw.shape[2], map_Bchw.shape[3])
    if own_size == grid:
        return map_Bchw
    # The positions are counted in the grid's own units: with aligned corners these are the pixels of the result.
    positions = view_positions(None, None, grid, grid, map_Bchw.device)
    return resample(map_Bchw, *positions.hat_matrices(own_size, align_corners, map_Bchw.dtype))


def resample(map_Bchw: Tensor, rows_BHh: Tensor, columns_BWw: Tensor) -> Tensor:
    """Resample a (B, c, h, w) map to (B, c, H, W) by the product `rows @ map @ columns^T`, also inside `torch.compile`.

    `rows_BHh` and `columns_BWw` are bilinear weights, (B, H, h) and (B, W, w), where B may be 1. In eager mode, float32
    products never use TF32. Compiled code uses the precision that is set for the process, float32 by default.
    """
    if torch.compiler.is_compiling():
        return torch.einsum("bcij,bhi,bwj->bchw", map_Bchw, rows_BHh, columns_BWw)
    return resample_eagerly(map_Bchw, rows_BHh, columns_BWw)


def labels_at_centres(labels_BHW: Tensor, grid: Size) -> Tensor:
    """Return the label of the pixel at the centre of each of the h x w cells that tile an image, (B, h, w).

    `grid` is (h, w). If a centre lies between pixels, the lower or right one is taken.
    """
    rows, columns = (
        torch.arange(1, 2 * cells, 2, device=labels_BHW.device) * pixels // (2 * cells)
        for cells, pixels in zip(grid, labels_BHW.shape[1:], strict=True)
    )
    return labels_BHW[:, rows][:, :, columns]
