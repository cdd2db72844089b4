"""The input of the loss of relations, the same for every family, and the moments that processes exchange.

Legend: B batch, C classes, P processes, hs ws the student's own size, h w the teacher's cells, H W the image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8
"""Added to every variance: what varies by less than 1e-4 is rounding, or a class that is nowhere. The paper's code adds
it to the product of the norms, which leaves gradients of 1e5 where a prediction is uniform."""
MOMENTS = 6
"""Numbers per class: weight, two means and three sums; see `RelationProblem.moments`."""


@dataclass(frozen=True, kw_only=True)
class RelationProblem:
    """The checked arguments of `kdcache_kernels.relation_loss`.

    A cell is the area of the view that one logit of the teacher covers.

    Attributes:
        student: (B, C, hs, ws) logits, float32, float16 or bfloat16, any strides. float64 only for the reference.
        teacher: (B, C, h, w) logits of the view, any float dtype and strides.
        view_size: (height, width) of the view in pixels.
        size: (H, W) of the student's image in pixels.
        temperature: > 0, dimensionless.
        window: (B, 4) float64 edges (y0, x0, y1, x1) in pixels of the view, any strides. None is the whole view.
        flip: (B,) bool, any stride. None mirrors nothing.
        pixel_weight: (B, H, W), any dtype and strides. None weighs every pixel 1.
        counted: (B, H, W) bool, any strides, which pixels of the student's image count. None counts all of them.
        count: 0-dimensional float on the student's device, the number of counted cells to divide by. None counts the
            cells of this batch.
        need_gradient: whether to compute the gradient.
        beta, gamma: >= 0, weights of the correlation over the classes of a cell and over the cells of a class.
        moments: (6, C) float64. For each class: the sum of the cells' weights, the weighted means of the student's and
            the teacher's probabilities p and q, and three sums over the cells. With a = p - its mean and b = q - its
            mean, these are the sums of weight * a * b, weight * a * a and weight * b * b. None computes the moments of
            this batch.
    """

    student: Tensor
    teacher: Tensor
    view_size: tuple[int, int]
    size: tuple[int, int]
    temperature: float
    window: Tensor | None
    flip: Tensor | None
    pixel_weight: Tensor | None
    counted: Tensor | None
    count: Tensor | None
    need_gradient: bool
    beta: float
    gamma: float
    moments: Tensor | None

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns (h, w) of the teacher's logits. Each logit covers one cell."""
        return self.teacher.shape[2], self.teacher.shape[3]

    @property
    def is_resized(self) -> bool:
        """True if the student's logits differ from the teacher's in height or width."""
        return tuple(self.student.shape[2:]) != self.grid

    @property
    def is_moved(self) -> bool:
        """True if a window or a flip is given, even one that shows the whole, unmirrored view."""
        return self.window is not None or self.flip is not None

    @property
    def is_weighted(self) -> bool:
        """True if a window, a flip, a pixel weight or a mask is given. Cells may then have different weights."""
        return self.is_moved or self.pixel_weight is not None or self.counted is not None


def largest_logit(temperature: float) -> float:
    """Return the largest magnitude of a usable logit at a temperature.

    Differences of usable logits, divided by the temperature, do not overflow float32.
    """
    return torch.finfo(torch.float32).max / 8 * min(1.0, temperature)


def average_moments(moments_P6C: Tensor) -> Tensor:
    """Combine the moments of several processes or batch parts into the moments of all their cells.

    >>> import kdcache_kernels
    >>> moments = torch.ones(2, 6, 3, dtype=torch.float64)
    >>> kdcache_kernels.average_moments(moments).shape
    torch.Size([6, 3])

    Args:
        moments_P6C: (P, 6, C) float64, the result of `relation_moments` for each of P parts.
    Returns: (6, C) float64 in the order of `relation_moments`. The two means are those of all cells. The sum of the
        weights and the three sums of products are the sums over all cells, divided by P.
    """
    weight_PC, *means_2PC = moments_P6C[:, :3].unbind(1)
    all_C = weight_PC.sum(0)
    inverse_C = all_C.reciprocal().masked_fill(all_C == 0, 0)
    means_2C = [(weight_PC * mean_PC).sum(0) * inverse_C for mean_PC in means_2PC]
    s_PC, t_PC = (mean_PC - mean_C for mean_PC, mean_C in zip(means_2PC, means_2C, strict=True))
    between_3PC = torch.stack([s_PC * t_PC, s_PC * s_PC, t_PC * t_PC]) * weight_PC
    sums_3C = (moments_P6C[:, 3:] + between_3PC.transpose(0, 1)).mean(0)
    return torch.cat([(all_C / len(moments_P6C))[None], torch.stack(means_2C), sums_3C])


def correlation(st: Tensor, ss: Tensor, tt: Tensor) -> Tensor:
    """Return Pearson's correlation from sums of products of two variables minus their means, elementwise.

    It is near 0 if one variable hardly varies, because 1e-8 is added to both sums of squares.

    Args:
        st: sum of the products of both variables.
        ss: sum of the squares of the first variable.
        tt: sum of the squares of the second variable.
    """
    return st * (ss + EPS).rsqrt() * (tt + EPS).rsqrt()
