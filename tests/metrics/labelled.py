"""Small labelled folders with images of different sizes, and a model that tells classes apart, as fixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.data import Split, open_split
from kdcache.models import SegmentationModel, build_model

SIZES = ((40, 60), (32, 48), (51, 37), (64, 64), (33, 90))
CLASSES = ("road", "car", "sky", "tree", "never")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five labelled images of five sizes and one without a label; the class `never` does not occur."""
    root = tmp_path_factory.mktemp("data")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    rng = np.random.default_rng(2)
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True)
    for number, size in enumerate((*SIZES, (30, 30))):
        coarse = rng.integers(0, 4, (4, 5), dtype=np.uint8)
        rows, columns = (np.arange(side) * cells // side for side, cells in zip(size, (4, 5), strict=True))
        label = coarse[rows][:, columns]
        image = np.clip(label[..., None] * 60 + rng.integers(0, 50, (*size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / "val" / f"{number}.png")
        label[rng.random(size) < 0.1] = 255
        if number < len(SIZES):
            Image.fromarray(label).save(root / "labels" / "val" / f"{number}.png")
    return root


@pytest.fixture
def split(folder: Path) -> Split:
    return open_split(str(folder), "val")


@pytest.fixture
def model() -> SegmentationModel:
    """Random, with scores far enough apart that rounding turns no pixel."""
    torch.manual_seed(4)
    model = build_model("kdcache:tiny", len(CLASSES))
    with torch.no_grad():
        model.classifier.weight.mul_(100)
    return model
