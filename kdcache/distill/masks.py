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
    """Computes which pixels of a batch the teacher's terms count.

    Attributes:
        targets: the format of the targets, such as an open cache. None is a loss without targets.
        distill_void: True if pixels without a label also count.
        ignore_index: the void class id of the labels.
    """

    targets: TargetFormat | None
    distill_void: bool
    ignore_index: int

    def counted_by_kl(self, batch: Batch) -> list[tuple[Batch, Tensor | None]]:
        """Return pairs of a batch and a bool mask (B, H, W) of the pixels at which KL uses that batch's targets.

        The first pair has `batch` itself. If pixels were pasted, a second pair has the targets of the pasted samples.
        The masks do not overlap. The mask is None if nothing was pasted and images fill their views. The fused loss
        then chooses the pixels itself, from the windows and the labels.
        """
        if batch.inside is None and batch.own is None:
            return [(batch, None)]
        taught: list[tuple[Batch, Tensor | None]] = [(batch, self._counted(batch, batch.own))]
        if batch.own is not None and (of_pasted := batch.with_pasted_targets()).target is not None:
            taught.append((of_pasted, self._counted(of_pasted, ~batch.own)))
        return taught

    def counted(self, batch: Batch, own_BHW: Tensor | None = None) -> Tensor | None:
        """Return the bool mask (B, H, W) of the pixels that the teacher's terms count, or None if all count.

        `own_BHW` (B, H, W) bool is True for pixels that `batch.targets` belong to, and False for pixels pasted from
        another sample. None means that the targets belong to all pixels.
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
        """Return the bool mask (B, H, W) of pixels that show the sample's image or a pasted image.

        None means all pixels.
        """
        if batch.own is None or (batch.inside is None and batch.pasted is None):
            return self._shown_of_view(batch)
        own_BHW, pasted_BHW = (self._shown_of_view(view) for view in (batch, batch.with_pasted_targets()))
        if own_BHW is None and pasted_BHW is None:
            return None
        return torch.where(batch.own, True if own_BHW is None else own_BHW, True if pasted_BHW is None else pasted_BHW)

    def _shown_of_view(self, batch: Batch) -> Tensor | None:
        return None if self.targets is None else batch.shown(self.targets, batch.size)

    def _counted(self, batch: Batch, own_BHW: Tensor | None) -> Tensor:
        """Return the mask (B, H, W) of a batch part's pixels that KL counts."""
        assert self.targets is not None
        inside_BHW = batch.in_view(self.targets, batch.size).expand_as(batch.label)
        counted_BHW = self.counted(batch, own_BHW)
        return inside_BHW if counted_BHW is None else inside_BHW & counted_BHW


def union(taught: Iterable[tuple[Batch, Tensor | None]]) -> Tensor | None:
    """Return the bool mask (B, H, W) of the pixels that KL counts, or None if no pair has a mask.

    `taught` are the pairs (batch, mask) that `TeacherMasks.counted_by_kl` returns for one batch: one with its own
    targets, and perhaps one with the targets of pasted samples. The masks are joined pixel by pixel with "or".
    """
    masks = [mask_BHW for _, mask_BHW in taught if mask_BHW is not None]
    return reduce(torch.logical_or, masks) if masks else None


def gated(gate_BHW: Tensor | None, counted_BHW: Tensor | None) -> Tensor | None:
    """Return the weights (B, H, W) of the pixels in KL: the gate at counted pixels, and 0 elsewhere.

    Args:
        gate_BHW: weights of the pixels. None weighs all 1.
        counted_BHW: bool mask of counted pixels. None counts all.
    Returns: the weights, or None if both arguments are None.
    """
    if gate_BHW is None or counted_BHW is None:
        return gate_BHW if counted_BHW is None else counted_BHW.float()
    return gate_BHW * counted_BHW
