"""Several models as one, and augmentation at test time, against float64 arithmetic on single members."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdcache.errors import ModelError, RecipeError
from kdcache.models import EnsembleModel, Outputs, SegmentationModel, Tta, build_model

CLASSES = 4


class Strided(SegmentationModel):
    """One convolution at any stride: a grid of its own."""

    def __init__(self, stride: int, seed: int, *, classes: int = CLASSES, align_corners: bool = False) -> None:
        super().__init__(
            spec=f"strided {stride}", num_classes=classes, stride=stride, taps=("near",), align_corners=align_corners
        )
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, classes, 5, stride, padding=2)
        self.mean, self.std = (0.1 * seed, 0.5, 0.4), (0.2, 0.25, 0.3 + 0.1 * seed)

    def forward(self, x_B3HW, taps=()):
        self.check_taps(taps)
        y = self.conv(x_B3HW)
        return Outputs({"segmentation": y}, dict.fromkeys(taps, y[:, :2]))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, 26, 38, 3), np.uint8))


def softmax(logits: torch.Tensor) -> np.ndarray:
    z = logits.detach().numpy().astype(np.float64)
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def hats(size: int, n_in: int, *, antialias: bool = False) -> np.ndarray:
    """(size, n_in) weights of a bilinear resize: a triangle about each half-pixel centre, widened when it shrinks."""
    scale = n_in / size
    width = max(scale, 1.0) if antialias else 1.0
    centre = (np.arange(size) + 0.5) * scale
    if not antialias:
        centre = centre.clip(0.5, n_in - 0.5)
    weight = np.clip(1 - np.abs(np.arange(n_in) + 0.5 - centre[:, None]) / width, 0, None)
    return weight / weight.sum(1, keepdims=True)


def resized(x: np.ndarray, size: tuple[int, int], *, antialias: bool = False) -> np.ndarray:
    rows, columns = (hats(s, n, antialias=antialias) for s, n in zip(size, x.shape[-2:], strict=True))
    return np.einsum("ih,bchw,jw->bcij", rows, x, columns)


def probabilities_of(member: SegmentationModel, rgb_B3HW: np.ndarray) -> np.ndarray:
    """Probabilities of a member on RGB in 0..1, by nothing but its mean, std and forward."""
    mean, std = (np.array(m).reshape(3, 1, 1) for m in (member.mean, member.std))
    return softmax(member(torch.from_numpy((rgb_B3HW - mean) / std).float()).logits)


def rgb(pixels: torch.Tensor) -> np.ndarray:
    return pixels.numpy().transpose(0, 3, 1, 2) / 255


def answer(model: EnsembleModel, pixels: torch.Tensor, taps=()) -> Outputs:
    with torch.inference_mode():
        return model(model.normalise(pixels), taps)


@settings(max_examples=12, deadline=None)
@given(
    strides=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.05, 20), min_size=3, max_size=3),
)
def test_the_mean_of_probabilities_on_the_finest_grid(pixels, strides, weights) -> None:
    members = [Strided(stride, seed) for seed, stride in enumerate(strides)]
    weights = weights[: len(members)]
    logits = answer(EnsembleModel(members, weights), pixels).logits
    alone = [probabilities_of(member, rgb(pixels)) for member in members]
    grid = max(p.shape[2] for p in alone), max(p.shape[3] for p in alone)
    wanted = sum(w * resized(p, grid) for w, p in zip(weights, alone, strict=True)) / sum(weights)
    assert logits.shape[2:] == grid
    assert logits.exp().sum(1).numpy() == pytest.approx(1, abs=1e-5)
    assert np.abs(logits.numpy() - np.log(wanted)).max() < 2e-5


@pytest.mark.parametrize("text", ["flip", "scales=0.75:1.5", "flip,scales=0.5:1:1.25", "scales=1"])
def test_augmentation_is_a_mean_too(pixels, text) -> None:
    members, tta = [Strided(4, 0), Strided(2, 1)], Tta.parse(text)
    logits = answer(EnsembleModel(members, (3, 1), tta), pixels).logits
    scales = tuple(map(float, text.split("=")[1].split(":"))) if "=" in text else (1.0,)
    assert (tta.flip, tta.scales) == ("flip" in text, scales)
    passes = []
    for member in members:
        passes.append([])
        for scale in scales:
            size = tuple(round(side * scale) for side in (26, 38))
            image = resized(rgb(pixels), size, antialias=True)
            passes[-1].append(probabilities_of(member, image))
            if tta.flip:
                passes[-1].append(probabilities_of(member, image[..., ::-1].copy())[..., ::-1])
    every = [p for those in passes for p in those]
    grid = max(p.shape[2] for p in every), max(p.shape[3] for p in every)
    first, second = (np.mean([resized(p, grid) for p in those], 0) for those in passes)
    assert np.abs(logits.numpy() - np.log(0.75 * first + 0.25 * second)).max() < 1e-4
    assert logits.shape[2:] == grid


def test_a_mirrored_image_gives_mirrored_logits(pixels) -> None:
    """With an even number of cells at stride 2 nothing but the flip's mean makes it so."""
    member = Strided(1, 1)
    with_flip, plain = (EnsembleModel([member], tta=tta) for tta in (Tta(flip=True), None))
    mirrored = pixels.flip(2)
    assert torch.allclose(answer(with_flip, mirrored).logits.flip(-1), answer(with_flip, pixels).logits, atol=1e-5)
    assert not torch.allclose(answer(plain, mirrored).logits.flip(-1), answer(plain, pixels).logits, atol=0.1)


