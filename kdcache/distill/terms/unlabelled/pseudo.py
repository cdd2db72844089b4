"""Hard pseudo labels: cross-entropy with the teacher's best class at confident pixels."""

import torch
from torch import Tensor, nn

from kdcache.distill.batch import PseudoLabels
from kdcache.distill.target import Target, TargetFormat
from kdcache.distill.terms.base import Term, TermBatch, TermSetup, divide, wide
from kdcache.settings import terms as specs
from kdcache_kernels import PackedTarget, distill_loss, target_argmax_confidence
from kdcache_kernels.window import Size

NONE = -1
"""The pseudo label of a pixel without one."""

_VALUES = 0x3C01
"""Float16 numbers from 0 to 1."""


class Pseudo(Term):
    """The loss term `pseudo`: cross-entropy with the teacher's best class, at pixels where the teacher is confident.

    The teacher is confident at a pixel if its largest probability there is at least `threshold`. With `quantile=0.3`
    instead, the 30 % most confident pixels of each class in this process's batch count as confident. Equal confidences
    are kept or dropped together.

    | normalise | pixels with a pseudo label | divided by |
    | --- | --- | --- |
    | `kept` | the confident pixels | the sum of the class weights of the confident pixels |
    | `all` | the confident pixels | the number of counted pixels (FixMatch) |
    | `share` | all counted pixels | the number of counted pixels, then times the share of confident pixels (DACS) |

    Pixels that are not counted have no pseudo label. Pasted pixels do not have one either, and do not count.

    Default weight 1, threshold 0.7, `normalise=kept`. The weighted term's gradient is 1 to 1.2 times the
    cross-entropy's.
    Source: Lee 2013, "Pseudo-Label"; the quantile per class: Zou et al. 2018, arXiv 1810.07911; FixMatch: Sohn et al.
        2020, arXiv 2001.07685, equation 4; the share: Tranheden et al. 2021, arXiv 2007.08702; Hoyer et al. 2022, arXiv
        2111.14887, with their code.
    """

    kind = "pseudo"
    class_weight: Tensor | None

    def __init__(self, spec: specs.PseudoLabels, setup: TermSetup) -> None:
        super().__init__(spec, setup)
        self.threshold, self.quantile, self.normalise = spec.threshold, spec.quantile, spec.normalise
        self.register_buffer("class_weight", setup.class_weight, persistent=False)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the cross-entropy with the pseudo labels, 0-dimensional.

        It is the sum over confident pixels, divided by `count`. With `normalise=share`, it is the mean over all counted
        pixels, times the share of confident ones.

        Args:
            batch: the batch, with the teacher's targets.
            count: the result of the method `count`, perhaps over several processes. None uses the batch's own.
        """
        with torch.no_grad():
            argmax_BHW, confident_BHW, counted_BHW = self._confident(batch)
            labelled_BHW = counted_BHW if self.normalise == "share" else confident_BHW
            pseudo_BHW = argmax_BHW.to(torch.promote_types(argmax_BHW.dtype, torch.int16)).masked_fill(
                ~labelled_BHW, NONE
            )
            if count is None and self.normalise != "kept":  # the labels that are kept are counted by the loss itself
                count = self._count(argmax_BHW, confident_BHW, counted_BHW)
        if count is not None and self.normalise == "share":
            confident, counted = count.unbind()
            count = torch.where(confident > 0, counted * counted / confident, 0)
        return distill_loss(
            batch.student.logits,
            pseudo_BHW,
            ignore_index=NONE,
            ce_denominator=count,
            class_weight=self.class_weight,
            ce_pixel_weight_BHW=self._pixel_weight(batch),
            align_corners=self.student_align_corners,
            impl="reference" if batch.student.logits.dtype == torch.float64 else self.impl,
        ).loss

    @torch.no_grad()
    def count(self, batch: TermBatch) -> Tensor:
        """Return the denominator of the loss on a batch, float64.

        With `normalise=kept` it is the sum of the class weights of the confident pixels, with `all` the number of
        counted pixels, each 0-dimensional. With `share` it is a tensor (2,): the numbers of confident and of counted
        pixels.
        """
        return self._count(*self._confident(batch))

    def _count(self, argmax_BHW: Tensor, confident_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
        """Return the result of `count`, given the result of `_confident`."""
        if self.normalise == "all":
            return _sum(counted_BHW)
        if self.normalise == "share":
            return torch.stack([_sum(confident_BHW), _sum(counted_BHW)])
        if self.class_weight is None:
            return _sum(confident_BHW)
        return _sum(torch.where(confident_BHW, self.class_weight[argmax_BHW.long()], 0))

    def _confident(self, batch: TermBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the most likely class of each pixel, and masks of confident and of counted pixels: (B, H, W) each."""
        argmax_BHW, confidence_BHW = self._best(batch)
        if self.quantile is None:
            confident_BHW = confidence_BHW >= self.threshold
        else:
            confident_BHW = most_confident(argmax_BHW, confidence_BHW, self.quantile, self.targets.num_classes)
        return argmax_BHW, confident_BHW, confidence_BHW > 0

    def _best(self, batch: TermBatch) -> tuple[Tensor, Tensor]:
        """Return the most likely class of each pixel, (B, H, W), and its probability, 0 if it does not count."""
        assert batch.rows.target is not None  # by `reads_target`
        argmax_BHW, confidence_BHW = target_argmax_confidence(
            batch.rows.target.packed(self.targets), batch.rows.size, batch.rows.window, batch.rows.flip, impl=self.impl
        )
        for mask_BHW in (batch.counted, batch.rows.own):
            if mask_BHW is not None:
                confidence_BHW = confidence_BHW.masked_fill(~mask_BHW, 0)  # as outside the view
        return argmax_BHW, confidence_BHW

    def _pixel_weight(self, batch: TermBatch) -> Tensor | None:
        """Return weights (B, H, W) of the pixels with a pseudo label, or None if all are 1."""
        return batch.pixel_weight


