"""Decoupled distillation: the target class apart from all others."""

from torch import Tensor

from kdcache.distill.terms.base import TermBatch, TermTargets
from kdcache.distill.terms.on_cells import OnCells
from kdcache.distill.terms.spec import TermSpec
from kdcache_kernels import decoupled_loss


class Decoupled(OnCells):
    """`dkd`: T^2 * (alpha * TCKD + beta * NCKD), mean over cells, in one operation.

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

    def __init__(
        self, spec: TermSpec, targets: TermTargets, arrays: tuple[str, ...] = (), *, impl: str = "auto"
    ) -> None:
        super().__init__(spec, targets, arrays, impl=impl)
        self.alpha = 1.0 if spec.alpha is None else spec.alpha
        self.beta = 8.0 if spec.beta is None else spec.beta

    def loss(self, batch: TermBatch, count: Tensor | None) -> Tensor:
        logits, options = self.both_raw(batch), self.options(batch)
        return decoupled_loss(*logits, batch.labels, **options, alpha=self.alpha, beta=self.beta, count=count)