def test_features_are_those_of_the_first_member(pixels) -> None:
    members = [Strided(4, 0), Strided(2, 1), Strided(4, 2)]
    for tta in (None, Tta.parse("flip,scales=0.5:1"), Tta.parse("scales=0.5:1.5")):
        model = EnsembleModel(members, (1, 2, 5), tta)
        output = answer(model, pixels, ("near",))
        assert list(output.features) == ["near"]
        with torch.inference_mode():
            alone = members[0](members[0].normalise(pixels), ("near",)).features["near"]
        assert torch.equal(output.features["near"], alone), "the first member's, of the image as it is"


def test_a_class_that_is_ruled_out_stays_finite(pixels) -> None:
    member = Strided(4, 0)
    with torch.no_grad():
        member.conv.bias[0] -= 500
    logits = answer(EnsembleModel([member, member]), pixels).logits
    assert logits.isfinite().all()
    assert logits[:, 0].max() < -80
    with torch.no_grad():
        member.conv.bias[1] = math.nan
    assert not answer(EnsembleModel([member, member]), pixels).logits.isfinite().any(), "what is no number is no word"


def test_it_repeats_and_knows_its_parts(pixels) -> None:
    members = [build_model("kdcache:tiny", CLASSES).eval(), Strided(4, 1)]
    model = EnsembleModel(members, (1, 3), Tta.parse("flip,scales=1:1.25")).eval()
    assert torch.equal(answer(model, pixels.repeat(1, 2, 2, 1)).logits, answer(model, pixels.repeat(1, 2, 2, 1)).logits)
    assert (model.spec, model.taps, model.shares) == ("kdcache:tiny + strided 4", members[0].taps, (0.25, 0.75))
    assert torch.equal(
        model.plain()(model.normalise(pixels.repeat(1, 2, 2, 1))).logits,
        EnsembleModel(members, (1, 3)).eval()(model.normalise(pixels.repeat(1, 2, 2, 1))).logits,
    )
    assert EnsembleModel(members).member(1) is members[1]
    assert model.member(1).tta == model.tta
    assert EnsembleModel(members, (1e308, 1e308)).shares == (0.5, 0.5)


@pytest.mark.parametrize(
    "weights", [(1,), (1, 1, 1), (1, -1), (1, 0), (1, math.nan), (1, math.inf), (1e-300, 1e300), ()]
)
def test_weights_that_cannot_be(weights) -> None:
    with pytest.raises(RecipeError, match="--teacher-weights") as caught:
        EnsembleModel([Strided(4, 0), Strided(4, 1)], weights)
    assert "2 teachers" in caught.value.problem


@pytest.mark.parametrize(
    "text",
    ["", "flop", "flip=1", "scales", "scales=", "scales=0", "scales=-1:1", "scales=1:1", "scales=nan", "scales=inf",
     "scales=9", "scales=1;2", "flip,,scales=1"],
)  # fmt: skip
def test_augmentations_that_cannot_be(text) -> None:
    with pytest.raises(RecipeError, match="--tta"):
        Tta.parse(text)


def test_members_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="different classes") as caught:
        EnsembleModel([Strided(4, 0), Strided(4, 1, classes=5)])
    assert "strided 4 5" in caught.value.problem
    with pytest.raises(ModelError, match="align_corners"):
        EnsembleModel([Strided(4, 0), Strided(4, 1, align_corners=True)])
    with pytest.raises(ModelError, match="Unknown tap"):
        EnsembleModel([Strided(4, 0)]).check_taps(["far"])
