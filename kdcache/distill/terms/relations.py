"""Relations: how predictions vary, and how alike the features of a batch's images are."""

import torch
from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, TermTargets, grid_of, shared, unit, wide
from kdcache.distill.terms.cells import Cells
from kdcache.distill.terms.spec import TermSpec

EPS = 1e-8
"""Added to every variance: what varies by less than 1e-4 is rounding, or a class that is nowhere. The paper's code adds
it to the product of the norms, which leaves gradients of 1e5 where a prediction is uniform."""


class Relations(Term):
    """`dist`: T^2 * (beta * inter + gamma * intra) of q_s, q_t = softmax(x / T).

    inter: mean over cells of 1 - pearson(q_s, q_t) over the classes; intra: mean over classes of 1 - pearson over the
    cells of the whole batch, of all processes together. Cells weigh by their share of counted pixels times the gate.

    Default weight 1, beta = gamma = 1, temperature 1 (the authors' for segmentation): a gradient of 1 to 1.6 of CE's,
    and of 11 before a student has learnt anything.
    Source: Huang et al. 2022, arXiv 2205.10536, equations 8 to 10.
    """

    def __init__(self, spec: TermSpec, targets: TermTargets, arrays: tuple[str, ...] = ()) -> None:
        super().__init__(spec, targets, arrays)
        self.beta = 1.0 if spec.beta is None else spec.beta
        self.gamma = 1.0 if spec.gamma is None else spec.gamma

    def prepare(self, batch: TermBatch) -> None:
        if batch.target is not None:
            self.note_resize(batch.logits, batch.target.values)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        student_BChw, teacher_BChw, cells = self.both_logits(batch)
        student_BChw, teacher_BChw = ((x / self.temperature).softmax(1) for x in (student_BChw, teacher_BChw))
        inter = self.mean(1 - _over_classes(student_BChw, teacher_BChw), cells, count)
        return self.temperature**2 * (self.beta * inter + self.gamma * self._intra(student_BChw, teacher_BChw, cells))

    def _intra(self, student_BChw: Tensor, teacher_BChw: Tensor, cells: Cells) -> Tensor:
        def of_class(x_BChw: Tensor) -> Tensor:
            return (x_BChw * cells.weight[:, None]).sum((0, 2, 3))

        # The means need no gradient: a mean that moves changes no sum of products of centred values.
        count_C = cells.weight.sum().expand(self.targets.num_classes)
        sums_3C = torch.stack([count_C, of_class(student_BChw.detach()), of_class(teacher_BChw)])
        all_C, *sums = self.of_all(sums_3C[None]).mean(0).unbind()
        per_cell_C = all_C.reciprocal().masked_fill(all_C == 0, 0)
        means = [total * per_cell_C for total in sums]
        s_BChw, t_BChw = (x - mean[:, None, None] for x, mean in zip((student_BChw, teacher_BChw), means, strict=True))
        own_13C = torch.stack([of_class(x) for x in (s_BChw * t_BChw, s_BChw**2, t_BChw**2)])[None]
        all_P3C = self.of_all(own_13C)
        loss_C = (1 - correlation(*(all_P3C.mean(0) * per_cell_C).unbind())) * (all_C > 0)
        return shared(loss_C.mean(), 1, all_P3C.shape[0])


def _over_classes(student_BChw: Tensor, teacher_BChw: Tensor) -> Tensor:
    """Pearson's correlation (B, h, w)."""
    s_BChw, t_BChw = (x - x.mean(1, keepdim=True) for x in (student_BChw, teacher_BChw))
    return correlation((s_BChw * t_BChw).sum(1), s_BChw.square().sum(1), t_BChw.square().sum(1))


def correlation(st: Tensor, ss: Tensor, tt: Tensor) -> Tensor:
    """Pearson's correlation from sums of products of centred values; near 0 where one side hardly varies."""
    return st * (ss + EPS).rsqrt() * (tt + EPS).rsqrt()


class Similarity(Term):
    """`sp`: ||G_t - G_s||_F^2 / b^2, G = rows of Q Q^T divided by their norms, Q a (b, c h w) matrix of features.

    b is the batch of all processes together. Student and teacher keep their own channels and grids, for only products
    of images with images are compared; every cell of Q is weighted by its share of counted pixels times the gate. An
    image without such cells has a row of zeros on both sides.

    Default weight 50 (the formula's own reduction): a gradient of 0.8 to 1.4 of CE's in a batch of 8. Published: 3000,
    for batches of 64 classified images.
    Source: Tung and Mori 2019, arXiv 1907.09682, section 3.
    """

    default_weight = 50.0

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        student_Bchw = wide(batch.features[self._student_tap])
        teacher_Bchw = self.seen(batch, batch.stored[self._arrays[0]], student_Bchw.dtype)
        own = student_Bchw.shape[0]
        student_bx, teacher_bx = (self.of_all(self._rows(batch, maps)) for maps in (student_Bchw, teacher_Bchw))
        b = student_bx.shape[0]
        difference_bb = unit(teacher_bx @ teacher_bx.mT, 1) - unit(student_bx @ student_bx.mT, 1)
        return shared(difference_bb.square().sum() / b**2, own, b)

    def count(self, batch: TermBatch) -> Tensor:
        """1: `loss` divides by the square of the number of images of all processes, which no process counts alone."""
        return wide(batch.logits).new_ones(())

    def _rows(self, batch: TermBatch, features_Bchw: Tensor) -> Tensor:
        """Q of the own images: with the root of the share in both factors, the product carries the share."""
        share_Bhw = self.cells(batch, grid_of(features_Bchw), features_Bchw).weight
        return (features_Bchw * share_Bhw.sqrt()[:, None]).flatten(1)
