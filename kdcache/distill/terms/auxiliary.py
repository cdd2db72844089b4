"""The loss of an auxiliary head, which answers only in training."""

import torch
from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, TermSetup
from kdcache.settings import terms as specs
from kdcache.tasks import AUXILIARY
from kdcache_kernels import distill_denominators, distill_loss


class Auxiliary(Term):
    """The loss term `auxiliary`: the cross-entropy of the student's auxiliary head with the labels.

    Class weights, label smoothing and denominator are the same as in the main cross-entropy. Default weight 0.1.

    Source: Tsai et al. 2018 (AdaptSegNet), arXiv 1802.10349, section 4.1, whose auxiliary loss weighs 0.1 next to 1.
        PSPNet (Zhao et al. 2017, arXiv 1612.01105) uses 0.4.
    """

    kind = "auxiliary"
    class_weight: Tensor | None

    def __init__(self, spec: specs.Auxiliary, setup: TermSetup) -> None:
        super().__init__(spec, setup)
        self.register_buffer("class_weight", setup.class_weight, persistent=False)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the mean cross-entropy of the auxiliary head's logits over labelled pixels, 0-dimensional.

        `count` is the denominator, 0-dimensional. None uses the sum of the class weights of the batch's labelled
        pixels.
        """
        logits = batch.student.heads[AUXILIARY]
        return distill_loss(
            logits,
            batch.rows.label,
            ce_denominator=count,
            class_weight=self.class_weight,
            label_smoothing=self.setup.label_smoothing,
            align_corners=self.student_align_corners,
            impl="reference" if logits.dtype == torch.float64 else self.impl,
        ).loss

    @torch.no_grad()
    def count(self, batch: TermBatch) -> Tensor:
        """Return the denominator of the loss: the sum of the class weights of the labelled pixels, 0-dimensional."""
        classes = self.targets.num_classes
        return distill_denominators(batch.rows.label, num_classes=classes, class_weight=self.class_weight).ce
