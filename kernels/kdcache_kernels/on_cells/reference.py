"""The loss of relations in plain PyTorch: the oracle of every test, and the fallback without a fused kernel.

Legend: B batch, C classes, hs ws the student's own size, h w the teacher's cells.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import NanReachesAll, divide
from ..target_cells import Cells, lay_cells, resize, sample_view
from ..topk import compute_dtype
from ..window import Size
from .problem import RelationProblem, correlation, largest_logit


class Seen(NamedTuple):
    """The student's and the teacher's logits, resampled to the teacher's cells.

    A cell is the area of the image that one logit of the teacher covers.

    Attributes:
        student, teacher: (B, C, h, w) logits divided by the temperature.
        cells: how much each cell counts and weighs in a mean over cells, (B, h, w) each.
        spoilt: 0-dimensional bool tensor. It is True if a counted cell depends on a logit that is NaN, infinite or
            above `largest_logit` in magnitude. The loss must then be NaN.
    """

    student: Tensor
    teacher: Tensor
    cells: Cells
    spoilt: Tensor

    @property
    def predictions(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's probabilities, (B, C, h, w) each."""
        return self.student.softmax(1), self.teacher.softmax(1)


def lay_logits(
    student_BCxx: Tensor,
    teacher_BChw: Tensor,
    cells: Cells,
    *,
    temperature: float,
    view_size: Size,
    window_B4: Tensor | None,
    flip_B: Tensor | None,
) -> Seen:
    """Resample the student's and the teacher's logits to the teacher's cells, and divide them by the temperature.

    Logits that are NaN, infinite or above `largest_logit` in magnitude are replaced by 0 and reported in `Seen.spoilt`.

    Args:
        student_BCxx: (B, C, hs, ws) logits. The result is differentiable by them.
        teacher_BChw: (B, C, h, w) logits of the view, without a gradient.
        cells: how much each cell counts. Unusable logits matter only in cells that count.
        temperature: > 0, dimensionless.
        view_size: (height, width) of the view in pixels.
        window_B4: (B, 4) float64 edges (y0, x0, y1, x1) in pixels of the view, or None for the whole view.
        flip_B: (B,) bool, whether to mirror the window left to right, or None.
    Returns: float64 results for a float64 student, else float32.
    """
    dtype, grid = compute_dtype(student_BCxx.dtype), (teacher_BChw.shape[2], teacher_BChw.shape[3])

    def on_cells(logits: Tensor, move: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        usable_B1xx = (logits.detach().abs() <= largest_logit(temperature)).all(1, keepdim=True)
        moved_BChw, lost_B1hw = move(torch.where(usable_B1xx, logits, 0)), move((~usable_B1xx).to(dtype))
        return moved_BChw / temperature, lost_B1hw[:, 0] > 0

    student_BChw, lost_Bhw = on_cells(student_BCxx.to(dtype), lambda x: resize(x, grid))
    teacher_BChw, also_lost_Bhw = on_cells(
        teacher_BChw.to(dtype), lambda x: sample_view(x, window_B4, flip_B, view_size, dtype)
    )
    spoilt = ((lost_Bhw | also_lost_Bhw) & (cells.counted > 0)).any()
    return Seen(student_BChw, teacher_BChw, cells, spoilt)


def logits_on_cells(problem: RelationProblem) -> Seen:
    """Return a problem's student and teacher logits, resampled to the teacher's cells and divided by the temperature.

    The result also has how much each cell counts and weighs, and whether the loss must be NaN.
    """
    cells = lay_cells(
        problem.window,
        problem.flip,
        problem.pixel_weight,
        problem.counted,
        batch_size=problem.student.shape[0],
        view_size=problem.view_size,
        size=problem.size,
        grid=problem.grid,
        like=problem.student.new_empty(0, dtype=compute_dtype(problem.student.dtype)),
    )
    return lay_logits(
        problem.student,
        problem.teacher,
        cells,
        temperature=problem.temperature,
        view_size=problem.view_size,
        window_B4=problem.window,
        flip_B=problem.flip,
    )


def relation_loss_reference(problem: RelationProblem) -> Tensor:
    """Compute `kdcache_kernels.relation_loss` from checked arguments with PyTorch operations.

    The arithmetic is float32 even under autocast, or float64 for float64 logits.

    Returns: the loss, 0-dimensional and differentiable any number of times.
    """
    with torch.autocast(problem.student.device.type, enabled=False):
        resampled = logits_on_cells(problem)
        weight_Bhw, counted_Bhw = resampled.cells.weight, resampled.cells.counted
        predictions = resampled.predictions
        s_BChw, t_BChw = (x - x.mean(1, keepdim=True) for x in predictions)
        r_Bhw = correlation(*(x.sum(1) for x in (s_BChw * t_BChw, s_BChw.square(), t_BChw.square())))
        count = counted_Bhw.sum() if problem.count is None else problem.count
        inter = divide(((1 - r_Bhw) * weight_Bhw).sum(), count, resampled.spoilt)
        intra = _intra(predictions, weight_Bhw, problem.moments)
        loss = problem.temperature**2 * (problem.beta * inter + problem.gamma * intra)
        if problem.student.shape[1] == 1:
            loss = 0 * loss  # one class has no relations
        return NanReachesAll.apply(loss, problem.student)  # type: ignore[no-any-return]


@torch.no_grad()
def relation_moments_reference(problem: RelationProblem) -> Tensor:
    """Compute `kdcache_kernels.relation_moments` from checked arguments with PyTorch operations.

    Returns: (6, C) float64. For each class: the sum of the cells' weights, the student's and the teacher's weighted
        mean probability, and three sums over the cells. They are of weight * a * b, weight * a * a and weight * b * b.
        a and b are the deviations of the student's and the teacher's probability from these means.
    """
    with torch.autocast(problem.student.device.type, enabled=False):
        resampled = logits_on_cells(problem)
        predictions, weight_Bhw = resampled.predictions, resampled.cells.weight
        weight, means_2C = _means(predictions, weight_Bhw)
        sums_3C = _centred_sums(predictions, weight_Bhw, means_2C)
        moments_6C = torch.cat([weight.expand(1, problem.student.shape[1]), means_2C, sums_3C]).double()
        return moments_6C.masked_fill(resampled.spoilt, torch.nan)


def _intra(predictions: tuple[Tensor, Tensor], weight_Bhw: Tensor, moments_6C: Tensor | None) -> Tensor:
    """Return the mean over classes of 1 - Pearson's correlation over the cells, or 0 without weights."""
    weight, means_2C = _means(predictions, weight_Bhw)
    if moments_6C is None:
        sums_3C = _centred_sums(predictions, weight_Bhw, means_2C)
    else:
        # The value is that of all parts; the gradient is that of the own one, for only the means would carry another,
        # and a mean that moves changes no sum of products of centred values.
        shared_6C = moments_6C.to(means_2C.dtype)
        weight = shared_6C[0]
        own_3C = _centred_sums(predictions, weight_Bhw, shared_6C[1:3])
        sums_3C = shared_6C[3:] + own_3C - own_3C.detach()
    inverse = weight.reciprocal().masked_fill(weight == 0, 0)
    return ((1 - correlation(*(sums_3C * inverse).unbind())) * (weight > 0)).mean()


def _means(predictions: tuple[Tensor, Tensor], weight_Bhw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of all cells, 0-dimensional, and the means (2, C) of both predictions."""
    weight = weight_Bhw.sum()
    sums_2C = torch.stack([_of_class(x, weight_Bhw) for x in predictions])
    return weight, sums_2C * weight.reciprocal().masked_fill(weight == 0, 0)


def _centred_sums(predictions: tuple[Tensor, Tensor], weight_Bhw: Tensor, means_2C: Tensor) -> Tensor:
    """Return (3, C): weighted sums of products of student and teacher, minus their means."""
    s_BChw, t_BChw = (x - m[:, None, None] for x, m in zip(predictions, means_2C, strict=True))
    return torch.stack([_of_class(x, weight_Bhw) for x in (s_BChw * t_BChw, s_BChw**2, t_BChw**2)])


def _of_class(x_BChw: Tensor, weight_Bhw: Tensor) -> Tensor:
    return (x_BChw * weight_Bhw[:, None]).sum((0, 2, 3))