def confidence_of(target: Target, form: TargetFormat) -> tuple[Tensor, Tensor]:
    """Return the most likely class of each pixel and its probability at T = 1, (B, H, W) each, at the view's size.

    `form` is the format of the targets, such as an open cache. Classes are uint8 (int16 above 256 classes),
    probabilities float16.
    """
    argmax_BHW, confidence_BHW = target_argmax_confidence(target.packed(form), form.view_size)
    return argmax_BHW, confidence_BHW


def _sum(counted_BHW: Tensor) -> Tensor:
    return counted_BHW.sum(dtype=torch.float64)


def most_confident(argmax_BHW: Tensor, confidence_BHW: Tensor, share: float, num_classes: int) -> Tensor:
    """Return the bool mask (B, H, W) of the most confident pixels of each class.

    A class's threshold is the largest confidence that keeps at least `share` of the class's pixels. So equal
    confidences are kept or dropped together. A confidence of 0 is never kept.

    Args:
        argmax_BHW: the class of each pixel.
        confidence_BHW: float16 in 0..1, the probability of that class.
        share: the share of each class's pixels to keep, in 0..1.
        num_classes: the number of classes.
    """
    # The bits of float16 numbers above 0 are in the order of the numbers.
    class_N, value_N = argmax_BHW.flatten().long(), confidence_BHW.flatten().view(torch.int16).long()
    count_CV = torch.zeros(num_classes * _VALUES, dtype=torch.int32, device=class_N.device)
    count_CV.scatter_add_(0, class_N * _VALUES + value_N, torch.ones_like(value_N, dtype=torch.int32))
    count_CV = count_CV.view(num_classes, _VALUES)
    count_CV[:, 0] = 0
    below_CV = count_CV.cumsum(1, dtype=torch.int32) - count_CV
    counted_C1 = count_CV.sum(1, keepdim=True)
    # Values are kept from the highest on; what lies below a threshold is at most the rest.
    threshold_C = (counted_C1 - below_CV >= share * counted_C1.double()).sum(1) - 1
    return ((value_N >= threshold_C[class_N]) & (value_N > 0)).view_as(argmax_BHW)


_LOWEST = -60000.0
"""What logits are cut to before they become float16."""
_WHOSE = {
    "student": "the student, with one more forward without gradient in every step",
    "ema": "the student's moving average (--ema), with one more forward without gradient in every step",
    "store": "the cache's teacher",
}
_DIVIDED = {
    "all": "the sum over confident pixels, divided by the number of all pixels",
    "share": "the mean over all pixels, times the share of confident pixels",
    "kept": "the mean over confident pixels",
}


