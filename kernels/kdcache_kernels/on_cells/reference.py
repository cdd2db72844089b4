"""The losses on cells in plain PyTorch: the oracle of every test, and the fallback where no fused kernel runs.

Legend: B batch, C classes, hs ws the student's own size, h w the teacher's cells.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import NanReachesAll, divide
from ..target_cells import Cells, labels_at_centres, lay_cells, resize, sample_view
from ..topk import compute_dtype
from .problem import CellProblem, ChannelProblem, DecoupledProblem, RelationProblem, correlation, largest_logit


class Seen(NamedTuple):
    """Both sets of logits on the teacher's cells.

    Attributes:
        student, teacher: (B, C, h, w) logits over the temperature.
        cells: how much each cell counts.
        spoilt: 0-dimensional bool, whether a logit that is not finite enters a cell that counts.
    """

    student: Tensor
    teacher: Tensor
    cells: Cells
    spoilt: Tensor

    @property
    def predictions(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's probabilities."""
        return self.student.softmax(1), self.teacher.softmax(1)


def logits_on_cells(problem: CellProblem) -> Seen:
    """Lay both sets of logits under the teacher's cells, in float32; in float64 where the student's are."""
    dtype = compute_dtype(problem.student.dtype)

    def on_cells(logits: Tensor, move: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        usable_B1xx = (logits.detach().abs() <= largest_logit(problem.temperature)).all(1, keepdim=True)
        moved_BChw, lost_B1hw = move(torch.where(usable_B1xx, logits, 0)), move((~usable_B1xx).to(dtype))
        return moved_BChw / problem.temperature, lost_B1hw[:, 0] > 0

    cells = lay_cells(
        problem.window,
        problem.flip,
        problem.pixel_weight,
        problem.counted,
        batch_size=problem.student.shape[0],
        view_size=problem.view_size,
        size=problem.size,
        grid=problem.grid,
        like=problem.student.new_empty(0, dtype=dtype),
    )
    teacher_BChw = problem.teacher.to(dtype)
    if isinstance(problem, ChannelProblem) and problem.teacher_maximum is not None:
        teacher_BChw = teacher_BChw + problem.teacher_maximum[:, None].to(dtype)
    student_BChw, lost_Bhw = on_cells(problem.student.to(dtype), lambda x: resize(x, problem.grid))
    teacher_BChw, also_lost_Bhw = on_cells(
        teacher_BChw, lambda x: sample_view(x, problem.window, problem.flip, problem.view_size, dtype)
    )
    spoilt = ((lost_Bhw | also_lost_Bhw) & (cells.counted > 0)).any()
    return Seen(student_BChw, teacher_BChw, cells, spoilt)


def relation_loss_reference(problem: RelationProblem) -> Tensor:
    """Compute what `kdcache_kernels.relation_loss` documents, from arguments that it has checked.

    Float32 throughout, under autocast too; float64 for float64 logits. So do the others.
    """
    with torch.autocast(problem.student.device.type, enabled=False):
        seen = logits_on_cells(problem)
        weight_Bhw, counted_Bhw = seen.cells.weight, seen.cells.counted
        predictions = seen.predictions
        s_BChw, t_BChw = (x - x.mean(1, keepdim=True) for x in predictions)
        r_Bhw = correlation(*(x.sum(1) for x in (s_BChw * t_BChw, s_BChw.square(), t_BChw.square())))
        count = counted_Bhw.sum() if problem.count is None else problem.count
        inter = divide(((1 - r_Bhw) * weight_Bhw).sum(), count, seen.spoilt)
        intra = _intra(predictions, weight_Bhw, problem.moments)
        loss = problem.temperature**2 * (problem.beta * inter + problem.gamma * intra)
        if problem.student.shape[1] == 1:
            loss = 0 * loss  # one class has no relations
        return NanReachesAll.apply(loss, problem.student)  # type: ignore[no-any-return]


@torch.no_grad()
def relation_moments_reference(problem: RelationProblem) -> Tensor:
    """Compute what `kdcache_kernels.relation_moments` documents."""
    with torch.autocast(problem.student.device.type, enabled=False):
        seen = logits_on_cells(problem)
        predictions, weight_Bhw = seen.predictions, seen.cells.weight
        weight, means_2C = _means(predictions, weight_Bhw)
        sums_3C = _centred_sums(predictions, weight_Bhw, means_2C)
        moments_6C = torch.cat([weight.expand(1, problem.student.shape[1]), means_2C, sums_3C]).double()
        return moments_6C.masked_fill(seen.spoilt, torch.nan)


def _intra(predictions: tuple[Tensor, Tensor], weight_Bhw: Tensor, moments_6C: Tensor | None) -> Tensor:
    """Mean over the classes of 1 - Pearson's correlation over the cells; 0 without any that weighs."""
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
    """The weight of all cells, 0-dimensional, and the means (2, C) of both predictions."""
    weight = weight_Bhw.sum()
    sums_2C = torch.stack([_of_class(x, weight_Bhw) for x in predictions])
    return weight, sums_2C * weight.reciprocal().masked_fill(weight == 0, 0)


def _centred_sums(predictions: tuple[Tensor, Tensor], weight_Bhw: Tensor, means_2C: Tensor) -> Tensor:
    """(3, C): weighted sums of products of student and teacher, minus their means."""
    s_BChw, t_BChw = (x - m[:, None, None] for x, m in zip(predictions, means_2C, strict=True))
    return torch.stack([_of_class(x, weight_Bhw) for x in (s_BChw * t_BChw, s_BChw**2, t_BChw**2)])


def _of_class(x_BChw: Tensor, weight_Bhw: Tensor) -> Tensor:
    return (x_BChw * weight_Bhw[:, None]).sum((0, 2, 3))


def decoupled_loss_reference(problem: DecoupledProblem) -> Tensor:
    """Compute what `kdcache_kernels.decoupled_loss` documents."""
    with torch.autocast(problem.student.device.type, enabled=False):
        seen = logits_on_cells(problem)
        target_B1hw = target_class(problem.labels, seen.teacher)
        log_t, log_s = (split(x, target_B1hw) for x in (seen.teacher, seen.student))
        tckd_Bhw, nckd_Bhw = (_kl(p, q).sum(1) for p, q in zip(log_t, log_s, strict=True))
        loss_Bhw = (problem.alpha * tckd_Bhw + problem.beta * nckd_Bhw) * seen.cells.weight
        count = seen.cells.counted.sum() if problem.count is None else problem.count
        loss = problem.temperature**2 * divide(loss_Bhw.sum(), count, seen.spoilt)
        return NanReachesAll.apply(loss, problem.student)  # type: ignore[no-any-return]


def target_class(labels_BHW: Tensor | None, teacher_BChw: Tensor) -> Tensor:
    """(B, 1, h, w) int64: the label at the centre of each cell, the teacher's first best class where that is none."""
    best_B1hw = teacher_BChw.argmax(1, keepdim=True)
    if labels_BHW is None:
        return best_B1hw
    h, w = teacher_BChw.shape[2:]
    label_B1hw = labels_at_centres(labels_BHW, (h, w))[:, None].long()
    return torch.where((label_B1hw >= 0) & (label_B1hw < teacher_BChw.shape[1]), label_B1hw, best_B1hw)


def split(logits_BChw: Tensor, target_B1hw: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, rest), and of the classes of the rest among themselves (the target's is -1e30)."""
    C = logits_BChw.shape[1]
    is_target_BChw = torch.arange(C, device=logits_BChw.device)[:, None, None] == target_B1hw
    # Both relative to the largest of the rest: with large logits in it, logsumexp would be rounded as these are.
    top_B1hw = logits_BChw.detach().masked_fill(is_target_BChw, -torch.inf).amax(1, keepdim=True)
    logits_BChw = logits_BChw - (top_B1hw if C > 1 else 0)
    rest_BChw = logits_BChw.masked_fill(is_target_BChw, -1e30)
    target_Bhw = torch.where(is_target_BChw, logits_BChw, 0).sum(1)
    pair_B2hw = torch.stack([target_Bhw, rest_BChw.logsumexp(1)], 1).log_softmax(1)
    return pair_B2hw, rest_BChw.log_softmax(1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q)


def channel_loss_reference(problem: ChannelProblem) -> Tensor:
    """Compute what `kdcache_kernels.channel_loss` documents."""
    with torch.autocast(problem.student.device.type, enabled=False):
        seen = logits_on_cells(problem)
        counted_Bhw, weight_Bhw = seen.cells
        log_t, log_s = (over_cells(x, weight_Bhw) for x in (seen.teacher, seen.student))
        spoilt = seen.spoilt | (~weight_Bhw.isfinite() & (counted_Bhw > 0)).any()
        images = (counted_Bhw > 0).flatten(1).any(1).sum()
        total = _kl(log_t, log_s).sum(-1).mean(1).sum()
        loss = problem.temperature**2 * divide(total, images if problem.count is None else problem.count, spoilt)
        return NanReachesAll.apply(loss, problem.student)  # type: ignore[no-any-return]


def over_cells(logits_BChw: Tensor, weight_Bhw: Tensor) -> Tensor:
    """(B, C, h w): log-probabilities over the cells of each class and image; a cell enters by its weight above 0."""
    weight_B1n = weight_Bhw.flatten(1)[:, None]
    logits_BCn = logits_BChw.flatten(2) + torch.where(weight_B1n > 0, weight_B1n, 1).log()
    # A finite floor: an image without counted cells then has two equal distributions, where -inf would give NaN.
    return logits_BCn.masked_fill(weight_B1n <= 0, -1e30).log_softmax(-1)
