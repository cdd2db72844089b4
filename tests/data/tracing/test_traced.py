"""Windows and flips of other libraries' augmentations: every pixel comes from where they say."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from kdcache.data import traced
from kdcache.data.tracing import Footprint
from kdcache.errors import DataError

HEIGHT, WIDTH = 48, 72
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # which asks the network when it is imported


def places() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Rows and columns of an image, counted from 1, (2, H, W): 0 is padding."""
    return np.mgrid[1 : HEIGHT + 1, 1 : WIDTH + 1].astype(np.uint8)


def assert_shows(rows: Any, columns: Any, window: Any, flip: bool) -> None:
    """Every moved pixel is the one that contains the position which the window gives it, or padding beyond the image.

    A position is rounded by OpenCV to 2**-16 of a pixel, 72 times over: within 1e-3 of an edge either side is right.
    """
    height, width = rows.shape
    y = window[0] + (np.arange(height) + 0.5) * (window[2] - window[0]) / height
    x = window[1] + (np.arange(width) + 0.5) * (window[3] - window[1]) / width
    y, x = np.meshgrid(y, x[::-1] if flip else x, indexing="ij")
    outside = (y < 0) | (y >= HEIGHT) | (x < 0) | (x >= WIDTH)
    for moved, at in ((rows, y), (columns, x)):
        number = np.asarray(moved).astype(np.int64)
        assert np.array_equal(number == 0, outside)
        assert (outside | ((number - 1 <= at + 1e-3) & (at <= number + 1e-3))).all(), (window, flip)


