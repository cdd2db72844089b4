"""Distillation loss kernels for segmentation: from low-resolution logits to a loss at label resolution.

This package knows only tensors: no cache, no models, no command line, and nothing of kdcache. `distill_loss` is the
loss, and `relation_loss` another one, on the target's cells. `pack` and `densify` convert targets to and from their
stored form, `choose_k` chooses how many classes it must keep, and `target_argmax_confidence` gives classes and
probabilities for gates and audits. Everything runs on the CPU and on CUDA. Importing it imports torch, and neither
Triton nor numba.

    parts = distill_loss(student_logits, labels, target, kl_weight=1.0, temperature=2.0)
    parts.loss.backward()
"""

from typing import TYPE_CHECKING

from .choose import choose_k, gradient_error
from .errors import KernelError, ShapeError, ValueRangeError
from .on_cells.problem import average_moments
from .on_cells.relations import relation_loss, relation_moments
from .ops import (
    IMPLEMENTATIONS,
    ReferenceWarning,
    densify,
    distill_denominators,
    distill_loss,
    pack,
    target_argmax_confidence,
)
from .problem import LossProblem
from .reference import Denominators, LossParts, distill_loss_reference
from .topk import LOGIT_LIMIT, PackedTarget

__all__ = [
    "IMPLEMENTATIONS",
    "LOGIT_LIMIT",
    "Denominators",
    "KernelError",
    "LossParts",
    "LossProblem",
    "PackedTarget",
    "ReferenceWarning",
    "ShapeError",
    "ValueRangeError",
    "average_moments",
    "choose_k",
    "densify",
    "distill_denominators",
    "distill_loss",
    "distill_loss_reference",
    "gradient_error",
    "pack",
    "relation_loss",
    "relation_moments",
    "target_argmax_confidence",
]

_REMOVED = {
    "PastedTarget": "Call distill_loss for each target and add the losses.",
    "channel_loss": "Use the term cwd of kdcache, which is plain PyTorch.",
    "decoupled_loss": "Use the term dkd of kdcache, which is plain PyTorch.",
}

if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name):
        """Raise an ImportError with the replacement of a removed name: `from` hides an AttributeError's message."""
        if name in _REMOVED:
            raise ImportError(f"kdcache_kernels.{name} was removed. Fix: {_REMOVED[name]}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
