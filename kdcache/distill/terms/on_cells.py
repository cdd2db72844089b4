"""The base of the terms that compare logits on the target's cells."""

from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, grid_of, wide
from kdcache_kernels.on_cells.reference import Seen, lay_logits
from kdcache_kernels.on_cells.relations import check_logits
from kdcache_kernels.reference import NanReachesAll, divide


class OnCells(Term):
    """A term of logits, which a student of another size is resized for."""

    def prepare(self, batch: TermBatch) -> None:
        if batch.target is not None:
            self.note_resize(batch.logits, batch.target.values)


def seen_on_cells(term: Term, batch: TermBatch, student_BCxx: Tensor, teacher_BChw: Tensor) -> Seen:
    """Lay the student's and the teacher's maps over the student's image, on the teacher's cells, both over T.

    Raises: ShapeError for maps of unequal channels.
    """
    check_logits(student_BCxx, teacher_BChw)
    return lay_logits(
        student_BCxx,
        teacher_BChw,
        term.cells(batch, grid_of(teacher_BChw), wide(student_BCxx)),
        temperature=term.temperature,
        view_size=term.targets.view_size,
        window_B4=batch.window,
        flip_B=batch.flip,
    )


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The summands of KL(p || q), each at least 0.

    The sums of p and q are equal, so that p may be taken from q. To first order, the rounding of both logarithms then
    changes neither the value nor the gradient, and equal distributions leave exactly 0 of them.
    """
    p, q = log_p.exp(), log_q.exp()
    return p * (log_p - log_q) + (q - p)


def mean_of(total: Tensor, count: Tensor, spoilt: Tensor, student: Tensor) -> Tensor:
    """Return total / count, and 0 if the count is 0. A spoilt sum is NaN, and so is its gradient everywhere."""
    mean: Tensor = NanReachesAll.apply(divide(total, count, spoilt), student)
    return mean
