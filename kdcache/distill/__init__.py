"""Losses of a student. Tensors in, tensors out: no store, no data.

    loss.py           cross-entropy next to KL, fused, and what comes next to them
    streams.py        the loss of a training step: the sum over its streams
    terms/            the other terms
    gate.py           weights per pixel of the teacher's terms
    depth.py          losses between maps of depth
    balance.py        the balance of several heads' losses
    masks.py          which pixels the teacher's terms count
    outputs.py        a student's outputs as a loss reads them, and what it makes of them
    batch.py          a batch: pixels, labels and targets by name
    counts.py         the denominators of its parts
    target.py         a teacher's outputs of one head
    label_targets.py  labels in the teacher's place
    merged_targets.py a store's targets as those of other classes
    checks.py         checks of a batch before a loss reads it

The format of the targets comes from a store, or from anything with the attributes of `TargetFormat`.
"""

from kdcache.distill.balance import Balance, FixedBalance, UncertaintyBalance
from kdcache.distill.batch import SEGMENTATION, Batch, Streams, pixels_of, rows_of
from kdcache.distill.counts import Counts, average_counts, mean_counts
from kdcache.distill.gate import Gate, GateSpec, parse_gate
from kdcache.distill.label_targets import LabelTargets
from kdcache.distill.loss import DistillLoss
from kdcache.distill.merged_targets import MergedTargets
from kdcache.distill.outputs import Losses
from kdcache.distill.streams import Criterion
from kdcache.distill.target import Target, TargetFormat
from kdcache_kernels import KernelError
from kdcache_kernels.ops import choose_implementation

__all__ = [
    "SEGMENTATION",
    "Balance",
    "Batch",
    "Counts",
    "Criterion",
    "DistillLoss",
    "FixedBalance",
    "Gate",
    "GateSpec",
    "KernelError",
    "LabelTargets",
    "Losses",
    "MergedTargets",
    "Streams",
    "Target",
    "TargetFormat",
    "UncertaintyBalance",
    "average_counts",
    "choose_implementation",
    "mean_counts",
    "parse_gate",
    "pixels_of",
    "rows_of",
]
