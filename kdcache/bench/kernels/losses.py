"""The measured losses: our operation, and eager PyTorch with the same value and gradient.

Eager is the code of a user who has looked at a profile. Logits are cast and the teacher is divided by T at low
resolution (s*s times cheaper). Labels are int64, and masks, their sums and sampling positions exist beforehand. Both
sides of the KL are logarithms, and nothing is copied. (Upsampling z / T again instead of dividing the upsampled z was
14 % slower, a probability target for F.kl_div 13 %.)

Another loss is a further entry of LOSSES, and a kind of `shapes.KINDS` that names it.

Legend: B batch, C classes, H W label size, h w logits' own size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.bench.kernels.inputs import Inputs
from kdcache.bench.kernels.shapes import KINDS, Case
from kdcache_kernels import densify, distill_loss, relation_loss, target_argmax_confidence
from kdcache_kernels.on_cells.problem import EPS


class Targets(NamedTuple):
    """The teacher's logits, labels and settings for `eager_loss` and `eager_relations`, of a whole batch or one image.

    (H*, W*) is (H, W), or (h, w) for a loss on the teacher's cells (`Kind.on_cells`).

    Attributes:
        teacher: (B, C, h, w) float32 logits.
        labels: (B, H, W) int64.
        mask: (B, H*, W*) float32, 1 for pixels that count in the loss against the teacher, else 0. For cells, the share
            of each cell's area whose pixels count.
        grid: (B, H*, W*, 2) float32, where `grid_sample` samples the teacher, or None for whole views.
        class_weight: (C,) float32 for the cross-entropy, or None for weights of 1.
        ce_count, kl_count: 0-dimensional, the denominators of the cross-entropy and of the loss against the teacher.
        temperature: T.
        threshold: the least confidence of the teacher at which a pixel counts in the KL, 0 to 1, or None to count all.
        ignore_index: the label of void pixels.
    """

    teacher: Tensor
    labels: Tensor
    mask: Tensor
    grid: Tensor | None
    class_weight: Tensor | None
    ce_count: Tensor
    kl_count: Tensor
    temperature: float
    threshold: float | None
    ignore_index: int

    def image(self, index: int) -> "Targets":
        """Return the targets of image number `index` only. `ce_count` and `kl_count` still count the whole batch.

        The losses of all images then add up to the loss of the batch.
        """
        rows = slice(index, index + 1)
        return self._replace(
            teacher=self.teacher[rows],
            labels=self.labels[rows],
            mask=self.mask[rows],
            grid=None if self.grid is None else self.grid[rows],
        )


def targets_of(case: Case, inputs: Inputs) -> Targets:
    """Return the argument `targets` of `eager_loss` and `eager_relations`: tensors of `inputs`, settings of `case`."""
    return Targets(
        inputs.teacher,
        inputs.labels_int64,
        inputs.mask,
        inputs.grid,
        inputs.class_weight,
        inputs.ce_count,
        inputs.kl_count,
        case.temperature,
        KINDS[case.kind].threshold,
        case.shape.ignore_index,
    )


def our_loss(case: Case, inputs: Inputs, impl: str) -> Tensor:
    """Return CE + T^2 * KL of a case's inputs from `kdcache_kernels.distill_loss`, 0-dimensional and differentiable.

    If the case's kind has a threshold, the KL leaves out pixels where the teacher's confidence is lower. `impl` is the
    implementation, such as "auto".
    """
    kind, weight = KINDS[case.kind], None
    if kind.threshold is not None:
        size = case.shape.size
        _, confidence = target_argmax_confidence(inputs.target, size, inputs.window, inputs.flip, impl=impl)
        weight = (confidence >= kind.threshold).float()  # as `kdcache.distill.Gate` does
    return distill_loss(
        inputs.student,
        inputs.labels,
        inputs.target,
        kl_weight=1.0,
        temperature=case.temperature,
        class_weight=inputs.class_weight,
        ignore_index=case.shape.ignore_index,
        window_B4=inputs.window,
        flip_B=inputs.flip,
        pixel_weight_BHW=weight,
        distill_void=kind.trained,
        impl=impl,
    ).loss


def eager_loss(student_BChw: Tensor, targets: Targets) -> Tensor:
    """Return CE + T^2 * KL of the student's logits in eager PyTorch, the rival of `our_loss` with the same value.

    CE counts labelled pixels. KL multiplies each pixel by `targets.mask`, and leaves out pixels where the
    teacher's largest probability is below `targets.threshold`. Their denominators are `targets.ce_count`
    and `targets.kl_count`.
    """
    T, size = targets.temperature, targets.labels.shape[1:]
    teacher_BChw = targets.teacher if T == 1 else targets.teacher / T
    if student_BChw.shape[2:] == size == (1, 1):  # rows: softmax over the last axis is several times as fast
        logits_BCHW, teacher_BCHW = student_BChw.float().flatten(1), teacher_BChw.flatten(1)
        targets = targets._replace(labels=targets.labels.flatten(), mask=targets.mask.flatten())
    else:
        logits_BCHW = F.interpolate(student_BChw.float(), size, mode="bilinear", align_corners=False)
        if targets.grid is None:
            teacher_BCHW = F.interpolate(teacher_BChw, size, mode="bilinear", align_corners=False)
        else:
            teacher_BCHW = F.grid_sample(teacher_BChw, targets.grid, padding_mode="border", align_corners=False)
    log_q_BCHW = F.log_softmax(teacher_BCHW, 1)
    weight, ignore = targets.class_weight, targets.ignore_index
    if T == 1:
        log_p_BCHW = F.log_softmax(logits_BCHW, 1)
        ce = F.nll_loss(log_p_BCHW, targets.labels, weight, ignore_index=ignore, reduction="sum")
    else:
        log_p_BCHW = F.log_softmax(logits_BCHW / T, 1)
        ce = F.cross_entropy(logits_BCHW, targets.labels, weight, ignore_index=ignore, reduction="sum")
    mask_BHW = targets.mask
    if targets.threshold is not None:
        confidence_BHW = F.softmax(teacher_BCHW * T, 1).amax(1)
        mask_BHW = mask_BHW * (confidence_BHW.half() >= targets.threshold)
    kl_BHW = F.kl_div(log_p_BCHW, log_q_BCHW, reduction="none", log_target=True).sum(1)
    return ce / targets.ce_count + T * T * (kl_BHW * mask_BHW).sum() / targets.kl_count


def our_relations(case: Case, inputs: Inputs, impl: str) -> Tensor:
    """Return the relation loss of a case's inputs from `kdcache_kernels.relation_loss`, 0-dimensional, differentiable.

    A top-k target is first converted to logits of all classes, as in a training. `impl` is the implementation, such as
    "auto".
    """
    target = inputs.target
    dense = target.values
    if target.indices is not None:
        dense = densify(target.values, target.indices, target.tail, target.num_classes, impl=impl)
    return relation_loss(
        inputs.student,
        dense,
        view_size=target.view_size,
        size=case.shape.size,
        temperature=case.temperature,
        window_B4=inputs.window,
        flip_B=inputs.flip,
        impl=impl,
    )


def _on_cells(student_BChw: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return both sets of logits over the temperature, on the target's cells."""
    teacher_BChw = targets.teacher
    if targets.grid is not None:
        teacher_BChw = F.grid_sample(teacher_BChw, targets.grid, padding_mode="border", align_corners=False)
    return student_BChw.float() / targets.temperature, teacher_BChw / targets.temperature


