"""The pixels of a batch that the teacher's terms count: in the view, showing the image, with the right target."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.distill.batch import SEGMENTATION, Batch
from kdcache.distill.target import TargetFormat


class CountedByKL(NamedTuple):
    """The pixels (B, H, W) that KL counts, bool.

    Attributes:
        own: mask of the batch's own targets, or None if the fused loss finds them by itself.
        pasted: mask of the targets of pasted pixels, or None.
        other: the batch with these targets, or None.
    """

    own: Tensor | None
    pasted: Tensor | None = None
    other: Batch | None = None

    @property
    def all(self) -> Tensor | None:
        """The pixels of both targets, which do not overlap."""
        return self.own if self.own is None or self.pasted is None else self.own | self.pasted


@dataclass(frozen=True)
class TeacherMasks:
    """The masks of a loss.

    Attributes:
        targets: their format, or None without targets.
        distill_void: whether pixels without a label also count.
    """

    targets: TargetFormat | None
    distill_void: bool
    ignore_index: int

    def counted_by_kl(self, batch: Batch) -> CountedByKL:
        """Find the pixels that KL counts, for each target, unless the fused loss finds them by itself."""
        if batch.inside is None and batch.own is None:
            return CountedByKL(None)
        own_BHW = self._counted(batch, batch.own)
        other = None if batch.own is None else batch.with_pasted_targets()
        if batch.own is None or other is None or other.target is None:
            return CountedByKL(own_BHW)
        return CountedByKL(own_BHW, self._counted(other, ~batch.own), other)

    def counted(self, batch: Batch, own_BHW: Tensor | None = None) -> Tensor | None:
        """Return the mask (B, H, W) of the view's pixels that the teacher's terms count. None is all."""
        shown_BHW = self._shown_of_view(batch)
        label_BHW = batch.labels.get(SEGMENTATION)
        labelled_BHW = None if self.distill_void or label_BHW is None else label_BHW != self.ignore_index
        counted: Tensor | None = None
        for mask_BHW in (own_BHW, shown_BHW, labelled_BHW):
            if mask_BHW is not None:
                counted = mask_BHW if counted is None else counted & mask_BHW
        return counted

    def shown(self, batch: Batch) -> Tensor | None:
        """Return the mask (B, H, W) of pixels that show the sample's image or a pasted one. None is all."""
        if batch.own is None or (batch.inside is None and batch.pasted is None):
            return self._shown_of_view(batch)
        own, other = (self._shown_of_view(view) for view in (batch, batch.with_pasted_targets()))
        if own is None and other is None:
            return None
        return torch.where(batch.own, True if own is None else own, True if other is None else other)

    def _shown_of_view(self, batch: Batch) -> Tensor | None:
        return None if self.targets is None else batch.shown(self.targets, batch.size)

    def _counted(self, batch: Batch, own_BHW: Tensor | None) -> Tensor:
        """Return the mask (B, H, W) of a batch part's pixels that KL counts."""
        assert self.targets is not None
        inside_BHW = batch.in_view(self.targets, batch.size).expand_as(batch.label)
        counted_BHW = self.counted(batch, own_BHW)
        return inside_BHW if counted_BHW is None else inside_BHW & counted_BHW


def gated(gate_BHW: Tensor | None, counted_BHW: Tensor | None) -> Tensor | None:
    """Return weights (B, H, W) of KL: the gate at counted pixels, or None for 1."""
    if gate_BHW is None or counted_BHW is None:
        return gate_BHW if counted_BHW is None else counted_BHW.float()
    return gate_BHW * counted_BHW
