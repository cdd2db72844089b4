"""Windows, pixel positions and bilinear resampling as a product of hat matrices.

A bilinear resize along one axis is `A[x, k] = relu(1 - |clamp(src(x), 0, n - 1) - k|)`, whatever the ratio, crop or
flip. Two of them resample an image, and their transposes carry the gradient back. Against a gather of four elements,
this costs `n` multiplications instead of two, but its adjoint needs no atomic addition, so every result is bitwise
repeatable on CUDA.

Legend: B batch, C channels, N output pixels of one axis, n input cells of that axis, H W output, h w input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int]


class ViewPositions(NamedTuple):
    """Where the centres of a student's label pixels lie in the view that the student sees.

    Attributes:
        y, x: (B, H) and (B, W) float64 positions of rows and columns in pixels of the view. 0 is the view's edge, and
            0.5 the centre of its first pixel. The first axis may be 1 instead of B.
        view_size: (height, width) of the view in pixels.
        is_whole_view: True if neither a window nor a flip was given.
    """

    y: Tensor
    x: Tensor
    view_size: Size
    is_whole_view: bool

    def inside(self) -> Tensor:
        """Return the (B, H, W) bool mask of pixels whose centre lies in the view.

        A position that is on the view's edge or NaN counts as inside.
        """
        height, width = self.view_size
        outside_y_BH = (self.y < 0) | (self.y > height)
        outside_x_BW = (self.x < 0) | (self.x > width)
        return ~(outside_y_BH[:, :, None] | outside_x_BW[:, None, :])

    def hat_matrices(self, grid: Size, align_corners: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the bilinear weights with which to read a map of the view at the H x W positions (`y`, `x`).

        Args:
            grid: (h, w), the rows and columns of the map.
            align_corners: whether the centres of the view's corner pixels lie on the centres of the map's corner
                elements. Otherwise the outer edges coincide.
            dtype: dtype of the result.
        Returns: (B, H, h) for the rows and (B, W, w) for the columns.
        """
        return (
            hat_matrix(self.y, self.view_size[0], grid[0], align_corners, dtype),
            hat_matrix(self.x, self.view_size[1], grid[1], align_corners, dtype),
        )


def view_positions(
    window_B4: Tensor | None, flip_B: Tensor | None, view_size: Size, size: Size, device: torch.device
) -> ViewPositions:
    """Return where the rows and columns of an image lie in the view, in pixels of the view.

    Args:
        window_B4: (B, 4) float64 edges (y0, x0, y1, x1) of what the image shows, in pixels of the view. None is the
            whole view.
        flip_B: (B,) bool. If True, column j of the image is column W - 1 - j of the window. None flips nothing.
        view_size: (height, width) of the view in pixels.
        size: (H, W) of the image in pixels.
        device: the device of the positions.
    Returns: positions with a batch axis of B, or of 1 without a window and a flip.
    """
    H, W = size
    # Divided in this order, not multiplied by a ratio: at H == height the centres come out exact.
    row_H = torch.arange(H, dtype=torch.float64, device=device) + 0.5
    column_W = torch.arange(W, dtype=torch.float64, device=device) + 0.5
    if window_B4 is None:
        y_BH = (row_H * view_size[0] / H)[None]
        x_BW = (column_W * view_size[1] / W)[None]
    else:
        y0_B1, x0_B1, y1_B1, x1_B1 = window_B4.to(torch.float64).mT[..., None].unbind()
        y_BH = y0_B1 + row_H * (y1_B1 - y0_B1) / H
        x_BW = x0_B1 + column_W * (x1_B1 - x0_B1) / W
    if flip_B is not None:
        x_BW = torch.where(flip_B[:, None], x_BW.flip(-1), x_BW)
        y_BH = y_BH.expand(x_BW.shape[0], H)
    return ViewPositions(y_BH, x_BW, view_size, window_B4 is None and flip_B is None)


def window_misses_view(window_B4: Tensor, view_size: Size) -> Tensor:
    """Return (B,) bool, True for each window that shows no part of a view of `view_size` (height, width) pixels.

    `window_B4` is (B, 4): edges y0, x0, y1, x1 in pixels of the view.
    """
    y0_B, x0_B, y1_B, x1_B = window_B4.unbind(-1)
    return (y0_B >= view_size[0]) | (x0_B >= view_size[1]) | (y1_B <= 0) | (x1_B <= 0)


def source_cells(position_BN: Tensor, n_view: int, n_in: int, align_corners: bool) -> Tensor:
    """Convert positions in pixels of the view into positions on an axis of a map.

    The result is in elements of the map: 0 is the centre of the first element, 1 the centre of the second.

    Args:
        position_BN: float64, in pixels of the view. 0 is the view's edge.
        n_view: pixels of the view along this axis.
        n_in: elements of the map along this axis. The map covers the view.
        align_corners: whether the centres of the first and last pixel lie on the centres of the first and last element.
            Otherwise outer edges lie on outer edges.
    """
    if not align_corners:
        return position_BN * n_in / n_view - 0.5
    if n_view == 1:
        return torch.zeros_like(position_BN)
    return (position_BN - 0.5) * (n_in - 1) / (n_view - 1)


