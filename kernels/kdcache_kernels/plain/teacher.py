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
    """Return the maximum over the classes: (B, P) for values (B, C, P), or (B,) for values (B, C)."""
    while x_BCP.dim() == 3 and x_BCP.shape[2] < FEW_PIXELS and x_BCP.numel() > FEW_ELEMENTS and x_BCP.shape[1] > 1:
        half = (x_BCP.shape[1] + 1) // 2
        x_BCP = torch.maximum(x_BCP[:, :half], x_BCP[:, -half:])
    return x_BCP.amax(1)


class Softmax(NamedTuple):
    """Logits and their probabilities at every pixel. P is the number of pixels of an image.

    If each image is a single pixel, the shapes may lack the last axis, of size P. The logarithms of the
    probabilities are not stored, because computing them costs as much as the softmax.

    Attributes:
        logits, p: (B, C, P), logits divided by the temperature, and their probabilities.
        total: (B, P), the logarithm of the sum of the exponentials of the logits.
    """

    logits: Tensor
    p: Tensor
    total: Tensor

    @classmethod
    def of(cls, logits_BCP: Tensor, *, centred: bool = False) -> "Softmax":
        """Compute the softmax of (B, C, P) logits over the classes.

        `centred` says that the logits have a maximum of 0 in each pixel, which saves time.
        """
        p_BCP = logits_BCP.softmax(1)
        total_BP = largest(p_BCP).log_().neg_()
        return cls(logits_BCP, p_BCP, total_BP if centred else total_BP.add_(largest(logits_BCP)))


class Teacher(Protocol):
    """The interface of a teacher's distribution over the classes at every pixel."""

    def divergence(self, student: Softmax) -> Tensor:
        """Return KL(teacher || student) in nats at every pixel, (B, P) for images of P pixels."""

    def gradient(self, p_BCP: Tensor, factor_B1P: Tensor) -> Tensor:
        """Overwrite `p_BCP`, the student's probabilities p, with (p - q) * factor, and return it.

        q are the teacher's probabilities, (B, C, P). `factor_B1P` has one factor per pixel, (B, 1, P).
        """


class DenseTeacher(NamedTuple):
    """A teacher's distribution over the classes at every pixel, with a separate probability for every class.

    Attributes:
        softmax: the teacher's logits and probabilities.
    """

    softmax: Softmax

    def divergence(self, student: Softmax) -> Tensor:
        """Return KL(teacher || student) in nats at every pixel, (B, P) for images of P pixels."""
        logits_BCP, q_BCP, total_BP = self.softmax
        cross_BP = (logits_BCP - student.logits).mul_(q_BCP).sum(1)
        return cross_BP + (student.total - total_BP)

    def gradient(self, p_BCP: Tensor, factor_B1P: Tensor) -> Tensor:
        """Overwrite `p_BCP`, the student's probabilities p, with (p - q) * factor, and return it.

        q are the teacher's probabilities, (B, C, P). `factor_B1P` has one factor per pixel, (B, 1, P).
        """
        return p_BCP.sub_(self.softmax.p).mul_(factor_B1P)


class SparseTeacher(NamedTuple):
    """A teacher's distribution from top-k logits, for images of one pixel. All dropped classes share one probability.

    Attributes:
        ids: (B, k) int64 ids of the kept classes.
        log_q: (B, k) logarithms of the kept classes' probabilities.
        rest: (B, 1) logarithm of the probability of each dropped class.
        missing: C - k, the number of dropped classes.
    """

    ids: Tensor
    log_q: Tensor
    rest: Tensor
    missing: int

    @classmethod
    def of(cls, target: PackedTarget, temperature: float) -> "SparseTeacher":
        """Compute the teacher's distribution at a temperature from a packed target with one pixel per image.

        The target has values (B, k, 1, 1), all of them finite, and k is less than C.
        """
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
        """Return KL(teacher || student) of each image, which is a single pixel: (B,) in nats, over all C classes.

        `student` is the student's softmax without the axis of pixels: `logits` and `p` are (B, C), `total` is (B,).
        """
        kept_Bk, rest_B = student.logits.gather(1, self.ids), self.rest[:, 0]
        others_B = student.logits.sum(1) - kept_Bk.sum(1)
        of_kept_B = (self.log_q.exp() * (self.log_q - kept_Bk + student.total[:, None])).sum(1)
        return of_kept_B + rest_B.exp() * (self.missing * (rest_B + student.total) - others_B)

    def gradient(self, p_BCP: Tensor, factor_B1P: Tensor) -> Tensor:
        """Overwrite `p_BCP`, the student's probabilities p, with (p - q) * factor, and return it.

        q are the teacher's probabilities. Each image is a single pixel, so tensors lack the axis of pixels that the
        arguments' names end with: `p_BCP` is (B, C), and `factor_B1P` is (B, 1).
        """
        rest_B1 = self.rest.exp()
        gradient_BC = p_BCP.sub_(rest_B1).mul_(factor_B1P)
        return gradient_BC.scatter_add_(1, self.ids, (rest_B1 - self.log_q.exp()) * factor_B1P)
