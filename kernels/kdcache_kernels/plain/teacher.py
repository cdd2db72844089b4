"""A student's divergence from the teacher in each pixel, and its gradient.

A target with every class, or a resampled one, is dense. A target of one cell with the top k is not densified: the
other classes share one probability, so k + 1 numbers suffice.

Legend: B batch, C classes, k kept classes, P pixels of an image, an axis that images of one pixel do not have.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..topk import LOGIT_LIMIT, PackedTarget

FEW_PIXELS, FEW_ELEMENTS = 64, 16384
"""PyTorch takes 10 times as long per element for a maximum over the middle axis if the last one is shorter than this.
Smaller tensors are not worth halving."""


def largest(x_BCP: Tensor) -> Tensor:
    """Return the maximum over the classes, (B, P). For few pixels, halves of the classes are compared first."""
    while x_BCP.dim() == 3 and x_BCP.shape[2] < FEW_PIXELS and x_BCP.numel() > FEW_ELEMENTS and x_BCP.shape[1] > 1:
        half = (x_BCP.shape[1] + 1) // 2
        x_BCP = torch.maximum(x_BCP[:, :half], x_BCP[:, -half:])
    return x_BCP.amax(1)


class Softmax(NamedTuple):
    """A distribution. No logarithm of every probability is taken, which would cost as much as the softmax.

    Attributes:
        logits, p: (B, C, P).
        total: (B, P), the logarithm of the sum of the exponentials of the logits.
    """

    logits: Tensor
    p: Tensor
    total: Tensor

    @classmethod
    def of(cls, logits_BCP: Tensor, *, centred: bool = False) -> "Softmax":
        """Take the softmax of logits. Centred ones have a maximum of 0 in each pixel."""
        p_BCP = logits_BCP.softmax(1)
        total_BP = largest(p_BCP).log_().neg_()
        return cls(logits_BCP, p_BCP, total_BP if centred else total_BP.add_(largest(logits_BCP)))


class Teacher(Protocol):
    """A distribution in every pixel."""

    def divergence(self, student: Softmax) -> Tensor:
        """Return KL(teacher || student) in nats, (B, P)."""

    def gradient(self, p_BCP: Tensor, factor_B1P: Tensor) -> Tensor:
        """Return (p - q) * factor, written over p."""


class DenseTeacher(NamedTuple):
    """A distribution with a separate probability for every class."""

    softmax: Softmax

    def divergence(self, student: Softmax) -> Tensor:
        """Return KL(teacher || student) in nats, (B, P), over all classes."""
        logits_BCP, q_BCP, total_BP = self.softmax
        cross_BP = (logits_BCP - student.logits).mul_(q_BCP).sum(1)
        return cross_BP + (student.total - total_BP)

    def gradient(self, p_BCP: Tensor, factor_B1P: Tensor) -> Tensor:
        """Return (p - q) * factor, written over p."""
        return p_BCP.sub_(self.softmax.p).mul_(factor_B1P)


class SparseTeacher(NamedTuple):
    """A distribution of single kept classes and one probability for all others, for images of one pixel.

    Attributes:
        ids: (B, k) int64 class ids.
        log_q, rest: (B, k) and (B, 1) logarithms of the probability of a kept class, and of one of the others.
        missing: C - k.
    """

    ids: Tensor
    log_q: Tensor
    rest: Tensor
    missing: int

    @classmethod
    def of(cls, target: PackedTarget, temperature: float) -> "SparseTeacher":
        """Make one from a target of one cell with finite values."""
        assert target.indices is not None
        assert target.tail is not None
        missing = target.num_classes - target.k
        values_Bk = target.values.flatten(1).double()
        fill_B1 = values_Bk.logsumexp(1, keepdim=True) + target.tail.double().flatten(1) - math.log(missing)
        fill_B1 = fill_B1.clamp_(-LOGIT_LIMIT, LOGIT_LIMIT) / temperature
        values_Bk /= temperature
        total_B1 = torch.cat((values_Bk, fill_B1 + math.log(missing)), 1).logsumexp(1, keepdim=True)
        log_q_Bk, rest_B1 = (values_Bk - total_B1).float(), (fill_B1 - total_B1).float()
        return cls(target.indices.flatten(1).long(), log_q_Bk, rest_B1, missing)

    def divergence(self, student: Softmax) -> Tensor:
        """Return KL(teacher || student) in nats, (B,), from the kept classes and the rest."""
        kept_Bk, rest_B = student.logits.gather(1, self.ids), self.rest[:, 0]
        others_B = student.logits.sum(1) - kept_Bk.sum(1)
        of_kept_B = (self.log_q.exp() * (self.log_q - kept_Bk + student.total[:, None])).sum(1)
        return of_kept_B + rest_B.exp() * (self.missing * (rest_B + student.total) - others_B)

    def gradient(self, p_BCP: Tensor, factor_B1P: Tensor) -> Tensor:
        """Return (p - q) * factor, written over p."""
        rest_B1 = self.rest.exp()
        gradient_BC = p_BCP.sub_(rest_B1).mul_(factor_B1P)
        return gradient_BC.scatter_add_(1, self.ids, (rest_B1 - self.log_q.exp()) * factor_B1P)
