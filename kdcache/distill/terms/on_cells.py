"""The base of the terms that one fused operation computes on the target's cells."""

from typing import Any

import torch
from torch import Tensor

from kdcache.distill.terms.base import Term, TermBatch, TermTargets
from kdcache.distill.terms.spec import TermSpec
from kdcache_kernels import densify
from kdcache_kernels.topk import compute_dtype


class OnCells(Term):
    """A term of logits, by an operation of `kdcache_kernels`.

    Args:
        impl: which kernels compute it (see `kdcache_kernels.relation_loss`).
    """

    def __init__(
        self, spec: TermSpec, targets: TermTargets, arrays: tuple[str, ...] = (), *, impl: str = "auto"
    ) -> None:
        super().__init__(spec, targets, arrays)
        self.impl = impl

    def prepare(self, batch: TermBatch) -> None:
        if batch.target is not None:
            self.note_resize(batch.logits, batch.target.values)

    def both_raw(self, batch: TermBatch) -> tuple[Tensor, Tensor]:
        """Student's and teacher's logits of all classes, each on its own grid."""
        target = batch.target
        assert target is not None  # by `reads_target`
        if target.indices is None:
            return batch.logits, target.values
        num_classes, dtype = self.targets.num_classes, compute_dtype(batch.logits.dtype)
        impl = family_for(dtype, self.impl)
        return batch.logits, densify(target.values, target.indices, target.tail, num_classes, dtype, impl=impl)

    def options(self, batch: TermBatch) -> dict[str, Any]:
        """The arguments that all operations have beside the logits and the weights of their parts."""
        return options_of(self, batch, family_for(batch.logits.dtype, self.impl))


def family_for(dtype: torch.dtype, impl: str) -> str:
    """Which kernels compute logits of a dtype: of float64 the reference."""
    return "reference" if dtype == torch.float64 else impl


def options_of(term: Term, batch: TermBatch, impl: str) -> dict[str, Any]:
    """What every operation on cells is given of a batch."""
    return {
        "view_size": term.targets.view_size,
        "size": batch.size,
        "temperature": term.temperature,
        "window_B4": batch.window,
        "flip_B": batch.flip,
        "pixel_weight_BHW": batch.pixel_weight,
        "counted_BHW": batch.counted,
        "impl": impl,
    }
