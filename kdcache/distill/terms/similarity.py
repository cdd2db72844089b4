"""Similarity preserving: how alike the features of a batch's images are."""

from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, grid_of, shared, unit, wide


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
