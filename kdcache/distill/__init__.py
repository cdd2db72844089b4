"""Losses of a student. Tensors in, tensors out: no store, no data."""

from kdcache.distill.gate import Gate, GateSpec, parse_gate
from kdcache.distill.loss import DistillLoss, Losses
from kdcache.distill.target import Target, TargetFormat
from kdcache_kernels import KernelError
from kdcache_kernels.ops import choose_implementation

__all__ = [
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