def eager_relations(student_BChw: Tensor, targets: Targets) -> Tensor:
    """Return the relation loss of the student's logits in eager PyTorch, the rival of `our_relations`.

    Value and gradient are the same. The loss is T^2 * (inter + intra), with correlations of student and teacher
    probabilities at `targets.temperature` T. inter is the mean over the target's cells of 1 - the correlation over the
    classes. intra is the mean over the classes of 1 - the correlation over the cells. The mask of `targets` weights the
    cells in both.
    """
    T, weight_B1hw = targets.temperature, targets.mask[:, None]
    p_BChw, q_BChw = (F.softmax(x, 1) for x in _on_cells(student_BChw, targets))
    even = 1 / p_BChw.shape[1]
    inter_Bhw = 1 - _correlation(p_BChw - even, q_BChw - even, None, 1)
    p_mean, q_mean = ((x * weight_B1hw).sum((0, 2, 3), keepdim=True) / targets.kl_count for x in (p_BChw, q_BChw))
    share_B1hw = weight_B1hw / targets.kl_count
    intra_C = 1 - _correlation(p_BChw - p_mean.detach(), q_BChw - q_mean, share_B1hw, (0, 2, 3))
    return T * T * ((inter_Bhw * targets.mask).sum() / targets.kl_count + intra_C.mean())


def _correlation(a: Tensor, b: Tensor, share: Tensor | None, dims: int | tuple[int, ...]) -> Tensor:
    weighed_a, weighed_b = (a, b) if share is None else (a * share, b * share)
    st, ss, tt = (x.sum(dims) for x in (weighed_a * b, weighed_a * a, weighed_b * b))
    return st * torch.rsqrt((ss + EPS) * (tt + EPS))


@dataclass(frozen=True)
class Loss:
    """One measured loss, as kdcache and as eager PyTorch compute it.

    Attributes:
        ours: kdcache's loss, called with (case, inputs, impl).
        eager: the same in eager PyTorch, called with (student's logits, targets). `torch.compile` can compile it.
        by_image: True if the loss is a sum over images, so it can be computed image by image.
    """

    ours: Callable[[Case, Inputs, str], Tensor]
    eager: Callable[[Tensor, Targets], Tensor]
    by_image: bool = True


LOSSES = {
    "distill": Loss(our_loss, eager_loss),
    "dist": Loss(our_relations, eager_relations, by_image=False),
}
"""By `Kind.loss`."""


def loss_of(case: Case) -> Loss:
    """Return the entry of LOSSES that a case measures: the one named by the `loss` field of the case's kind."""
    return LOSSES[KINDS[case.kind].loss]
