"""A teacher's outputs of one head for a batch, packed as a store holds them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kdcache_kernels import PackedTarget


class TargetFormat(Protocol):
    """The facts about a store that reading its targets takes; an open cache is one."""

    @property
    def num_classes(self) -> int: ...
    @property
    def view_size(self) -> tuple[int, int]: ...
    @property
    def align_corners(self) -> bool: ...


@dataclass(frozen=True)
class Target:
    """Packed logits of a batch at native stride, or values of a regression; of a single sample, without B. A pytree.

    Attributes:
        values: (B, k, h, w) float16, logit minus the pixel's maximum over classes; float32 or float64 log-probabilities
            where labels stand in the teacher's place. Of a regression head (B, channels, h, w) float16 or float32 in
            the head's unit, without indices and tail; what is not finite is unknown.
        indices: (B, k, h, w) uint8 or uint16 class ids; None when all classes are kept.
        tail: (B, h, w) float16 log-odds of the mass outside the top k; None when all classes are kept.
    """

    values: Tensor
    indices: Tensor | None = None
    tail: Tensor | None = None

    def packed(self, form: TargetFormat) -> PackedTarget:
        """Return the target in the form that the kernels take."""
        return PackedTarget(
            values=self.values.to(torch.float16),
            indices=self.indices,
            tail=self.tail,
            num_classes=form.num_classes,
            view_size=form.view_size,
            align_corners=form.align_corners,
        )

    def dense(self, form: TargetFormat, dtype: torch.dtype) -> Tensor:
        """(B, C, h, w) logits of all classes, up to a constant per pixel."""
        if self.values.dtype != torch.float16:
            return self.values.to(dtype)
        return self.packed(form).densify(dtype)


pytree.register_dataclass(Target)
