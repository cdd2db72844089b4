"""Which pixels of a batch the teacher's terms count: those in the view that show the image, and whose target it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.distill.batch import SEGMENTATION, Batch
from kdcache.distill.target import TargetFormat


@dataclass(frozen=True)
class TeacherMasks:
    """The masks of a loss.

    Attributes:
        targets: their format; None without any.
        distill_void: whether pixels without a label are counted, too.
    """

    targets: TargetFormat | None
    distill_void: bool
    ignore_index: int

    def views(self, batch: Batch) -> list[tuple[Batch, Tensor]]:
        """Pairs of a batch and the mask (B, H, W) of its pixels that KL counts; empty where the fused loss counts them.

        The first is the batch itself; where pixels are pasted, the second has their targets, if there are any.
        """
        if batch.own is None:
            return [] if batch.inside is None else [(batch, self._counted_by_kl(batch, None))]
        own, other = (batch, self._counted_by_kl(batch, batch.own)), batch.with_pasted_targets()
        return [own] if other.target is None else [own, (other, self._counted_by_kl(other, ~batch.own))]

    def counted(self, batch: Batch, own_BHW: Tensor | None = None) -> Tensor | None:
        """Which pixels (B, H, W) of the view the teacher's terms count; None is all."""
        shown_BHW = self._shown_of_view(batch)
        label_BHW = batch.labels.get(SEGMENTATION)
        labelled_BHW = None if self.distill_void or label_BHW is None else label_BHW != self.ignore_index
        counted: Tensor | None = None
        for mask_BHW in (own_BHW, shown_BHW, labelled_BHW):
            if mask_BHW is not None:
                counted = mask_BHW if counted is None else counted & mask_BHW
        return counted

    def shown(self, batch: Batch) -> Tensor | None:
        """Which pixels (B, H, W) show an image, the sample's own or one that was pasted; None is all."""
        if batch.own is None or (batch.inside is None and batch.pasted is None):
            return self._shown_of_view(batch)
        own, other = (self._shown_of_view(view) for view in (batch, batch.with_pasted_targets()))
        if own is None and other is None:
            return None
        return torch.where(batch.own, True if own is None else own, True if other is None else other)

    def _shown_of_view(self, batch: Batch) -> Tensor | None:
        return None if self.targets is None else batch.shown(self.targets, batch.size)

    def _counted_by_kl(self, batch: Batch, own_BHW: Tensor | None) -> Tensor:
        """Which pixels (B, H, W) of a part of the batch the KL counts."""
        assert self.targets is not None
        inside_BHW = batch.in_view(self.targets, batch.size).expand_as(batch.label)
        counted_BHW = self.counted(batch, own_BHW)
        return inside_BHW if counted_BHW is None else inside_BHW & counted_BHW


def counted_in(views: Sequence[tuple[Batch, Tensor]]) -> Tensor:
    """The number of pixels that KL counts of some views, 0-dimensional float32."""
    return torch.stack([mask_BHW.sum(dtype=torch.float32) for _, mask_BHW in views]).sum()


def times(mask_BHW: Tensor, gate_BHW: Tensor | None) -> Tensor:
    """A mask as weights of pixels, times a gate; None is 1."""
    return mask_BHW.float() if gate_BHW is None else gate_BHW * mask_BHW
