"""What every model shares: its normalisation, and the resize of its logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.models import ClassMapped, EnsembleModel, Outputs, SegmentationModel
from kdcache.models.export import Deployed

MEAN, STD = (0.1, 0.4, 0.7), (0.2, 0.3, 0.5)


class Coarse(SegmentationModel):
    """Colours at an eighth of the size."""

    def __init__(self, align_corners: bool = False) -> None:
        super().__init__(spec="own:coarse", num_classes=3, stride=8, taps=(), align_corners=align_corners)

    def forward(self, x_B3HW: Tensor, taps: object = ()) -> Outputs:
        return Outputs({"segmentation": F.avg_pool2d(x_B3HW, 8)}, {})


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normal(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    rgb = pixels.permute(0, 3, 1, 2).double() / 255
    return ((rgb - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).float()


def test_a_normalisation_that_is_set_later_counts(pixels) -> None:
    """Also when another one was in use before; what is standardised stays as it was."""
    model = Coarse()
    usual = model.mean, model.std
    rgb = pixels.permute(0, 3, 1, 2).float() / 255
    for mean, std in (usual, (MEAN, usual[1]), (MEAN, STD)):
        model.mean, model.std = mean, model.std
        model.mean, model.std = model.mean, std
        before = rgb.clone()
        for x in (model.normalise(pixels), model.standardise(rgb)):
            torch.testing.assert_close(x, normal(pixels, mean, std), rtol=1e-5, atol=1e-5)
        assert torch.equal(rgb, before)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_either_half_is_set_alone(pixels, name) -> None:
    model = Coarse()
    model.normalise(pixels)
    setattr(model, name, MEAN)
    torch.testing.assert_close(model.normalise(pixels), normal(pixels, model.mean, model.std), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aligned", [True, False])
def test_logits_are_resized_as_the_head_would(pixels, aligned) -> None:
    """By the model, by what wraps it, and in what is deployed."""
    model = Coarse(aligned).eval()
    model.mean, model.std = MEAN, STD
    logits = F.avg_pool2d(normal(pixels, MEAN, STD), 8)
    wanted, other = (
        F.interpolate(logits, (16, 24), mode="bilinear", align_corners=how) for how in (aligned, not aligned)
    )
    assert (wanted - other).abs().max() > 0.01
    rgb = pixels.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(model.upsample(logits, (16, 24)), wanted)
    torch.testing.assert_close(Deployed(model)(rgb), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Deployed(model, raw=True)(rgb), logits, rtol=1e-4, atol=1e-5)
    same = ClassMapped(model, torch.tensor([0, 1, 2]))
    assert (same.mean, same.std) == (MEAN, STD)
    torch.testing.assert_close(Deployed(same)(rgb), wanted, rtol=1e-4, atol=1e-5)
    several = EnsembleModel([model, model])
    torch.testing.assert_close(several.upsample(logits, (16, 24)), wanted)
    torch.testing.assert_close(several.plain().upsample(logits, (16, 24)), wanted)
