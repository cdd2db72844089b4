"""Decoupled distillation: the target class apart from all others."""

import torch
from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, TermTargets, grid_of
from kdcache.distill.terms.spec import TermSpec
from kdcache_kernels.window import Size


class Decoupled(Term):
    """`dkd`: T^2 * (alpha * TCKD + beta * NCKD), mean over cells.

    TCKD is the KL of (p, 1 - p), p the probability of the target class at temperature T; NCKD is the KL of the other
    classes among themselves. The target class is the label of the pixel at the cell's centre, and the teacher's best
    class where that is void or there is no label. Cells weigh by their share of counted pixels times the gate.

    Default weight 0.02, alpha 1, beta 8, temperature 4 (the paper's on CIFAR-100, with its T^2; nats per cell): a
    gradient of 1 to 1.3 of CE's. Published: 1. On ImageNet the authors take beta 0.5 and temperature 1; their code
    warms the weight up, over 20 of CIFAR's 240 epochs (`--distill-schedule warmup:N`).
    Source: Zhao et al. 2022, arXiv 2203.08679, equation 7.
    """

    default_weight = 0.02
    default_temperature = 4.0

    def __init__(self, spec: TermSpec, targets: TermTargets, arrays: tuple[str, ...] = ()) -> None:
        super().__init__(spec, targets, arrays)
        self.alpha = 1.0 if spec.alpha is None else spec.alpha
        self.beta = 8.0 if spec.beta is None else spec.beta

    def prepare(self, batch: TermBatch) -> None:
        if batch.target is not None:
            self.note_resize(batch.logits, batch.target.values)

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        student_BChw, teacher_BChw, cells = self.both_logits(batch)
        class_B1hw = target_class(batch.labels, teacher_BChw)
        is_target_BChw = torch.arange(self.targets.num_classes, device=class_B1hw.device)[:, None, None] == class_B1hw
        log_p, log_q = (_split(x / self.temperature, is_target_BChw) for x in (teacher_BChw, student_BChw))
        tckd_Bhw, nckd_Bhw = (_kl(p, q) for p, q in zip(log_p, log_q, strict=True))
        return self.temperature**2 * self.mean(self.alpha * tckd_Bhw + self.beta * nckd_Bhw, cells, count)


def target_class(labels_BHW: Tensor | None, teacher_BChw: Tensor) -> Tensor:
    """(B, 1, h, w) int64: the label at the centre of each cell, else the teacher's best class."""
    best_B1hw = teacher_BChw.argmax(1, keepdim=True)
    if labels_BHW is None:
        return best_B1hw
    label_B1hw = at_centres(labels_BHW, grid_of(teacher_BChw))[:, None].long()
    return torch.where(label_B1hw < teacher_BChw.shape[1], label_B1hw, best_B1hw)


def at_centres(labels_BHW: Tensor, grid: Size) -> Tensor:
    """(B, h, w): the pixel in which the centre of each cell lies."""
    rows, columns = (
        torch.arange(1, 2 * cells, 2, device=labels_BHW.device) * pixels // (2 * cells)
        for cells, pixels in zip(grid, labels_BHW.shape[1:], strict=True)
    )
    return labels_BHW[:, rows][:, :, columns]


def _split(logits_BChw: Tensor, is_target_BChw: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, rest), and of the classes of the rest among themselves (the target's is -1e30)."""
    rest_BChw = logits_BChw.masked_fill(is_target_BChw, -1e30)
    target_Bhw = torch.where(is_target_BChw, logits_BChw, 0).sum(1)
    pair_B2hw = torch.stack([target_Bhw, rest_BChw.logsumexp(1)], 1).log_softmax(1)
    return pair_B2hw, rest_BChw.log_softmax(1)


def _kl(log_p_BChw: Tensor, log_q_BChw: Tensor) -> Tensor:
    return (log_p_BChw.exp() * (log_p_BChw - log_q_BChw)).sum(1)
