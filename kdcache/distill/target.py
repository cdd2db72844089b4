"""A teacher's outputs of one head for a batch, packed as in a cache."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from kdcache_kernels import PackedTarget


class TargetFormat(Protocol):
    """The format of a cache's targets, as a loss needs it: `num_classes`, `view_size` and `align_corners`.

    This is an interface. An open cache implements it.
    """

    @property
    def num_classes(self) -> int:
        """The number of classes of the targets."""

    @property
    def view_size(self) -> tuple[int, int]:
        """The (H, W) of the views, in pixels."""

    @property
    def align_corners(self) -> bool:
        """True if the teacher's final resize aligns corners."""


@dataclass(frozen=True)
class Target:
    """The outputs of a teacher's head for a batch: packed logits at native stride, or a numeric head's values.

    A pytree.

    >>> import kdcache
    >>> cache = kdcache.open_cache("streets.zarr")
    >>> batch = next(iter(torch.utils.data.DataLoader(kdcache.CacheDataset(cache), batch_size=2)))
    >>> batch.target.dense(cache, torch.float32).shape
    torch.Size([2, 7, 12, 16])

    A single sample has no leading B.

    Attributes:
        values: logits (B, k, h, w) float16, each minus the largest logit of its pixel. Labels as targets are float32 or
            float64 log-probabilities instead. A numeric head has (B, channels, h, w) float16 or float32 in the head's
            unit. Values that are not finite are unknown.
        indices: (B, k, h, w) uint8 or uint16 class ids. None for a numeric head, or if all classes are kept.
        tail: (B, h, w) float16, the log-odds of the classes outside the top k. None for a numeric head, or if all
            classes are kept.
    """

    values: Tensor
    indices: Tensor | None = None
    tail: Tensor | None = None

    def packed(self, form: TargetFormat) -> PackedTarget:
        """Return the target as the kernels' `PackedTarget`.

        `form` is the format of the targets, such as an open cache.
        """
        return PackedTarget(
            values=self.values.to(torch.float16),
            indices=self.indices,
            tail=self.tail,
            num_classes=form.num_classes,
            view_size=form.view_size,
            align_corners=form.align_corners,
        )

    def dense(self, form: TargetFormat, dtype: torch.dtype) -> Tensor:
        """Return the logits (B, C, h, w) of all classes in `dtype`, up to a constant per pixel.

        `form` is the format of the targets, such as an open cache.
        """
        if self.values.dtype != torch.float16:
            return self.values.to(dtype)
        return self.packed(form).densify(dtype)


pytree.register_dataclass(Target)
