"""The pixels of a batch that the teacher's terms count: in the view, showing the image, with the right target."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from kdcache.distill.batch import SEGMENTATION, Batch
from kdcache.distill.target import TargetFormat


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

    def counted_by_kl(self, batch: Batch) -> list[tuple[Batch, Tensor | None]]:
        """Return pairs of a batch and its pixels that KL counts: `batch`, and the targets of pasted samples, if any.

        The masks (B, H, W) do not overlap. None leaves finding the pixels to the fused loss.
        """
        if batch.inside is None and batch.own is None:
            return [(batch, None)]
        taught: list[tuple[Batch, Tensor | None]] = [(batch, self._counted(batch, batch.own))]
        if batch.own is not None and (other := batch.with_pasted_targets()).target is not None:
            taught.append((other, self._counted(other, ~batch.own)))
        return taught

    def counted(self, batch: Batch, own_BHW: Tensor | None = None) -> Tensor | None:
        """Return the bool mask (B, H, W) of the pixels that the teacher's terms count, or None if all count.

        `own_BHW` (B, H, W) is True for pixels that `batch.targets` belong to, and False for pixels pasted from another
        sample. Without it, the targets belong to all pixels.
        """
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


def union(taught: Iterable[tuple[Batch, Tensor | None]]) -> Tensor | None:
    """Return all pixels (B, H, W) that KL counts, or None if the fused loss finds them."""
    masks = [mask_BHW for _, mask_BHW in taught if mask_BHW is not None]
    return reduce(torch.logical_or, masks) if masks else None


def gated(gate_BHW: Tensor | None, counted_BHW: Tensor | None) -> Tensor | None:
    """Return weights (B, H, W) of KL: the gate at counted pixels, or None for 1."""
    if gate_BHW is None or counted_BHW is None:
        return gate_BHW if counted_BHW is None else counted_BHW.float()
    return gate_BHW * counted_BHW
