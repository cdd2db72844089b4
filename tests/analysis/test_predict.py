"""Predictions for images of no data set: their own size, upright, readable as labels; names that clash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.analysis.predict import Input, argmax_at, find_images, overlay, predict_images
from kdcache.analysis.runs import unnamed_classes
from kdcache.data import ClassList
from kdcache.data.classes import read_classes
from kdcache.data.files import read_image
from kdcache.errors import DataError, ModelError, RecipeError
from kdcache.models import SegmentationModel

SIZE = (32, 48)
TURNED = 6  # EXIF: the camera was held upright, rows are columns


@pytest.fixture
def classes() -> ClassList:
    return ClassList(("road", "car", "sky", "tree", "never"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of several sizes and kinds, one turned by its camera, one in a folder below, and a text file."""
    root = tmp_path / "photos"
    (root / "day").mkdir(parents=True)
    rng = np.random.default_rng(5)
    for name, size in (("a.png", (40, 60)), ("b.JPG", (70, 50)), ("day/a.png", (33, 47)), ("turned.jpg", (30, 64))):
        coarse = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
        exif = Image.Exif()
        if "turned" in name:
            exif[0x0112] = TURNED
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(root / name, exif=exif)
    (root / "notes.txt").write_text("no image")
    return root


def test_labels_and_overlays_are_what_the_model_says(
    model: SegmentationModel, classes: ClassList, photos: Path, tmp_path: Path
) -> None:
    images = find_images([str(photos)])
    assert [image.name for image in images] == ["a", "b", "day/a", "turned"]
    seen: list[tuple[int, int]] = []
    counts = predict_images(
        model, classes, images, tmp_path / "out", SIZE, batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(3, 4), (4, 4)]
    total = np.zeros(5, np.int64)
    for image in images:
        pixels = read_image(image.path)
        small = np.array(Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.BILINEAR))
        with torch.inference_mode():
            logits = model.eval()(model.normalise(torch.from_numpy(small)[None])).logits
            said = model.upsample(logits, pixels.shape[:2])[0].argmax(0).numpy()
        with Image.open(tmp_path / "out/labels" / f"{image.name}.png") as shown:
            assert shown.mode == "P"
            label, coloured = np.array(shown), np.array(shown.convert("RGB"))
        assert label.shape == pixels.shape[:2]
        assert (label != said).mean() < 2e-3  # rounding in ties
        colours = np.array(classes.colours)[label]
        assert np.array_equal(coloured, colours)
        mixed = np.rint(0.5 * pixels + 0.5 * colours)
        assert np.abs(read_image(tmp_path / "out/overlays" / f"{image.name}.png") - mixed).max() <= 1
        total += np.bincount(label.reshape(-1), minlength=5)
    assert np.array_equal(counts, total)
    assert (counts > 0).sum() > 1
    assert read_image(photos / "turned.jpg").shape[:2] == (64, 30)
    assert read_classes(tmp_path / "out") == classes
    assert not list((tmp_path / "out").rglob("*.partial"))


@pytest.mark.parametrize("align", [False, True])
def test_class_by_class_is_the_argmax(model: SegmentationModel, align: bool) -> None:
    model.align_corners = align
    logits = torch.randn(7, 9, 11, generator=torch.Generator().manual_seed(0))
    said = argmax_at(model, logits, (50, 37))
    assert said.dtype == torch.uint8
    assert torch.equal(said.long(), model.upsample(logits[None], (50, 37))[0].argmax(0))


def test_overlay_mixes() -> None:
    classes = ClassList(("a", "b"), ((200, 0, 0), (0, 100, 0)))
    pixels = np.full((1, 2, 3), 100, np.uint8)
    ids = np.array([[0, 1]], np.uint8)
    assert overlay(pixels, ids, classes, 0.5).tolist() == [[[150, 50, 50], [50, 100, 50]]]
    assert np.array_equal(overlay(pixels, ids, classes, 0.0), pixels)
    assert overlay(pixels, ids, classes, 1.0).tolist() == [[[200, 0, 0], [0, 100, 0]]]


def test_files_folders_and_patterns(photos: Path) -> None:
    assert [i.name for i in find_images([str(photos / "a.png"), str(photos / "b.JPG")])] == ["a", "b"]
    assert find_images([str(photos / "*.jpg")]) == [Input(photos / "turned.jpg", "turned")]
    assert find_images([str(photos / "a.png"), str(photos / "*.png")]) == [Input(photos / "a.png", "a")]
    assert [i.name for i in find_images([str(photos / "day"), str(photos / "b.JPG")])] == ["a", "b"]


def test_names_that_clash_are_refused(photos: Path) -> None:
    with pytest.raises(DataError, match=r"photos/a\.png and .*day/a\.png"):
        find_images([str(photos / "a.png"), str(photos / "day")])
    with pytest.raises(DataError, match=r"two results a\.png"):
        find_images([str(photos / "**/*.png")])
    (photos / "a.png").rename(photos / "b.png")
    with pytest.raises(DataError, match=r"b\.JPG and .*b\.png"):
        find_images([str(photos)])


def test_what_is_no_image_is_named(photos: Path) -> None:
    for given, received in [
        ("notes.txt", r"notes\.txt"),
        ("none.png", r"not found: \S+none\.png"),
        ("*.gif", r"\*\.gif"),
    ]:
        with pytest.raises(DataError, match=received):
            find_images([str(photos / given)])
    (photos / "empty").mkdir()
    with pytest.raises(DataError, match="No images"):
        find_images([str(photos / "empty")])


def test_wrong_places_and_numbers(model: SegmentationModel, classes: ClassList, photos: Path, tmp_path: Path) -> None:
    images = find_images([str(photos / "a.png")])
    with pytest.raises(RecipeError, match="holds something"):
        predict_images(model, classes, images, photos, SIZE)
    with pytest.raises(RecipeError, match="is a file"):
        predict_images(model, classes, images, photos / "notes.txt", SIZE)
    with pytest.raises(RecipeError, match="--out: "):
        predict_images(model, classes, images, photos / "notes.txt/out", SIZE)
    (photos / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png"):
        predict_images(model, classes, images, tmp_path / "out", SIZE)


def test_a_diverged_model_is_not_drawn(
    model: SegmentationModel, classes: ClassList, photos: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.get_parameter("classifier.bias")[1] = float("nan")
    with pytest.raises(ModelError, match=r"NaN[\s\S]*a\.png"):
        predict_images(model, classes, find_images([str(photos / "a.png")]), tmp_path / "out", SIZE)
    assert not list(tmp_path.glob("out/labels/*"))


def test_unnamed_classes_have_colours_of_their_own() -> None:
    classes = unnamed_classes(21)
    assert classes.names[20] == "class 20"
    assert len(set(classes.colours)) == 21
