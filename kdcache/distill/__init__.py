"""Losses of a student. Tensors in, tensors out: no store, no data.

    loss.py      cross-entropy beside KL, fused, and what comes beside them
    terms/       the other terms
    gate.py      where the teacher is listened to
    batch.py     a batch: pixels, labels and targets by name
    counts.py    what its parts divide by
    target.py    a teacher's outputs of one head
    checks.py    what must hold of a batch before a loss looks at it

A store, or anything like one, says what its targets look like.
"""

from kdcache.distill.batch import SEGMENTATION, Batch
from kdcache.distill.counts import Counts
from kdcache.distill.gate import Gate, GateSpec, parse_gate
from kdcache.distill.loss import DistillLoss, Losses
from kdcache.distill.target import Target, TargetFormat
from kdcache_kernels import KernelError
from kdcache_kernels.ops import choose_implementation

__all__ = [
    "SEGMENTATION",
    "Batch",
    "Counts",
    "DistillLoss",
    "Gate",
    "GateSpec",
    "KernelError",
    "Losses",
    "Target",
    "TargetFormat",
    "choose_implementation",
    "parse_gate",
]
