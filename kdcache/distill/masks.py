"""Which pixels of a batch the teacher's terms count: those in the view that show the image, and whose target it is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.distill.batch import SEGMENTATION, Batch
from kdcache.distill.target import TargetFormat
from kdcache_kernels import PastedTarget


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

    def counted_apart(self, batch: Batch, other: Batch | None) -> Tensor | None:
        """Which pixels (B, H, W) KL counts; None where the fused loss finds them by itself.

        Args:
            other: the batch with the targets of pixels that were pasted, as `pasted` has it.
        """
        if batch.inside is None and (batch.own is None or (other is not None and other.inside is None)):
            return None
        counted_BHW = self._counted_by_kl(batch, batch.own)
        if other is not None and other.own is not None:
            counted_BHW = counted_BHW | self._counted_by_kl(other, ~other.own)
        return counted_BHW

    def pasted(self, batch: Batch) -> Batch | None:
        """The batch with the targets of the pixels that were pasted; None where there are none."""
        if batch.own is None:
            return None
        other = batch.with_pasted_targets()
        return None if other.target is None else other

    def weight(
        self, batch: Batch, gate_BHW: Tensor | None, other: Batch | None, other_gate_BHW: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Weights (B, H, W) of KL by the gates of both targets, None for 1; and `counted_apart`, which enters them."""
        weight_BHW, counted_BHW = gate_BHW, self.counted_apart(batch, other)
        if gate_BHW is not None and other_gate_BHW is not None and batch.own is not None:
            weight_BHW = torch.where(batch.own, gate_BHW, other_gate_BHW)
        if counted_BHW is not None:
            weight_BHW = counted_BHW.float() if weight_BHW is None else weight_BHW * counted_BHW
        return weight_BHW, counted_BHW

    def pasted_target(self, other: Batch | None) -> PastedTarget | None:
        """The targets of pixels that were pasted, as the fused loss takes them; `other` as `pasted` returns it."""
        if other is None or other.own is None or other.target is None or self.targets is None:
            return None
        return PastedTarget(~other.own, other.target.packed(self.targets), other.window, other.flip)

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
