"""CutMix and ClassMix: paste parts of one sample of a batch into another, pixels and labels of all tasks.

Rows 2n and 2n + 1 of a batch are partners, so processes that share a batch paste as one process would. From one stream
into another, row n of N takes from row n M // N of the other's M, which also agrees for equal parts of both. A pasted
pixel learns from the other sample's target (`Batch.own`): targets move as pixels do.

| kind | pasted | source |
| --- | --- | --- |
| cutmix | a box whose share of the image is uniform in 0..1 | Yun 2019, arXiv 1905.04899 |
| classmix | half of the classes that the other's label shows | Olsson 2021, 2007.07936; DACS 2020, 2007.08702 |

The random numbers come with the batch, so a step repeats bit for bit in any process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.data import IGNORE_INDEX
from kdcache.distill import Batch, LabelTargets, MergedTargets, Streams
from kdcache.distill.batch import PseudoLabels, neighbours
from kdcache.distill.target import TargetFormat
from kdcache.errors import RecipeError
from kdcache.tasks import TASKS

CLASSES = 256
NUMBERS = {"cutmix": 4, "classmix": 1 + CLASSES}
"""Dice of a sample: the first decides whether it is mixed at all."""


class Mix:
    """An augmentation that pastes parts of one sample of a batch, pixels and labels, into another sample.

    Call it with the batches of all streams. It returns them after pasting between neighbouring samples of each stream.

    Args:
        text: `cutmix` pastes a box, `classmix` the pixels of half of the classes. The share of samples that get a paste
            may follow: `cutmix:0.5`. Its default is 1.
        flag: the name of the setting, for messages.

    Attributes:
        kind: `cutmix` or `classmix`.
        dice: how many random numbers in `Batch.dice` a sample needs.

    Raises: RecipeError for an invalid text.
    """

    def __init__(self, text: str, flag: str = "--mix ") -> None:
        self.kind, _, share = text.partition(":")
        try:
            self._share = float(share) if share else 1.0
        except ValueError:
            self._share = math.nan
        if self.kind not in NUMBERS or not 0 < self._share <= 1:
            raise RecipeError(
                f"Invalid {flag.strip('= ')} {text!r}",
                fix=f"Give cutmix or classmix, with the share of samples that are mixed, for example {flag}cutmix or "
                f"{flag}classmix:0.5",
            )
        self.dice = NUMBERS[self.kind]

    def __call__(self, streams: Streams) -> Streams:
        """Return the batch after pasting between neighbours, the rows 2n and 2n + 1, within each stream.

        `own` of the result is True for a sample's own pixels.
        """
        others = (Batch(batch.pixels, batch.labels, pseudo=batch.pseudo).map(neighbours) for batch in streams)
        return tuple(map(self.paste, streams, others))

    @torch.no_grad()
    def paste(self, batch: Batch, other: Batch) -> Batch:
        """Return `batch` with pixels of `other` pasted in: from each sample into the sample of equal index.

        Labels and pseudo labels of these pixels are pasted with them. `kind` and the random numbers `batch.dice` choose
        the pixels: a box, or half of the classes in the label of `other`. Without a paste, a sample stays as it is.

        Both batches have equally many samples and the same size. `own` of the result is False for pasted pixels. The
        method never waits for the device.
        """
        dice_BN = batch.dice
        assert batch.pixels is not None
        assert other.pixels is not None
        assert dice_BN is not None
        if self.kind == "cutmix":
            pasted_BHW = _boxes(dice_BN[:, 1:], batch.size)
        else:
            pasted_BHW = _classes(dice_BN[:, 1:], other.label)
        own_BHW = ~(pasted_BHW & (dice_BN[:, 0] < self._share)[:, None, None])
        pixels = torch.where(own_BHW[..., None], batch.pixels, other.pixels)
        labels = {
            task: torch.where(own_BHW, label, other.labels.get(task, TASKS[task].void))
            for task, label in batch.labels.items()
        }
        pseudo = {by: _pasted(labels_of, other.pseudo.get(by), own_BHW) for by, labels_of in batch.pseudo.items()}
        return replace(batch, pixels=pixels, labels=labels, pseudo=pseudo, own=own_BHW)


@dataclass(frozen=True)
class Paste:
    """Pastes samples of one stream into another stream, with their targets if both streams have targets.

    Attributes:
        into: number of the stream that pixels are pasted into.
        source: number of the stream that pixels come from.
        mix: how pixels are chosen.
        form: the format of the targets of the stream `into`, or None without targets.
        source_form: the format of the targets of the stream `source`, or None without targets.
    """

    into: int
    source: int
    mix: Mix
    form: TargetFormat | None = None
    source_form: TargetFormat | None = None

    def __call__(self, batch: Batch, source: Batch) -> Batch:
        """Return `batch` with samples of `source` pasted in, and their targets in `pasted`."""
        count, of = len(batch), len(source)
        if count != of:
            assert source.pixels is not None
            rows = torch.arange(count, device=source.pixels.device) * of // count
            source = source.map(lambda tensor: tensor[rows])
        return replace(self.mix.paste(batch, replace(source, pseudo={})), pasted=self._targets(source))

    def _targets(self, source: Batch) -> Batch:
        """Return the source's targets, in the training's classes, with windows in pixels of the stream's own views."""
        form, origin = self.form, self.source_form
        if form is None or origin is None or isinstance(form, LabelTargets) or isinstance(origin, LabelTargets):
            return Batch()
        if isinstance(origin, MergedTargets):
            source = origin.replace_targets(source)
        (height, width), (own_height, own_width) = origin.view_size, form.view_size
        return source.targets_alone((own_height / height, own_width / width))


