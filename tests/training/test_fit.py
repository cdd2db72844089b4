"""Images of another shape than the pixels: padding teaches nothing, equal shapes change nothing, stores decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from kdcache.data import IGNORE_INDEX, OUTSIDE_RGB, Augmentation, open_split
from kdcache.distill import DistillLoss
from kdcache.errors import RecipeError
from kdcache.models import build_model
from kdcache.run_folder import Run
from kdcache.store import Records, open_cache
from kdcache.training import CacheDataset, LabelledDataset, Observer, make_config, read_config, train
from kdcache.training.run.sample_panels import sample_panels

SQUARE = (32, 32)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Images of 24 x 64 of which every pixel has a label."""
    root, random = tmp_path_factory.mktemp("wide"), np.random.default_rng(0)
    (root / "classes.txt").write_text("a\nb\nc\n")
    for split, count in (("train", 4), ("val", 2)):
        for kind, levels, shape in (("images", 256, (24, 64, 3)), ("labels", 3, (24, 64))):
            (root / kind / split).mkdir(parents=True)
            for number in range(count):
                content = random.integers(0, levels, shape, dtype=np.uint8)
                Image.fromarray(content).save(root / kind / split / f"{number}.png")
    return str(root)


@pytest.mark.parametrize("pixels", ["stored", "source"])
@pytest.mark.parametrize("augment", ["replay", "warp", "none"])
def test_padding_gives_no_gradient(augment: str, pixels: str, make_cache: Callable, wide: str) -> None:
    """Neither by the cross-entropy nor by the targets, in any pixel; every pixel of the image gives some."""
    views = 3 if augment == "replay" else 1
    cache = open_cache(make_cache(wide, size=SQUARE, fit="pad", views=views, pixels=pixels))
    assert cache.manifest.view.fit == "pad"
    records = Records(cache, open_split(wide, "train") if pixels == "source" else None)
    drawn = Augmentation(scale=(0.5, 2.0), flip=True, jitter=0.0) if augment == "warp" else Augmentation.off()
    dataset = CacheDataset(records, augment=augment, augmentation=drawn)
    batch = default_collate([dataset.draw(number, 1, np.random.default_rng(number)) for number in range(len(dataset))])
    shown = batch.label != IGNORE_INDEX
    assert 0.15 < shown.float().mean() < 0.9
    assert (batch.pixels[~shown].float() - torch.tensor(OUTSIDE_RGB)).abs().mean() < 12  # but for blends at the border
    for weights in ({"ce_weight": 1.0, "kl_weight": 0.0}, {"ce_weight": 0.0, "kl_weight": 1.0}):
        student = torch.randn(len(dataset), cache.num_classes, *SQUARE, generator=torch.Generator().manual_seed(0))
        student.requires_grad_()
        DistillLoss(cache, **weights)(student, batch).loss.backward()
        gradient = student.grad.abs().sum(1)
        assert (gradient[~shown] == 0).all()
        assert (gradient[shown] > 0).all()


def test_without_the_rectangle_padding_would_teach(make_cache: Callable, wide: str) -> None:
    """The test above can fail."""
    cache = open_cache(make_cache(wide, size=SQUARE, fit="pad"))
    dataset = CacheDataset(cache, augment="none")
    batch = default_collate([dataset.draw(0, 0, np.random.default_rng(0))])
    batch = replace(batch, inside=None)
    student = torch.randn(1, cache.num_classes, *SQUARE, requires_grad=True)
    DistillLoss(cache, ce_weight=0.0, kl_weight=1.0)(student, batch).loss.backward()
    assert (student.grad.abs().sum(1)[batch.label == IGNORE_INDEX] > 0).any()


@pytest.mark.parametrize(("fit", "shown"), [("squash", 1.0), ("crop", 1.0), ("pad", 0.375)])
def test_a_data_set_is_fitted(fit: str, shown: float, wide: str) -> None:
    dataset = LabelledDataset(open_split(wide, "train"), SQUARE, Augmentation.off(), fit=fit)
    sample = dataset.draw(0, 0, np.random.default_rng(0))
    assert (sample.label != IGNORE_INDEX).float().mean() == shown
    if fit == "pad":
        rows = (sample.label != IGNORE_INDEX).all(1)
        assert int(rows.sum()) == 12  # 24 of 64 rows at half the size


def teacher(data: str, **settings: Any) -> Any:
    fixed = {"verb": "train-teacher", "model": "kdcache:tiny", "iterations": 3, "batch_size": 2, "workers": 0}
    return make_config(data=data, **fixed, **settings)