class Consistency(Pseudo):
    """The loss term `consistency`: cross-entropy of the strong view with confident pseudo labels from the weak view.

    The strong view is the student's image. The weak view has the same pixels before the colour jitter. `by` says who
    predicts the weak view: `student`, its moving average `ema`, or `store`, the cached teacher. Student and average
    predict in eval mode and without gradient. Pixels without a label count, but pixels outside the image do not.
    A pixel is confident if its largest probability is at least `threshold`, or in the top `quantile` of its class. The
    losses of confident pixels are added up. The sum is divided by their class weights (`normalise=kept`) or by the
    number of counted pixels (`all`). `share` takes the mean over all counted pixels, times the share of confident ones.
    Gates weigh the pixels only with `by=store`.

    Default weight 1, threshold 0.968, `normalise=all`.
    Source: Sohn et al. 2020 (FixMatch), arXiv 2001.07685, equation 4; the threshold, and `normalise=share`: Tranheden
        et al. 2021 (DACS), arXiv 2007.08702; the moving average as teacher: Tarvainen and Valpola 2017, arXiv
        1703.01780; quantiles by class: Zou et al. 2018 (CBST), arXiv 1810.07911, over the whole data set instead of
        each batch.
    """

    kind = "consistency"
    reads_shown = True

    def __init__(self, spec: specs.Consistency, setup: TermSetup) -> None:
        super().__init__(spec, setup)
        self.by = spec.by

    def labellers(self) -> tuple[str, ...]:
        """Return a tuple with the network that predicts the weak view: `student` or `ema`.

        The tuple is empty if the cached teacher predicts it.
        """
        return () if self.by == "store" else (self.by,)

    def companions(self) -> tuple[Term, ...]:
        """Return a tuple with one term, which logs the share of confident pixels."""
        return (Confident(self),)

    @property
    def scheduled(self) -> bool:
        """True, because `--distill-schedule` also scales this term."""
        return True

    def describe(self) -> str:
        """Return one line for the log: who makes the pseudo labels, how the loss is normalised, and the threshold."""
        return (
            f"{self.kind}: pseudo labels of the weak view (without jitter) come from {_WHOSE[self.by]}. The loss is "
            f"{_DIVIDED[self.normalise]}. Confident pixels have "
            + (
                f"a probability of at least {self.threshold:g}"
                if self.quantile is None
                else f"the highest probabilities, a share of {self.quantile:g} of each class"
            )
        )

    def confident_and_counted(self, batch: TermBatch) -> tuple[Tensor, Tensor]:
        """Return how many counted pixels have a confident pseudo label, and how many pixels count.

        Each is a 0-dimensional float64.
        """
        _, confident_BHW, counted_BHW = self._confident(batch)
        return confident_BHW.sum(dtype=torch.float64), counted_BHW.sum(dtype=torch.float64)

    def _best(self, batch: TermBatch) -> tuple[Tensor, Tensor]:
        if self.by == "store":
            return super()._best(batch)
        pseudo = batch.rows.pseudo[self.by]
        return pseudo.label, pseudo.confidence if batch.shown is None else pseudo.confidence.masked_fill(
            ~batch.shown, 0
        )

    def _pixel_weight(self, batch: TermBatch) -> Tensor | None:
        return batch.pixel_weight if self.by == "store" else None


class Confident(Term):
    """The share of counted pixels that have a confident pseudo label in the term `consistency`. It is only logged."""

    measured = True

    def __init__(self, consistency: Consistency) -> None:
        super().__init__(consistency.spec, consistency.setup)
        self.kind, self.weight = "confident", consistency.weight
        self._consistency = (consistency,)  # in a tuple: it is a module of the loss already

    @property
    def teaches_student(self) -> bool:
        """False, because the term is only logged."""
        return False

    @torch.no_grad()
    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        """Return the share of counted pixels whose pseudo label is confident, in 0..1, 0-dimensional.

        `count` is the denominator, 0-dimensional. None uses the batch's own number of counted pixels.
        """
        confident, counted = self._consistency[0].confident_and_counted(batch)
        return divide(confident, counted if count is None else count.double()).to(wide(batch.student.logits).dtype)

    def count(self, batch: TermBatch) -> Tensor:
        """Return the denominator of the share of confident pixels: all counted pixels, 0-dimensional float64."""
        return self._consistency[0].confident_and_counted(batch)[1]


@torch.no_grad()
def pseudo_labels(logits_BChw: Tensor, size: Size, *, align_corners: bool = False, impl: str = "auto") -> PseudoLabels:
    """Return the best class and its probability for each pixel of whole images, (B, H, W) each.

    Args:
        logits_BChw: a network's logits, on any grid.
        size: (H, W) of the images in pixels.
        align_corners: True if the network's final resize aligns corners.
        impl: the implementation of the kernels: `auto`, `triton`, `numba` or `reference`.
    Memory: the results, and the logits once in float16.
    """
    logits_BChw = wide(logits_BChw)
    values = (logits_BChw - logits_BChw.amax(1, keepdim=True)).clamp_min(_LOWEST).half().contiguous()
    packed = PackedTarget(values, None, None, values.shape[1], size, align_corners)
    return PseudoLabels(*target_argmax_confidence(packed, size, impl=impl))


def labellers(criterion: nn.Module) -> tuple[str, ...]:
    """Return the networks, `student`, `ema` or both, whose pseudo labels the loss's terms with a weight above 0 read.

    Each of these networks must predict the weak views in every step. Without such a term the result is ().
    """
    terms = (term for term in criterion.modules() if isinstance(term, Term) and term.weight > 0)
    return tuple(dict.fromkeys(by for term in terms for by in term.labellers()))
