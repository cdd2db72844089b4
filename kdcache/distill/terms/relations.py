"""Relations: how predictions vary, and how alike the features of a batch's images are."""

from typing import Any

import torch
from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, TermTargets, grid_of, shared, unit, wide
from kdcache.distill.terms.on_cells import OnCells
from kdcache.distill.terms.spec import TermSpec
from kdcache_kernels import average_moments, densify, relation_loss, relation_moments
from kdcache_kernels.topk import compute_dtype


class Relations(OnCells):
    """`dist`: T^2 * (beta * inter + gamma * intra) of q_s, q_t = softmax(x / T), in one operation.

    inter: mean over cells of 1 - pearson(q_s, q_t) over the classes; intra: mean over classes of 1 - pearson over the
    cells of the whole batch, of all processes together. Cells weigh by their share of counted pixels times the gate.
    With one class, whose probabilities are constants without a correlation, it is 0.

    Default weight 1, beta = gamma = 1, temperature 1 (the authors' for segmentation): a gradient of 1 to 1.6 of CE's,
    and of 11 before a student has learnt anything.

    Args:
        impl: which kernels compute it (see `kdcache_kernels.relation_loss`). Float64 takes the reference.
    Source: Huang et al. 2022, arXiv 2205.10536, equations 8 to 10.
    """

    def __init__(
        self, spec: TermSpec, targets: TermTargets, arrays: tuple[str, ...] = (), *, impl: str = "auto"
    ) -> None:
        super().__init__(spec, targets, arrays)
        self.impl = impl
        self.beta = 1.0 if spec.beta is None else spec.beta
        self.gamma = 1.0 if spec.gamma is None else spec.gamma

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        logits, options = self._logits(batch), self._options(batch)
        moments = None
        if self.gather is not None:
            moments = average_moments(self.of_all(relation_moments(*logits, **options)[None]))
        return relation_loss(*logits, **options, beta=self.beta, gamma=self.gamma, count=count, moments_6C=moments)

    def _logits(self, batch: TermBatch) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's logits of all classes, each on its own grid."""
        target = batch.target
        assert target is not None  # by `reads_target`
        if target.indices is None:
            return batch.logits, target.values
        num_classes, dtype = self.targets.num_classes, compute_dtype(batch.logits.dtype)
        impl = self._options(batch)["impl"]
        return batch.logits, densify(target.values, target.indices, target.tail, num_classes, dtype, impl=impl)

    def _options(self, batch: TermBatch) -> dict[str, Any]:
        """The arguments of both operations."""
        return {
            "view_size": self.targets.view_size,
            "size": batch.size,
            "temperature": self.temperature,
            "window_B4": batch.window,
            "flip_B": batch.flip,
            "pixel_weight_BHW": batch.pixel_weight,
            "counted_BHW": batch.counted,
            "impl": "reference" if batch.logits.dtype == torch.float64 else self.impl,
        }


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
