"""The small pictures of a contact sheet."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.analysis.gallery import strip

CLASSES = ("ground truth", "teacher", "prediction", "overlay", "errors")
DEPTHS = ("depth, ground truth", "depth, prediction", "depth, absolute error: 2 m")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ((*CLASSES, *DEPTHS), ("ground truth", "prediction")),
        ((*CLASSES, "depth, prediction"), ("ground truth", "prediction")),
        (("prediction", "overlay", *DEPTHS), ("prediction",)),
        (DEPTHS, ("depth, ground truth", "depth, prediction")),
        (("depth, prediction",), ("depth, prediction",)),
    ],
)
def test_ground_truth_and_prediction_are_of_one_task(names: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    grey = {name: 1 + number for number, name in enumerate(names)}
    pictures = [("image", np.zeros((6, 8, 3), np.uint8))]
    pictures += [(name, np.full((6, 8, 3), value, np.uint8)) for name, value in grey.items()]
    row = strip(pictures)[0, :, 0].tolist()
    assert list(dict.fromkeys(value for value in row if value != 255)) == [0, *(grey[name] for name in wanted)]
