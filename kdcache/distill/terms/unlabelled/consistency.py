"""Consistency: what is predicted for an image is to stay the same when its colours change."""

import torch
from torch import Tensor, nn

from kdcache.distill.batch import PseudoLabels
from kdcache.distill.terms.base import Term, TermBatch, divide, wide
from kdcache.distill.terms.unlabelled.pseudo import Pseudo
from kdcache_kernels import PackedTarget, target_argmax_confidence
from kdcache_kernels.window import Size

_LOWEST = -60000.0
"""What logits are cut to before they become float16."""
_WHOSE = {
    "student": "the student's own, by one more forward of every step without gradient",
    "ema": "those of its moving average (--ema), by one more forward of every step without gradient",
    "store": "those of the store's teacher",
}
_DIVIDED = {
    "all": "the confident pixels, divided by all",
    "share": "all pixels, times the share of the confident ones",
    "kept": "the confident pixels, divided by their number",
}


class Consistency(Pseudo):
    """`consistency`: cross-entropy of the strong view with argmax p where max p >= threshold, p of the weak view.

    The strong view is the student's image, the weak view the same pixels before the colour jitter, so that both have
    the same geometry and their pixels correspond one to one. p is of the student itself or of its moving average, each
    in eval mode and without gradient (`Batch.pseudo`); or of a stored teacher. Pixels without a label count as others
    do, those of a replayed view that show no image do not. `normalise` and `quantile` are as of `Pseudo`: with a
    quantile every class of the batch has a threshold of its own, so that sure classes do not crowd out the others.
    Gates weigh a stored teacher's pixels alone.

    Default weight 1, threshold 0.968, all.
    Source: Sohn et al. 2020 (FixMatch), arXiv 2001.07685, equation 4; the threshold, and `share`, Tranheden et al. 2021
    (DACS), arXiv 2007.08702; the moving average as teacher Tarvainen and Valpola 2017, arXiv 1703.01780; thresholds by
    class Zou et al. 2018 (CBST), arXiv 1810.07911, there of the whole data set and here of each batch.
    """

    default_threshold = 0.968
    default_normalise = "all"
    reads_shown = True

    @property
    def by(self) -> str:
        """Who makes the pseudo labels: student, ema or store."""
        return self.spec.by or "student"

    @property
    def scheduled(self) -> bool:
        return True

    def describe(self) -> str:
        return (
            f"{self.kind}: pseudo labels of the weak view, without jitter, are {_WHOSE[self.by]}; learnt are "
            f"{_DIVIDED[self.normalise]}; confident is "
            + (f"{self.threshold:g}" if self.quantile is None else f"the surest {self.quantile:g} of each class")
        )

    def confident_and_counted(self, batch: TermBatch) -> tuple[Tensor, Tensor]:
        """The number of confident pixels, and of counted ones, float64."""
        _, confident_BHW, counted_BHW = self._confident(batch)
        return confident_BHW.sum(dtype=torch.float64), counted_BHW.sum(dtype=torch.float64)

    def _best(self, batch: TermBatch) -> tuple[Tensor, Tensor]:
        if self.by == "store":
            return super()._best(batch)
        own = batch.pseudo[self.by]
        return own.label, own.confidence if batch.shown is None else own.confidence.masked_fill(~batch.shown, 0)

    def _pixel_weight(self, batch: TermBatch) -> Tensor | None:
        return batch.pixel_weight if self.by == "store" else None


class Confident(Term):
    """`confident`: the share of the counted pixels whose pseudo label is confident; logged, and no part of the loss."""

    measured = True

    def __init__(self, consistency: Consistency) -> None:
        super().__init__(consistency.spec, consistency.targets)
        self.kind, self.weight = "confident", consistency.weight
        self._consistency = (consistency,)  # in a tuple: it is a module of the loss already

    @property
    def teaches_student(self) -> bool:
        return False

    @torch.no_grad()
    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        confident, counted = self._consistency[0].confident_and_counted(batch)
        return divide(confident, counted if count is None else count.double()).to(wide(batch.logits).dtype)

    def count(self, batch: TermBatch) -> Tensor:
        """The counted pixels, float64."""
        return self._consistency[0].confident_and_counted(batch)[1]


@torch.no_grad()
def pseudo_labels(logits_BChw: Tensor, size: Size, *, align_corners: bool = False, impl: str = "auto") -> PseudoLabels:
    """The best class of each pixel of an image of `size`, and its probability, by a model's logits of the whole image.

    Memory: the results, and the logits once in float16.
    """
    logits_BChw = wide(logits_BChw)
    values = (logits_BChw - logits_BChw.amax(1, keepdim=True)).clamp_min(_LOWEST).half().contiguous()
    packed = PackedTarget(values, None, None, values.shape[1], size, align_corners)
    return PseudoLabels(*target_argmax_confidence(packed, size, impl=impl))


def labellers(criterion: nn.Module) -> tuple[str, ...]:
    """Who makes pseudo labels of weak views for the terms of a loss, by a forward in every step: student, ema."""
    found = (term.by for term in criterion.modules() if isinstance(term, Consistency) and term.weight > 0)
    return tuple(dict.fromkeys(by for by in found if by != "store"))
