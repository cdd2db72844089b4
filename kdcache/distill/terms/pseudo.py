"""Hard pseudo labels: cross-entropy with the teacher's best class where it is sure."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill.terms.base import Term, TermBatch, TermTargets, divide, wide
from kdcache.distill.terms.cells import resize
from kdcache.distill.terms.spec import TermSpec
from kdcache_kernels import distill_loss, target_argmax_confidence

NONE = -1
"""The pseudo label of a pixel without one."""


class Pseudo(Term):
    """`pseudo`: cross-entropy with argmax t where max softmax(t) >= threshold, at the label's size.

    Mean over the pixels that have a pseudo label. With `quantile` instead of a threshold, the most confident share of
    each class's pixels has one: of the counted pixels of this process's batch that the teacher gives to the class.
    Pixels that do not count (outside the view, grey, void) have none.

    Default weight 1, threshold 0.7: a gradient of 1 to 1.2 of CE's.
    Source: Lee 2013, "Pseudo-Label"; the quantile per class: Zou et al. 2018, arXiv 1810.07911.
    """

    default_threshold = 0.7

    def __init__(
        self,
        spec: TermSpec,
        targets: TermTargets,
        arrays: tuple[str, ...] = (),
        *,
        align_corners: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(spec, targets, arrays)
        self.threshold = self.default_threshold if spec.threshold is None else spec.threshold
        self.quantile = spec.quantile
        self.student_align_corners = align_corners
        self.impl = impl

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        pseudo_BHW = self.labels(batch)
        count = _labelled(pseudo_BHW) if count is None else count
        if batch.pixel_weight is None:
            return distill_loss(
                batch.logits,
                pseudo_BHW,
                ignore_index=NONE,
                ce_denominator=count,
                align_corners=self.student_align_corners,
                impl="reference" if batch.logits.dtype == torch.float64 else self.impl,
            ).loss
        # The fused loss takes no weight per labelled pixel.
        logits_BCHW = resize(wide(batch.logits), batch.size, self.student_align_corners)
        ce_BHW = F.cross_entropy(logits_BCHW, pseudo_BHW.long(), ignore_index=NONE, reduction="none")
        weight_BHW = torch.where(pseudo_BHW != NONE, batch.pixel_weight.detach().to(ce_BHW.dtype), 0)
        return divide((ce_BHW * weight_BHW).sum(), count.to(ce_BHW.dtype))

    def count(self, batch: TermBatch) -> Tensor:
        """The pixels with a pseudo label, float64."""
        return _labelled(self.labels(batch))

    @torch.no_grad()
    def labels(self, batch: TermBatch) -> Tensor:
        """(B, H, W) int16 pseudo labels, NONE where the teacher is not sure enough."""
        assert batch.target is not None  # by `reads_target`
        argmax_BHW, confidence_BHW = target_argmax_confidence(
            batch.target.packed(self.targets), batch.size, batch.window, batch.flip, impl=self.impl
        )
        if batch.counted is not None:
            confidence_BHW = confidence_BHW.masked_fill(~batch.counted, 0)  # as outside the view
        if self.quantile is None:
            sure_BHW = confidence_BHW >= self.threshold
        else:
            sure_BHW = most_confident(argmax_BHW, confidence_BHW, self.quantile, self.targets.num_classes)
        return argmax_BHW.to(torch.int16).masked_fill(~sure_BHW, NONE)


def _labelled(pseudo_BHW: Tensor) -> Tensor:
    return (pseudo_BHW != NONE).sum().to(torch.float64)


def most_confident(argmax_BHW: Tensor, confidence_BHW: Tensor, share: float, num_classes: int) -> Tensor:
    """(B, H, W) bool: the most confident `share` of each class's pixels, rounded down; never one of confidence 0.

    One stable sort by class and confidence, whatever the data.
    """
    inside = (confidence_BHW > 0).flatten()
    group = torch.where(inside, argmax_BHW.flatten().long(), num_classes)  # what lies outside is a class of its own
    # The bits of float16 numbers above 0 are in the order of the numbers.
    bits = confidence_BHW.flatten().view(torch.int16).long()
    order = ((group << 16) - bits).argsort(stable=True)
    group = group[order]
    edges = torch.searchsorted(group, torch.arange(num_classes + 2, device=group.device))
    rank, size = torch.arange(group.numel(), device=group.device) - edges[group], edges.diff()[group]
    labelled = (rank < (share * size).floor()) & (group < num_classes)
    return torch.empty_like(labelled).scatter(0, order, labelled).view_as(argmax_BHW)