def test_equal_shapes_are_trained_to_the_same_weights(tmp_path) -> None:
    for fit in ("auto", "squash", "crop", "pad"):
        train(teacher("scenes:32x48,train=4,val=2", size="32x48", fit=fit), tmp_path / fit)
    weights = [(tmp_path / fit / "last.safetensors").read_bytes() for fit in ("auto", "squash", "crop", "pad")]
    assert len(set(weights)) == 1
    assert Run(tmp_path / "auto").model.fit == "squash"
    assert "fit" not in (tmp_path / "auto/model.json").read_text()


class Notes(Observer):
    """The notes of a training."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_other_shapes_are_padded_unless_it_is_asked_otherwise(tmp_path, wide: str) -> None:
    notes = Notes()
    train(teacher(wide, size="32x32"), tmp_path / "auto", observer=notes)
    train(teacher(wide, size="32x32", fit="pad"), tmp_path / "pad")
    train(teacher(wide, size="32x32", fit="squash"), tmp_path / "squash")
    auto, pad, squash = ((tmp_path / fit / "last.safetensors").read_bytes() for fit in ("auto", "pad", "squash"))
    assert auto == pad != squash
    assert Run(tmp_path / "auto").recipe["fit"] == "pad"
    (text,) = (text for text in notes.texts if "--fit" in text)
    assert "0 of 24x64 has another shape than 32x32 by 167 %" in text


@pytest.mark.parametrize(("second", "fit"), [("24x64", "pad"), ("16x16", "squash")])
def test_a_stream_of_another_shape_pads_all(second: str, fit: str, tmp_path) -> None:
    streams = [
        {"name": name, "data": f"scenes:{size},train=4,val=1", "share": 0.5}
        for name, size in (("even", "32x32"), ("other", second))
    ]
    settings = {"verb": "train-student", "model": "kdcache:tiny", "size": "32x32", "stream": streams}
    train(make_config(**settings, iterations=2, batch_size=2, workers=0), tmp_path / "run")
    assert Run(tmp_path / "run").recipe["fit"] == fit


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_pictures_of_samples_show_the_image_alone(fit: str, wide: str) -> None:
    split = open_split(wide, "val")
    torch.manual_seed(0)
    model = build_model("kdcache:tiny", len(split.classes))
    panels = sample_panels(model, split, SQUARE, torch.device("cpu"), fit)()
    assert len(panels) == 2
    for picture in panels.values():
        assert picture.shape == (12, 4 * 32 + 3 * 4, 3)  # 24 x 64 at half its size, four times
        shown, label = picture[:, :32].astype(int), picture[:, 36:68]
        assert np.abs(shown - np.array(OUTSIDE_RGB)).mean() > 20
        colours = {tuple(colour) for colour in label.reshape(-1, 3).tolist()}
        assert colours <= set(split.classes.colours)  # no void: every pixel has a label


def test_a_run_remembers_its_fit(tmp_path, wide: str) -> None:
    train(teacher(wide, size="32x32", fit="pad"), tmp_path / "run")
    assert Run(tmp_path / "run").model.fit == "pad"
    assert Run(tmp_path / "run").recipe["fit"] == "pad"
    # A run of the time before has no fit, and resumes as it began.
    recipe = tmp_path / "run/recipe.toml"
    recipe.write_text(recipe.read_text().replace('fit = "pad"\n', ""))
    assert read_config(tmp_path / "run").data.fit == "squash"


def test_a_store_decides(make_cache: Callable, tmp_path, wide: str) -> None:
    path = make_cache(wide, size=SQUARE, fit="pad")
    settings = {"verb": "train-student", "cache": str(path), "model": "kdcache:tiny", "iterations": 2, "batch_size": 2}
    train(make_config(**settings, workers=0, val=wide), tmp_path / "run")
    assert Run(tmp_path / "run").model.fit == "pad"
    for wrong, rule in (
        ({"fit": "squash"}, "Cannot use --fit squash"),
        ({"size": "32x48"}, "Cannot use --size 32x48"),
    ):
        with pytest.raises(RecipeError) as caught:
            train(make_config(**settings, workers=0, **wrong), tmp_path / "other")
        assert rule in caught.value.problem
    assert not (tmp_path / "other").exists()


def test_manifests_say_a_fit_where_older_ones_had_none(make_cache: Callable, wide: str) -> None:
    squashed, padded = (open_cache(make_cache(wide, size=SQUARE, fit=fit)) for fit in ("squash", "pad"))
    assert "fit" not in squashed.manifest.to_json()["view"]
    assert padded.manifest.to_json()["view"]["fit"] == "pad"
    assert "source_size" not in {path.rpartition("/")[2] for path in squashed.specs}
    assert "records/source_size" in padded.specs
