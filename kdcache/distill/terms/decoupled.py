"""Decoupled distillation: the target class apart from all others."""

import torch
from torch import Tensor

from kdcache.distill.terms.base import TermBatch, TermTargets
from kdcache.distill.terms.on_cells import OnCells, divergence, mean_of, seen_on_cells
from kdcache.distill.terms.spec import TermSpec
from kdcache_kernels.target_cells import labels_at_centres


class Decoupled(OnCells):
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

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        assert batch.target is not None  # by `reads_target`; all classes are kept, by `check_terms`
        seen = seen_on_cells(self, batch, batch.logits, batch.target.values)
        target_B1hw = _target_class(batch.labels, seen.teacher)
        log_t, log_s = (_split(x, target_B1hw) for x in (seen.teacher, seen.student))
        tckd_Bhw, nckd_Bhw = (divergence(p, q).sum(1) for p, q in zip(log_t, log_s, strict=True))
        total = ((self.alpha * tckd_Bhw + self.beta * nckd_Bhw) * seen.cells.weight).sum()
        count = seen.cells.counted.sum() if count is None else count
        return self.temperature**2 * mean_of(total, count, seen.spoilt, batch.logits)


def _target_class(labels_BHW: Tensor | None, teacher_BChw: Tensor) -> Tensor:
    """(B, 1, h, w) int64: the label at the centre of each cell; without one the teacher's first best class."""
    best_B1hw = teacher_BChw.argmax(1, keepdim=True)
    if labels_BHW is None:
        return best_B1hw
    C, h, w = teacher_BChw.shape[1:]
    label_B1hw = labels_at_centres(labels_BHW, (h, w))[:, None].long()
    return torch.where((label_B1hw >= 0) & (label_B1hw < C), label_B1hw, best_B1hw)


def _split(logits_BChw: Tensor, target_B1hw: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, rest), and of the classes of the rest among themselves (the target's is -1e30)."""
    C = logits_BChw.shape[1]
    is_target_BChw = torch.arange(C, device=logits_BChw.device)[:, None, None] == target_B1hw
    # Both relative to the largest of the rest: with large logits in it, logsumexp would be rounded as these are.
    top_B1hw = logits_BChw.detach().masked_fill(is_target_BChw, -torch.inf).amax(1, keepdim=True)
    logits_BChw = logits_BChw - (top_B1hw if C > 1 else 0)
    rest_BChw = logits_BChw.masked_fill(is_target_BChw, -1e30)
    target_Bhw = torch.where(is_target_BChw, logits_BChw, 0).sum(1)
    pair_B2hw = torch.stack([target_Bhw, rest_BChw.logsumexp(1)], 1).log_softmax(1)
    return pair_B2hw, rest_BChw.log_softmax(1)
