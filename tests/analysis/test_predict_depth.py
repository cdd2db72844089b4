"""Depth that is predicted for images: read back as a data folder, refused where no file can hold it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from kdcache.analysis.predict import PredictOptions, find_images, predict_images
from kdcache.data import ClassList, open_split
from kdcache.errors import ModelError, RecipeError
from kdcache.models import SegmentationModel, build_model

SIZE, OWN = (24, 40), (40, 56)
CLASSES = ClassList(("road", "car", "sky"))


def with_depth(spec: str) -> SegmentationModel:
    torch.manual_seed(1)
    model = build_model(spec, len(CLASSES))
    assert isinstance(model.depth_head, torch.nn.Sequential)
    with torch.no_grad():
        model.depth_head[-1].weight.mul_(100)
    return model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    source = open_split("scenes:40x56,train=1,val=2", "val")
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.fromarray(source.image(number)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("spec", "suffix", "tolerance"),
    [
        ("kdcache:tiny+depth,max=60", "png", 0.0005),
        ("kdcache:tiny+depth", "png", 1 / 512),
        ("kdcache:tiny+depth,max=300", "npy", 0),
    ],
)
def test_depth_is_read_back_as_a_data_folder(photos: Path, spec: str, suffix: str, tolerance: float) -> None:
    model, out = with_depth(spec), photos.parent / "out"
    predict_images(model, CLASSES, find_images([str(photos)]), out, SIZE, options=PredictOptions(depth_format=suffix))
    assert (out / "depth.toml").is_file() is (suffix == "png")
    shutil.copytree(photos, out / "images")
    split = open_split(str(out), "train")
    assert split.tasks == ("segmentation", "depth")
    for index in range(2):
        image = split.image(index)
        small = np.array(Image.fromarray(image).resize(SIZE[::-1], Image.Resampling.BILINEAR))
        with torch.inference_mode():
            raw = model(model.normalise(torch.from_numpy(small)[None])).heads["depth"]
            full = F.interpolate(raw, OWN, mode="bilinear", align_corners=model.align_corners)[0, 0].double()
        metres = np.minimum(np.log1p(np.exp(full.numpy())), model.regressions["depth"].max_depth or np.inf)
        label = split.label(index, "depth")
        assert label is not None
        np.testing.assert_allclose(label, metres, atol=tolerance + 1e-4)
        with Image.open(out / "depth_colours" / f"{index}.png") as coloured:
            assert coloured.width >= OWN[1]
            assert coloured.height > OWN[0]


def test_a_model_of_depth_alone_writes_no_classes(photos: Path) -> None:
    model = with_depth("kdcache:tiny+depth")
    del model.head_kinds["segmentation"]
    forward = model.forward
    model.forward = lambda x, taps=(): forward(x, taps)._replace(heads={"depth": forward(x).heads["depth"]})
    predict_images(model, ClassList(()), find_images([str(photos)]), photos.parent / "out", SIZE)
    assert sorted(path.name for path in (photos.parent / "out").iterdir()) == ["depth", "depth.toml", "depth_colours"]


def test_what_no_file_holds_is_refused(photos: Path) -> None:
    images, out = find_images([str(photos)]), photos.parent / "out"
    with pytest.raises(RecipeError, match="--depth-format npy"):
        predict_images(with_depth("kdcache:tiny+depth,max=300"), CLASSES, images, out, SIZE)
    with pytest.raises(RecipeError, match=r"'jpg'[\s\S]*png, npy"):
        PredictOptions(depth_format="jpg")
    assert not out.exists()
    broken = with_depth("kdcache:tiny+depth")
    with torch.no_grad():
        broken.depth_head[-1].bias.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN or infinite outputs of"):
        predict_images(broken, CLASSES, images, out, SIZE)