def hat_matrix(position_BN: Tensor, n_view: int, n_in: int, align_corners: bool, dtype: torch.dtype) -> Tensor:
    """Return the (B, N, n) bilinear weights that interpolate n elements of a map at N positions along one axis.

    Args:
        position_BN: float64, in pixels of the view. 0 is the view's edge.
        n_view: pixels of the view along this axis.
        n_in: n, the elements of the map along this axis. The map covers the view.
        align_corners: as in `torch.nn.functional.interpolate`: whether the centres of the first and last pixel lie on
            the centres of the first and last element. Otherwise outer edges lie on outer edges.
        dtype: dtype of the result. Positions are computed in float64.
    Returns: rows that sum to 1, with at most two nonzero entries. Beyond the last centre, the last element repeats.
    """
    source_BN = source_cells(position_BN, n_view, n_in, align_corners)
    cell_n = torch.arange(n_in, dtype=torch.float64, device=position_BN.device)
    source_BN1 = source_BN.clamp(0, n_in - 1)[..., None]
    return (1 - (source_BN1 - cell_n).abs()).clamp_min(0).to(dtype)


def area_matrix(cells: int, pixels: int, like: Tensor) -> Tensor:
    """Return a (cells, pixels) matrix of area weights along one axis: the share of each cell that each pixel fills.

    Cells and pixels cover the same length, in any ratio. Each row sums to 1. `like` has the device and dtype of the
    result. The arithmetic is float64.
    """
    edges = torch.arange(cells + 1, dtype=torch.float64, device=like.device) * pixels / cells
    left = torch.arange(pixels, dtype=torch.float64, device=like.device)
    overlap = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
    return (overlap.clamp_min(0) * cells / pixels).to(like.dtype)


def resample(x_BChw: Tensor, rows_BHh: Tensor, columns_BWw: Tensor) -> Tensor:
    """Return the product `rows @ x @ columns^T`, a contiguous (B, C, H, W) tensor. float32 products never use TF32.

    Args:
        x_BChw: float32 or float64. The result is differentiable by it any number of times.
        rows_BHh: (B or 1, H, h) weights of the rows, same dtype.
        columns_BWw: (B or 1, W, w) weights of the columns, same dtype.
    """
    result: Tensor = _Resample.apply(x_BChw, rows_BHh, columns_BWw)
    return result


class _Resample(torch.autograd.Function):
    """The product as one linear operation, so the backward also runs at full precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_BChw: Tensor, rows_BHh: Tensor, columns_BWw: Tensor) -> Tensor:
        with full_float32():
            return _contract(x_BChw, rows_BHh, columns_BWw)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows_BHh, columns_BWw = ctx.saved_tensors
        return resample(gradients[0], rows_BHh.mT, columns_BWw.mT), None, None


def _contract(x_BChw: Tensor, rows_BHh: Tensor, columns_BWw: Tensor) -> Tensor:
    """Contract one axis at a time as a batch of plain matrix products.

    `matmul` would copy a per-sample matrix once per channel, and `einsum` may choose another order.
    Enlarging, the rows come first, while the columns are few; shrinking, in the backward, they come last.
    """
    B, C, h, w = x_BChw.shape
    H, W = rows_BHh.shape[1], columns_BWw.shape[1]
    rows_BHh = rows_BHh.expand(B, H, h)
    columns_BwW = columns_BWw.mT.expand(B, w, W)
    if h < H:
        x_BhCw = x_BChw.transpose(1, 2).reshape(B, h, C * w)
        x_BHCw = torch.bmm(rows_BHh, x_BhCw).view(B, H, C, w)
        x_BCHw = x_BHCw.transpose(1, 2).reshape(B, C * H, w)
        return torch.bmm(x_BCHw, columns_BwW).view(B, C, H, W)
    x_BChW = torch.bmm(x_BChw.reshape(B, C * h, w), columns_BwW).view(B, C, h, W)
    x_BhCW = x_BChW.transpose(1, 2).reshape(B, h, C * W)
    return torch.bmm(rows_BHh, x_BhCW).view(B, H, C, W).transpose(1, 2).contiguous()


@contextmanager
def full_float32() -> Iterator[None]:
    """Use full float32 precision for matrix products in a with block, instead of TF32 (10 bits) or bfloat16 (7 bits).

    The settings apply to the whole process and are restored at the end of the block.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [(backend, backend.fp32_precision) for backend in backends]
    changed = [(backend, precision) for backend, precision in before if precision not in ("ieee", "none")]
    try:
        for backend, _ in changed:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in changed:
            backend.fp32_precision = precision
