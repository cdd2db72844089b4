"""Map a cache's targets to other classes: several classes become one, some are dropped.

The probabilities of merged classes are summed at native stride, and renormalised if classes are dropped. Up to the
rounding of float16, this equals a cache built with the mapped teacher.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kdcache.distill.batch import SEGMENTATION, Batch
from kdcache.distill.target import Target
from kdcache.distill.terms.base import TermTargets
from kdcache_kernels.window import Size

_LOWEST = -60000.0
"""What the values of a store were cut to before they became float16."""


class MergedTargets(nn.Module):
    """A cache's targets, converted to the classes of a training. They replace the cache in `DistillLoss`.

    Args:
        store: an open cache whose targets keep all classes.
        merge: a module that maps logits (B, cache's classes, h, w) to (B, num_classes, h, w), float32.
        num_classes: how many classes the training has.
    """

    def __init__(self, store: TermTargets, merge: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.store, self.merge, self.num_classes = store, merge, num_classes

    @property
    def view_size(self) -> Size:
        """The (H, W) of the cache's views, in pixels."""
        return self.store.view_size

    @property
    def align_corners(self) -> bool:
        """True if the last resize of the cache's teacher, from its logits to the image, aligns corners."""
        return self.store.align_corners

    @property
    def manifest(self) -> Any:
        """The manifest of `store`, but with the training's number of classes in the segmentation head."""
        manifest = self.store.manifest
        merged = {"classes": self.num_classes, "k": self.num_classes, "raw": False}
        heads = {**manifest.heads, SEGMENTATION: manifest.heads[SEGMENTATION].model_copy(update=merged)}
        return manifest.model_copy(update={"heads": heads})

    @torch.no_grad()
    def merged(self, target: Target) -> Target:
        """Return a segmentation target with the training's classes instead of the cache's.

        The result holds all classes, as float16 logits minus the largest logit of each pixel. It carries no gradient.
        """
        merged_BChw = self.merge(target.values.float())
        values_BChw = (merged_BChw - merged_BChw.amax(1, keepdim=True)).clamp_min(_LOWEST)
        return Target(values_BChw.half())

    def replace_targets(self, batch: Batch) -> Batch:
        """Return the batch with the training's classes in its segmentation target. A batch without it is unchanged."""
        if batch.target is None:
            return batch
        return replace(batch, targets={**(batch.targets or {}), SEGMENTATION: self.merged(batch.target)})
