"""A term on predictions alone: how undecided a student is."""

import math

import torch
from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, TermTargets, divide, wide
from kdcache.distill.terms.cells import resize
from kdcache.distill.terms.spec import TermSpec


class Entropy(Term):
    """`entropy`: the mean over pixels of -sum(p log p) / log C, of the student's own probabilities at the label's size.

    It reads no label and no target: pixels without a label count as others do, pixels that show no image do not. It
    keeps several tensors of label size times classes.

    Args:
        align_corners: whether the student's own final resize aligns corners.

    Default weight 0.001.
    Source: Vu et al. 2019 (ADVENT), arXiv 1811.12833, equation 3, divided by log C as in the authors' code.
    """

    default_weight = 0.001
    reads_shown = True

    def __init__(self, spec: TermSpec, targets: TermTargets, *, align_corners: bool = False) -> None:
        super().__init__(spec, targets)
        self.student_align_corners = align_corners

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        logits_BCHW = resize(wide(batch.logits), batch.size, self.student_align_corners)
        log_BCHW = logits_BCHW.log_softmax(1)
        entropy_BHW = -(log_BCHW.exp() * log_BCHW).sum(1) / math.log(logits_BCHW.shape[1])
        if batch.shown is not None:
            entropy_BHW = torch.where(batch.shown, entropy_BHW, 0)
        return divide(entropy_BHW.sum(), self.count(batch) if count is None else count)

    def count(self, batch: TermBatch) -> Tensor:
        """The number of pixels that show the image, 0-dimensional."""
        like = wide(batch.logits)
        if batch.shown is None:
            return like.new_full((), len(like) * batch.size[0] * batch.size[1])
        return batch.shown.sum().to(like.dtype)
