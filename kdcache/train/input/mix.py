"""CutMix and ClassMix: parts of one sample of a batch pasted into its neighbour, pixels and labels of all tasks alike.

Rows 2n and 2n + 1 of a batch are neighbours, so that processes which share a batch paste as one would. Where a pixel
was pasted, the neighbour's target teaches (`Batch.own`): targets move as pixels do.

| kind | pasted | source |
| --- | --- | --- |
| cutmix | a box whose share of the image is uniform in 0..1 | Yun 2019, arXiv 1905.04899 |
| classmix | half of the classes that the neighbour's label shows | Olsson 2021, arXiv 2007.07936 |

What is random comes with the batch, so a step repeats to the bit whoever computes it.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from kdcache.data import IGNORE_INDEX
from kdcache.distill import Batch
from kdcache.distill.batch import neighbours
from kdcache.errors import RecipeError

CLASSES = 256
NUMBERS = {"cutmix": 4, "classmix": 1 + CLASSES}
"""Dice of a sample: the first decides whether it is mixed at all."""


class Mix:
    """Pastes within a batch.

    Args:
        text: cutmix or classmix, and the share of samples that are mixed: 'cutmix:0.5'; 1 when left out.
    Attributes:
        dice: how many random numbers a sample needs.
    Raises: RecipeError.
    """

    def __init__(self, text: str) -> None:
        self.kind, _, share = text.partition(":")
        try:
            self._share = float(share) if share else 1.0
        except ValueError:
            self._share = math.nan
        if self.kind not in NUMBERS or not 0 < self._share <= 1:
            raise RecipeError(
                "--mix is cutmix or classmix, with the share of samples that are mixed",
                received=repr(text),
                remedy="for instance --mix cutmix or --mix classmix:0.5",
            )
        self.dice = NUMBERS[self.kind]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """The batch with mixed pixels and labels, and `own`, which of them are a sample's own.

        Never waits for the device.
        """
        dice_BN = batch.dice
        assert batch.pixels is not None
        assert dice_BN is not None
        other_BHW = neighbours(batch.label)
        if self.kind == "cutmix":
            pasted_BHW = _boxes(dice_BN[:, 1:], batch.size)
        else:
            pasted_BHW = _classes(dice_BN[:, 1:], other_BHW)
        own_BHW = ~(pasted_BHW & (dice_BN[:, 0] < self._share)[:, None, None])
        pixels = torch.where(own_BHW[..., None], batch.pixels, neighbours(batch.pixels))
        labels = {task: torch.where(own_BHW, label, neighbours(label)) for task, label in batch.labels.items()}
        return replace(batch, pixels=pixels, labels=labels, own=own_BHW)


def _boxes(dice_B3: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W): a box of the image's shape whose area, before it is cut at the border, is uniform."""
    side_B = dice_B3[:, 0].sqrt() / 2
    inside = []
    for centre_B, length in zip(dice_B3[:, 1:].unbind(1), size, strict=True):
        at_N = (torch.arange(length, device=dice_B3.device) + 0.5) / length
        inside.append((at_N - centre_B[:, None]).abs() < side_B[:, None])
    return inside[0][:, :, None] & inside[1][:, None, :]


def _classes(dice_BC: Tensor, label_BHW: Tensor) -> Tensor:
    """(B, H, W): the pixels of half of the classes of a label, rounded up, never the void."""
    flat_BN = label_BHW.flatten(1).long()
    shown_BC = torch.zeros_like(dice_BC, dtype=torch.bool).scatter_(1, flat_BN, True)
    shown_BC[:, IGNORE_INDEX] = False
    rank_BC = dice_BC.masked_fill(~shown_BC, 2.0).argsort(1).argsort(1)
    half_B1 = (shown_BC.sum(1, keepdim=True) + 1) // 2
    pasted_BC = shown_BC & (rank_BC < half_B1)
    return pasted_BC.gather(1, flat_BN).view_as(label_BHW)
