"""Attention transfer: the energy of a network's features over the image."""

from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, TermTargets, divide, grid_of, unit, wide
from kdcache.distill.terms.spec import TermSpec
from kdcache_kernels.target_cells import resize


class Attention(Term):
    """`at`: mean over cells of (a_s - a_t)^2, a = A / ||A||, A = sum over channels of F^2.

    The teacher's A comes from features/<tap>, or from statistics/at.<tap>, where it is divided by its maximum: that
    changes nothing here. The student's A is resized to the teacher's cells. The norm is over one image's counted cells,
    each weighted by its share: what does not count (beside the view, grey, void) enters neither norm nor mean.

    Default weight h w / 2, by which the term is at most 1, for with unit norms the mean is at most 2 / (h w): 2592 at
    72 x 72 (published: 1000 to 10000), and a gradient of 0.6 of CE's for a decoder's map, 2 to 4 for a deep one.
    Source: Zagoruyko and Komodakis 2017, arXiv 1612.03928, section 3.1.
    """

    def __init__(self, spec: TermSpec, targets: TermTargets, arrays: tuple[str, ...]) -> None:
        super().__init__(spec, targets, arrays)
        if spec.weight is None:
            room, _, name = arrays[0].partition("/")
            h, w = getattr(targets.manifest, room)[name].size
            self.weight = h * w / 2

    def prepare(self, batch: TermBatch) -> None:
        self.note_resize(batch.features[self._student_tap], batch.stored[self._arrays[0]], "the attention of ")

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        student_Bhw = energy(wide(batch.features[self._student_tap]))
        stored = batch.stored[self._arrays[0]].to(student_Bhw.dtype)
        teacher_Bhw = stored if stored.ndim == 3 else energy(stored)
        teacher_Bhw = self.seen(batch, teacher_Bhw[:, None], student_Bhw.dtype)[:, 0]
        grid = grid_of(teacher_Bhw)
        cells = self.cells(batch, grid, student_Bhw)
        share_Bhw = cells.counted.sqrt()
        maps = (resize(student_Bhw[:, None], grid)[:, 0], teacher_Bhw)
        # Both carry the root of the share, so that the square carries the share; the gate comes on top.
        student_Bhw, teacher_Bhw = (unit(a * share_Bhw, (1, 2)) for a in maps)
        gate_Bhw = cells.weight / cells.counted.masked_fill(cells.counted == 0, 1)
        total = ((student_Bhw - teacher_Bhw).square() * gate_Bhw).sum()
        return divide(total, cells.counted.sum() if count is None else count)


def energy(features_Bchw: Tensor) -> Tensor:
    """(B, h, w): the sum of squares over the channels."""
    return features_Bchw.square().sum(1)
