"""RandAugment's colour operations against torchvision's, on the same pictures at the same magnitudes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandAugment as Torchvisions
from torchvision.transforms.autoaugment import _apply_op

from kdcache.data import Augmentation, RandAugment, colour_jitter
from kdcache.data.rendering.rand_augment import BINS, OPERATIONS

NAMES = (
    "Identity",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
PIXELS = (np.random.default_rng(0).integers(0, 256, (20, 30, 3)) // 2 + 40).astype(np.uint8)


def torchvisions(name: str, magnitude: int, negative: bool) -> np.ndarray:
    values, signed = Torchvisions()._augmentation_space(BINS, PIXELS.shape[:2])[name]
    value = float(values[magnitude]) if values.ndim else 0.0
    value = -value if signed and negative else value
    return np.asarray(_apply_op(Image.fromarray(PIXELS), name, value, InterpolationMode.NEAREST, None))


class Fixed:
    """A generator whose draws are known."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def integers(self, high: int, size: int) -> np.ndarray:
        assert (high, size) == (2 * len(NAMES), len(self.numbers))
        return np.array(self.numbers)


@pytest.mark.parametrize("magnitude", [0, 1, 9, 17, 30])
@pytest.mark.parametrize("number", range(2 * len(NAMES)))
def test_an_operation_is_torchvisions(number, magnitude) -> None:
    result = RandAugment(1, magnitude)(Fixed(number), PIXELS)
    wanted = torchvisions(NAMES[number // 2], magnitude, bool(number % 2))
    assert np.abs(result.astype(int) - wanted).max() <= 1  # its magnitudes are float32
    assert result.flags.writeable


def test_no_operation_is_geometry() -> None:
    space = Torchvisions()._augmentation_space(BINS, (20, 30))
    assert [name for name in space if not name.startswith(("Shear", "Translate", "Rotate"))] == list(NAMES)
    assert len(OPERATIONS) == len(NAMES)


def test_draws_are_repeated_and_leave_the_generator_where_jitter_does() -> None:
    results, after = [], set()
    for jitter in (0.3, RandAugment(2, 9), RandAugment(2, 9), RandAugment(5, 20)):
        rng = np.random.default_rng(3)
        results.append(colour_jitter(rng, PIXELS, jitter, out=np.empty_like(PIXELS)))
        after.add(rng.random())
    assert len(after) == 1
    np.testing.assert_array_equal(results[1], results[2])
    assert len({result.tobytes() for result in results}) == 3


def test_operations_follow_each_other_and_are_all_drawn() -> None:
    one = RandAugment(1, 12)(Fixed(2), PIXELS)
    np.testing.assert_array_equal(RandAugment(2, 12)(Fixed(2, 11), PIXELS), RandAugment(1, 12)(Fixed(11), one))
    seen = {RandAugment(1, 20)(np.random.default_rng(seed), PIXELS).tobytes() for seed in range(300)}
    assert len(seen) == 13  # four of the nine have two signs


@pytest.mark.parametrize(("operations", "magnitude"), [(0, 9), (2, 31), (2, -1)])
def test_numbers_that_it_cannot_have_are_refused(operations, magnitude) -> None:
    with pytest.raises(ValueError, match="magnitude of 0 to 30"):
        Augmentation(jitter=RandAugment(operations, magnitude))