class Pastes:
    """Pastes samples of some streams of a mixed batch into others. Call it with the batches of all streams.

    The call returns the batches of all streams after pasting. Every paste copies from the batches before any pasting.

    Args:
        pastes: what to paste: from which stream, into which stream, and how.
    """

    def __init__(self, pastes: Sequence[Paste]) -> None:
        self._pastes = tuple(pastes)

    def __call__(self, streams: Streams) -> Streams:
        """Return the batches of all streams after every paste."""
        pasted = list(streams)
        for paste in self._pastes:
            pasted[paste.into] = paste(streams[paste.into], streams[paste.source])
        return tuple(pasted)


def _pasted(kept: PseudoLabels, pasted: PseudoLabels | None, own_BHW: Tensor) -> PseudoLabels:
    """Return pseudo labels of mixed pixels. Pasted pixels have confidence 0 (not counted) if `pasted` is None."""
    if pasted is None:
        return replace(kept, confidence=torch.where(own_BHW, kept.confidence, 0))
    label, confidence = (
        torch.where(own_BHW, a, b) for a, b in ((kept.label, pasted.label), (kept.confidence, pasted.confidence))
    )
    return PseudoLabels(label, confidence)


def _boxes(dice_B3: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a bool mask (B, H, W) of random boxes with the image's shape. Their area is uniform before clipping."""
    side_B = dice_B3[:, 0].sqrt() / 2
    inside = []
    for centre_B, length in zip(dice_B3[:, 1:].unbind(1), size, strict=True):
        at_N = (torch.arange(length, device=dice_B3.device) + 0.5) / length
        inside.append((at_N - centre_B[:, None]).abs() < side_B[:, None])
    return inside[0][:, :, None] & inside[1][:, None, :]


def _classes(dice_BC: Tensor, label_BHW: Tensor) -> Tensor:
    """Return a bool mask (B, H, W) of the pixels of half of a label's classes, rounded up, without void."""
    flat_BN = label_BHW.flatten(1).long()
    shown_BC = torch.zeros_like(dice_BC, dtype=torch.bool).scatter_(1, flat_BN, True)
    shown_BC[:, IGNORE_INDEX] = False
    rank_BC = dice_BC.masked_fill(~shown_BC, 2.0).argsort(1).argsort(1)
    half_B1 = (shown_BC.sum(1, keepdim=True) + 1) // 2
    pasted_BC = shown_BC & (rank_BC < half_B1)
    return pasted_BC.gather(1, flat_BN).view_as(label_BHW)
