"""Depth of several teachers, and of mirrored images: means of metres; what cannot be averaged is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.errors import ModelError, RecipeError
from kdcache.heads import RegressionHead
from kdcache.models import EnsembleModel, SegmentationModel, Tta, build_model


def teacher(spec: str, seed: int) -> SegmentationModel:
    torch.manual_seed(seed)
    model = build_model(spec, 3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("depth_head.3.weight"):
                parameter.mul_(50)
    return model


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def metres(model: SegmentationModel, x: Tensor, kind: str) -> np.ndarray:
    raw = model((x - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)).heads["depth"]
    wide = raw.double().numpy()
    return np.minimum(np.exp(wide) if kind == "exp" else np.log1p(np.exp(wide)), 80)


@pytest.mark.parametrize("kind", ["softplus", "exp"])
@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
@torch.inference_mode()
def test_the_mean_of_metres(pixels: Tensor, kind: str, weights: tuple[float, ...] | None) -> None:
    members = [teacher(f"kdcache:tiny+depth,as={kind}", seed) for seed in (1, 2)]
    ensemble = EnsembleModel(members, weights).eval()
    raw = ensemble(ensemble.normalise(pixels)).heads["depth"]
    x = pixels.permute(0, 3, 1, 2) / 255
    shares = np.array(weights or (1.0, 1.0)) / sum(weights or (1.0, 1.0))
    expected = sum(share * metres(member, x, kind) for share, member in zip(shares, members, strict=True))
    assert ensemble.regressions["depth"] == members[0].regressions["depth"]
    np.testing.assert_allclose(ensemble.regressions["depth"].values(raw), expected, rtol=1e-4)


@torch.inference_mode()
def test_mirrored_images_are_mirrored_back_and_scales_left_out(pixels: Tensor) -> None:
    member = teacher("kdcache:tiny+depth", 1)
    x = pixels.permute(0, 3, 1, 2) / 255
    expected = (metres(member, x, "softplus") + metres(member, x.flip(-1), "softplus")[..., ::-1]) / 2
    for text in ("flip", "flip,scales=1:0.5"):
        ensemble = EnsembleModel([member], tta=Tta.parse(text)).eval()
        raw = ensemble(ensemble.normalise(pixels)).heads["depth"]
        np.testing.assert_allclose(ensemble.regressions["depth"].values(raw), expected, rtol=1e-4)


@torch.inference_mode()
def test_who_has_no_depth_has_no_part_in_it(pixels: Tensor) -> None:
    plain, other = teacher("kdcache:tiny", 3), teacher("kdcache:tiny+depth", 1)
    ensemble = EnsembleModel([plain, other], (5.0, 1.0)).eval()
    outputs = ensemble(ensemble.normalise(pixels))
    np.testing.assert_allclose(
        ensemble.regressions["depth"].values(outputs.heads["depth"]),
        metres(other, pixels.permute(0, 3, 1, 2) / 255, "softplus"),
        rtol=1e-4,
    )
    alone = EnsembleModel([plain, teacher("kdcache:tiny", 1)], (5.0, 1.0)).eval()
    assert outputs.logits.shape == alone(alone.normalise(pixels)).logits.shape
    assert torch.allclose(F.softmax(outputs.logits, 1).sum(1), torch.ones(()))


@torch.inference_mode()
def test_who_has_learnt_no_classes_has_no_part_in_them(pixels: Tensor) -> None:
    first, second = (teacher("kdcache:tiny+depth", seed) for seed in (1, 2))
    first.untrained = second.untrained = ("depth",)
    torch.manual_seed(4)
    depth = build_model("kdcache:tiny+depth", 5).eval()  # its classes were not learnt, and are not counted
    depth.untrained = ("segmentation",)
    ensemble = EnsembleModel([depth, first, second], (5.0, 1.0, 3.0)).eval()
    outputs = ensemble(ensemble.normalise(pixels))
    alone = EnsembleModel([first, second], (1.0, 3.0)).eval()
    expected = alone(alone.normalise(pixels))
    assert ensemble.num_classes == 3
    assert torch.allclose(outputs.logits, expected.logits, atol=1e-6)
    np.testing.assert_allclose(
        ensemble.regressions["depth"].values(outputs.heads["depth"]),
        metres(depth, pixels.permute(0, 3, 1, 2) / 255, "softplus"),
        rtol=1e-4,
    )


def test_what_cannot_be_averaged() -> None:
    with pytest.raises(ModelError, match="different heads depth"):
        EnsembleModel([teacher("kdcache:tiny+depth", 1), teacher("kdcache:tiny+depth,max=10", 2)])
    with pytest.raises(RecipeError, match="Add 1 to the scales"):
        EnsembleModel([teacher("kdcache:tiny+depth", 1)], tta=Tta.parse("scales=0.5:2"))
    relative = [teacher("kdcache:tiny+depth", seed) for seed in (1, 2)]
    for member in relative:
        member.head_kinds["depth"] = RegressionHead(unit="relative")
    with pytest.raises(ModelError, match="several teachers in relative"):
        EnsembleModel(relative)
    assert EnsembleModel(relative[:1], tta=Tta(flip=True)).regressions["depth"].unit == "relative"
