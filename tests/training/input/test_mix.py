"""Pasting between neighbours: what is pasted, how often, and that labels follow pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.distill import SEGMENTATION, Batch
from kdcache.errors import RecipeError
from kdcache.training.input.mix import Mix, Paste, Pastes

B, H, W = 64, 24, 32


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 6, (B, H // 4, W // 4), generator=generator, dtype=torch.uint8)
    label = label.repeat_interleave(4, 1).repeat_interleave(4, 2)
    label[label == 5] = 255
    # A pixel tells whose it is, and where.
    pixels = torch.stack([torch.arange(B, dtype=torch.uint8)[:, None, None].expand(B, H, W), label, label], -1)
    return pixels.contiguous(), label


def dice(mix: Mix, seed: int = 1) -> torch.Tensor:
    return torch.rand(B, mix.dice, generator=torch.Generator().manual_seed(seed))


def paste(mix: Mix, pixels: torch.Tensor, label: torch.Tensor, dice: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pixels, labels and owners of a batch that was mixed."""
    (mixed,) = mix((Batch(pixels=pixels, labels={SEGMENTATION: label}, dice=dice),))
    assert mixed.pixels is not None
    assert mixed.own is not None
    return mixed.pixels, mixed.label, mixed.own


@pytest.mark.parametrize("text", ["cutmix", "classmix", "cutmix:0.3"])
def test_pixels_labels_and_owners_agree(text: str) -> None:
    mix = Mix(text)
    pixels, label = batch()
    mixed, mixed_label, own = paste(mix, pixels, label, dice(mix))
    owner = torch.where(own, torch.arange(B)[:, None, None], torch.arange(B)[:, None, None] ^ 1)
    assert torch.equal(mixed[..., 0].long(), owner)
    assert torch.equal(mixed[..., 1], mixed_label)
    assert torch.equal(mixed_label, torch.where(own, label, label[torch.arange(B) ^ 1]))
    again = paste(mix, pixels, label, dice(mix))
    assert all(torch.equal(a, b) for a, b in zip((mixed, mixed_label, own), again, strict=True))


def test_labels_of_depth_are_pasted_alike() -> None:
    mix = Mix("classmix")
    pixels, label = batch()
    metres = torch.where(torch.rand(B, H, W) < 0.5, torch.nan, pixels[..., 0].float())
    (mixed,) = mix((Batch(pixels=pixels, labels={SEGMENTATION: label, "depth": metres}, dice=dice(mix)),))
    assert mixed.pixels is not None
    assert mixed.own is not None
    depth = mixed.labels["depth"]
    known = torch.where(mixed.own, metres.isfinite(), metres.isfinite()[torch.arange(B) ^ 1])
    assert torch.equal(depth.isfinite(), known)
    assert torch.equal(depth[known], mixed.pixels[..., 0].float()[known])
    assert not mixed.own.all()


def test_a_box_is_pasted_whose_area_is_uniform() -> None:
    mix = Mix("cutmix")
    pixels, label = batch()
    numbers = torch.tensor([0.0, 0.25, 0.5, 0.5]).repeat(B, 1)
    _, _, own = paste(mix, pixels, label, numbers)
    inside = np.zeros((H, W), bool)
    inside[6:18, 8:24] = True  # half of each side, in the middle
    assert np.array_equal(~own[0].numpy(), inside)
    numbers = dice(mix)
    numbers[:, 2:] = 0.5
    areas = (~paste(mix, pixels, label, numbers)[2]).float().mean((1, 2))
    assert (areas - numbers[:, 1]).abs().max() < 0.12  # whole pixels


def test_half_of_the_neighbour_s_classes_are_pasted_whole() -> None:
    mix = Mix("classmix")
    pixels, label = batch()
    label[0] = 255  # has nothing to give
    _, _, own = paste(mix, pixels, label, dice(mix))
    assert own[1].all()
    for row in range(2, B):
        theirs = label[row ^ 1]
        shown = {int(c) for c in theirs.unique() if c != 255}
        pasted = {int(c) for c in theirs[~own[row]].unique()}
        assert len(pasted) == (len(shown) + 1) // 2
        assert pasted <= shown
        assert not own[row][torch.isin(theirs, torch.tensor(sorted(pasted), dtype=torch.uint8))].any()


def test_a_share_of_the_samples_is_mixed() -> None:
    mix = Mix("cutmix:0.25")
    pixels, label = batch()
    numbers = dice(mix)
    numbers[:, 1] = 0.9
    mixed = ~paste(mix, pixels, label, numbers)[2].flatten(1).all(1)
    assert torch.equal(mixed, numbers[:, 0] < 0.25)


def test_a_stream_is_pasted_into_another_without_its_labels() -> None:
    """Rows take turns; what has no label of a task there has none after it was pasted."""
    mix = Mix("cutmix")
    pixels, label = batch()
    metres = pixels[..., 0].float()
    into = Batch(pixels=pixels, labels={SEGMENTATION: label, "depth": metres}, dice=dice(mix))
    source = Batch(pixels=255 - pixels[: B // 4], labels={SEGMENTATION: label[: B // 4].flip(0)})
    first, second = Pastes([Paste(0, 1, mix)])((into, source))
    assert second is source
    assert first.own is not None
    assert first.pixels is not None
    rows = torch.arange(B) // 4
    owner = torch.where(first.own, torch.arange(B)[:, None, None], 255 - rows[:, None, None])
    assert torch.equal(first.pixels[..., 0].long(), owner)
    assert torch.equal(first.label, torch.where(first.own, label, source.label[rows]))
    assert torch.equal(first.labels["depth"].isfinite(), first.own)
    assert first.pasted is not None
    assert not first.pasted.targets
    assert 0.2 < first.own.float().mean() < 0.8


@pytest.mark.parametrize("text", ["mixup", "cutmix:0", "cutmix:1.1", "classmix:x", ""])
def test_what_cannot_be_mixed_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="cutmix or classmix"):
        Mix(text)
