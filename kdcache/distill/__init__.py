"""Losses of a student. Tensors in, tensors out: no store, no data."""

from kdcache.distill.loss import DistillLoss, KernelError, LossParts, Target, TargetFormat, choose_implementation

__all__ = ["DistillLoss", "KernelError", "LossParts", "Target", "TargetFormat", "choose_implementation"]