NEAREST = {"interpolation": InterpolationMode.NEAREST_EXACT}
V2: dict[str, Callable[[], Any]] = {
    "resized crop": lambda: v2.RandomResizedCrop((20, 30), **NEAREST),
    "resized crop and flip": lambda: v2.Compose([v2.RandomResizedCrop((20, 30), **NEAREST), v2.RandomHorizontalFlip()]),
    "flip before the crop": lambda: v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomCrop((20, 30))]),
    "jitter of scale": lambda: v2.Compose([v2.ScaleJitter((96, 96), (0.5, 2.0), **NEAREST), v2.RandomHorizontalFlip()]),
    "a crop that pads": lambda: v2.RandomCrop((64, 40), pad_if_needed=True),
    "zoomed out": lambda: v2.RandomZoomOut(p=1.0),
    "shorter side, centre": lambda: v2.Compose([v2.Resize(30, **NEAREST), v2.CenterCrop((24, 51))]),
    "nested, and colours": lambda: v2.Compose([
        v2.ColorJitter(0.3, 0.3),
        v2.RandomApply([v2.Compose([v2.RandomCrop((30, 40)), v2.Resize((15, 20), **NEAREST)])], p=0.5),
        v2.RandomChoice([v2.RandomHorizontalFlip(1.0), v2.Identity()]),
        v2.GaussianBlur(3),
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize([0.5] * 3, [0.2] * 3),
        v2.ToPureTensor(),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", V2)
def test_windows_of_torchvision_are_what_their_pixels_show(name: str) -> None:
    torch.manual_seed(3)
    augment, labels = traced(V2[name]()), places()
    flips = set()
    for _ in range(12):
        image = tv_tensors.Image(torch.from_numpy(np.concatenate([labels, labels[:1]])))
        moved, *masks, window, flip = augment(image, *map(tv_tensors.Mask, torch.from_numpy(labels)))
        flips.add(flip)
        # Colours change the image; masks are resized by torchvision's older rule, to a pixel beside.
        assert_shows(*(masks if name == "nested, and colours" else moved[:2]), window, flip)
    assert len(flips) == (2 if name in ("resized crop and flip", "jitter of scale", "nested, and colours") else 1)


def test_random_numbers_are_those_of_the_transform_itself() -> None:
    transform = V2["resized crop and flip"]()
    image = tv_tensors.Image(torch.arange(3 * HEIGHT * WIDTH, dtype=torch.int32).remainder(251).to(torch.uint8).view(
        3, HEIGHT, WIDTH
    ))  # fmt: skip
    torch.manual_seed(5)
    alone = [transform(image) for _ in range(4)]
    torch.manual_seed(5)
    assert all(torch.equal(one, traced(transform)(image)[0]) for one in alone)


@pytest.mark.parametrize("name", ["RandomRotation", "RandomAffine", "RandomPerspective", "ElasticTransform"])
def test_what_moves_pixels_otherwise_is_refused(name: str) -> None:
    transform = {
        "RandomRotation": lambda: v2.RandomRotation(10),
        "RandomAffine": lambda: v2.RandomAffine(10),
        "RandomPerspective": lambda: v2.RandomPerspective(p=1.0),
        "ElasticTransform": v2.ElasticTransform,
    }[name]()
    with pytest.raises(DataError, match="moves pixels in other ways"):
        traced(transform)(torch.zeros(3, HEIGHT, WIDTH))


def test_a_vertical_flip_is_refused_even_where_it_is_drawn_seldom() -> None:
    torch.manual_seed(0)
    augment = traced(v2.RandomVerticalFlip())

    def twenty() -> None:
        for _ in range(20):
            augment(torch.zeros(3, HEIGHT, WIDTH))

    with pytest.raises(DataError, match="vertical_flip"):
        twenty()


def test_other_transforms_and_inputs_are_refused() -> None:
    with pytest.raises(DataError, match=r"torchvision\.transforms\.v2"):
        traced(lambda image: image)
    with pytest.raises(DataError, match=r"ToPureTensor .*\n.*Put it last"):
        traced(v2.Compose([v2.ToPureTensor(), v2.RandomHorizontalFlip()]))
    with pytest.raises(DataError, match="Cannot find an image to trace among ndarray"):
        traced(v2.RandomHorizontalFlip())(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="unseen"):
        traced(v2.Lambda(lambda image: image[..., 1:, :], tv_tensors.Image))(tv_tensors.Image(torch.zeros(3, 4, 4)))
    with pytest.raises(DataError, match="unseen"):
        traced(v2.Lambda(lambda image: image / 255, torch.Tensor))(torch.zeros(3, 4, 4))


def test_traced_transforms_travel_to_workers() -> None:
    augment = pickle.loads(pickle.dumps(traced(V2["resized crop and flip"]())))
    image, window, _flip = augment(torch.zeros(3, HEIGHT, WIDTH))
    assert image.shape == (3, 20, 30)
    assert 0 <= window[0] < window[2] <= HEIGHT


def test_a_footprint_of_a_mirrored_crop() -> None:
    shown = Footprint.whole((10, 20)).mirror().crop(0, 2, 10, 4)
    assert (shown.window, shown.flip) == ((0.0, 14.0, 10.0, 18.0), True)
    assert shown.resize((5, 2)).crop(1, 0, 4, 1).window == (2.0, 16.0, 10.0, 18.0)
    assert shown.pad(1, 0, 0, 0).window == (0.0, 14.0, 10.0, 19.0)


# --- albumentations ----------------------------------------------------------------------------------------


def compositions(a: Any) -> dict[str, Any]:
    nearest = {"interpolation": 6, "mask_interpolation": 6}  # cv2.INTER_NEAREST_EXACT
    return {
        "resized crop and flip": [a.RandomResizedCrop((20, 30), **nearest), a.HorizontalFlip()],
        "flip before the crop": [a.HorizontalFlip(p=1.0), a.RandomCrop(20, 30)],
        "padded": [a.PadIfNeeded(64, 80), a.RandomCrop(60, 70), a.HorizontalFlip()],
        "a crop that pads": [a.RandomCrop(64, 40, pad_if_needed=True)],
        "a crop with a class": [a.CropNonEmptyMaskIfExists(20, 30), a.HorizontalFlip()],
        "often nothing": [a.HorizontalFlip()],
        "nothing": [],
        "nested, and colours": [
            a.OneOf([a.RandomSizedCrop((20, 40), (20, 30), **nearest), a.Resize(20, 30, **nearest)], p=1.0),
            a.ColorJitter(p=1.0),
            a.SomeOf([a.GaussNoise(p=1.0), a.HorizontalFlip(p=1.0)], n=1),
            a.CoarseDropout(p=1.0),
            a.Normalize(),
        ],
    }


NAMES = (
    "nothing",
    "often nothing",
    "resized crop and flip",
    "flip before the crop",
    "padded",
    "a crop that pads",
    "a crop with a class",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*NAMES, "nested, and colours"])
def test_windows_of_albumentations_are_what_their_pixels_show(name: str) -> None:
    a = pytest.importorskip("albumentations")
    augment = traced(a.Compose(compositions(a)[name], seed=4, additional_targets={"columns": "mask"}))
    image, (rows, columns) = np.zeros((HEIGHT, WIDTH, 3), np.uint8), places()
    for _ in range(12):
        result = augment(image=image, mask=rows, columns=columns)
        assert_shows(result["mask"], result["columns"], result["window"], result["flip"])


@pytest.mark.filterwarnings("ignore")
def test_what_albumentations_moves_otherwise_is_refused() -> None:
    a = pytest.importorskip("albumentations")
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for transform in (a.Rotate(p=1.0), a.D4(p=1.0), a.VerticalFlip(p=1.0), a.GridDistortion(p=1.0)):
        with pytest.raises(DataError, match=type(transform).__name__):
            traced(a.Compose([transform]))
    with pytest.raises(DataError, match="Rotate"):
        traced(a.Compose([a.HorizontalFlip(), a.OneOf([a.RandomCrop(8, 8), a.Rotate(p=0.01)])]))
    with pytest.raises(DataError, match=r"single transform: HorizontalFlip\n.*Wrap it"):
        traced(a.HorizontalFlip())
    with pytest.raises(DataError, match=r"Missing image= .*: it has mask"):
        traced(a.Compose([a.HorizontalFlip()]))(mask=image)
    with pytest.raises(DataError, match="2 arguments without a name"):
        traced(a.Compose([a.HorizontalFlip()]))(image, image)


@pytest.mark.filterwarnings("ignore")
def test_albumentations_draws_as_without_a_trace_and_travels() -> None:
    a = pytest.importorskip("albumentations")
    rows = places()[0]
    parts = lambda: a.Compose([a.RandomResizedCrop((20, 30)), a.HorizontalFlip()], seed=9)  # noqa: E731
    image = np.repeat(rows[..., None], 3, 2)
    alone, augment = parts(), pickle.loads(pickle.dumps(traced(parts())))
    assert all(np.array_equal(alone(image=image)["image"], augment(image=image)["image"]) for _ in range(5))
