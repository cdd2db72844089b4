"""A teacher's outputs of one head for a batch, packed as in a cache."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kdcache_kernels import PackedTarget


class TargetFormat(Protocol):
    """The facts about a cache that are needed to read its targets. An open cache has them."""

    @property
    def num_classes(self) -> int:
        """The number of classes."""

    @property
    def view_size(self) -> tuple[int, int]:
        """The (H, W) of the views."""

    @property
    def align_corners(self) -> bool:
        """Whether the teacher's resize aligns corners."""


@dataclass(frozen=True)
class Target:
    """Packed logits of a batch at native stride, or values of a regression. A single sample has no B. A pytree.

    >>> import kdcache
    >>> cache = kdcache.open_cache("streets.zarr")
    >>> batch = next(iter(torch.utils.data.DataLoader(kdcache.CacheDataset(cache), batch_size=2)))
    >>> batch.target.dense(cache, torch.float32).shape
    torch.Size([2, 7, 12, 16])

    Attributes:
        values: (B, k, h, w) float16, logit minus the pixel's maximum over classes. With labels as targets they are
            float32 or float64 log-probabilities. A regression has (B, channels, h, w) float16 or float32 in the head's
            unit, without indices and tail. Values that are not finite are unknown.
        indices: (B, k, h, w) uint8 or uint16 class ids, or None if all classes are kept.
        tail: (B, h, w) float16 log-odds of the mass outside the top k, or None if all classes are kept.
    """

    values: Tensor
    indices: Tensor | None = None
    tail: Tensor | None = None

    def packed(self, form: TargetFormat) -> PackedTarget:
        """Return the target in the form of the kernels."""
        return PackedTarget(
            values=self.values.to(torch.float16),
            indices=self.indices,
            tail=self.tail,
            num_classes=form.num_classes,
            view_size=form.view_size,
            align_corners=form.align_corners,
        )

    def dense(self, form: TargetFormat, dtype: torch.dtype) -> Tensor:
        """Return the logits (B, C, h, w) of all classes, up to a constant per pixel."""
        if self.values.dtype != torch.float16:
            return self.values.to(dtype)
        return self.packed(form).densify(dtype)


pytree.register_dataclass(Target)
