"""Images of another shape and sliding windows in Python: settings have effects, and the command line's defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kdcache
from kdcache.errors import RecipeError
from kdcache.metrics import Framing, Inference, evaluate_tasks
from kdcache.models.run import open_model
from kdcache.run_folder import Run
from kdcache.store import open_cache, read_manifest

WIDE = "scenes:24x64,train=6,val=3"
SHORT: dict[str, Any] = {"iterations": 3, "batch_size": 2, "device": "cpu", "gradients_every": 0, "progress": False}
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of padded images and one of squashed ones."""
    folder = tmp_path_factory.mktemp("fits")
    kdcache.train(folder / "pad", model="kdcache:tiny", data=WIDE, size=(32, 32), **SHORT)
    kdcache.train(folder / "squash", model="kdcache:tiny", data=WIDE, size=(32, 32), fit="squash", **SHORT)
    return folder


def judged(run: Path, framing: Framing, size: tuple[int, int] = (32, 32)) -> Any:
    split = kdcache.open_split(WIDE, "val")
    return evaluate_tasks(open_model(str(run), split.classes)[0], split, Inference(size, framing=framing))


def test_a_training_pads_by_default_and_squashes_on_demand(runs: Path) -> None:
    assert Run(runs / "pad").model.fit == "pad"
    assert Run(runs / "squash").model.fit == "squash"


def test_an_evaluation_shows_images_as_they_were_learnt_and_otherwise_on_demand(runs: Path) -> None:
    for name in ("pad", "squash"):
        scores = [
            kdcache.evaluate(runs / name, WIDE, fit=fit, **QUIET).metrics for fit in ("auto", "pad", "crop", "squash")
        ]
        expected = [judged(runs / name, Framing(fit)) for fit in (name, "pad", "crop", "squash")]  # type: ignore[arg-type]
        assert scores == expected
        assert len({str(score) for score in scores}) == 3  # auto is one of the others
        # What is kept of one way is not used for another.
        assert scores == [
            kdcache.evaluate(runs / name, WIDE, fit=fit, **QUIET).metrics for fit in ("auto", "pad", "crop", "squash")
        ]


def test_windows_slide_over_images_of_their_own_size_or_resized(runs: Path) -> None:
    own = kdcache.evaluate(runs / "pad", WIDE, window=(24, 32), stride=(24, 16), **QUIET)
    assert own.metrics == judged(runs / "pad", Framing("pad", (24, 32), (24, 16)))
    assert own != kdcache.evaluate(runs / "pad", WIDE, window=(24, 32), stride=(24, 8), **QUIET)
    larger = kdcache.evaluate(runs / "pad", WIDE, window="32x32", size="48x128", **QUIET)
    assert larger.metrics == judged(runs / "pad", Framing("pad", (32, 32), None, (48, 128)), (48, 128))
    assert kdcache.evaluate(runs / "pad", WIDE, **QUIET).metrics == judged(runs / "pad", Framing("pad"))


def test_a_module_and_a_loaded_teacher_are_judged_alike(runs: Path) -> None:
    split = kdcache.open_split(WIDE, "val")
    loaded = kdcache.load_teacher(runs / "pad", split)
    assert kdcache.evaluate(loaded, split, **QUIET) == kdcache.evaluate(runs / "pad", WIDE, **QUIET)
    module = {"size": (32, 32), **QUIET}
    assert kdcache.evaluate(loaded.model, split, fit="pad", **module) != kdcache.evaluate(loaded.model, split, **module)
    windows = kdcache.evaluate(loaded.model, split, window=(24, 32), **QUIET)
    assert windows.metrics == judged(runs / "pad", Framing("squash", (24, 32)), (24, 32))


def test_a_comparison_has_the_fit_and_the_windows(runs: Path) -> None:
    settings = {"data": WIDE, "split": "val", "repeats": 0, **QUIET}
    for asked in ({}, {"fit": "crop"}, {"window": (24, 32)}):
        comparison = kdcache.compare([runs / "pad"], **settings, **asked)
        assert (
            comparison.rows[0].runs[0].metrics.miou
            == kdcache.evaluate(runs / "pad", WIDE, **QUIET, **asked).segmentation.miou
        )


def test_a_store_is_padded_by_default_and_goes_on_as_it_was_begun(runs: Path, tmp_path: Path, capsys: Any) -> None:
    build = {"split": "train", "device": "cpu"}
    kdcache.build_cache(WIDE, runs / "pad", tmp_path / "pad.zarr", **build)
    shown = "".join(capsys.readouterr())
    assert "has another shape than 32x32 by 167 %" in shown
    assert read_manifest(tmp_path / "pad.zarr").view.fit == "pad"
    kdcache.build_cache(WIDE, runs / "pad", tmp_path / "old.zarr", fit="squash", **build)
    before = open_cache(tmp_path / "old.zarr").manifest
    result = kdcache.build_cache(WIDE, runs / "pad", tmp_path / "old.zarr", **build)  # as before there was a fit
    assert result.records == 0
    assert result.manifest == before
    assert before.view.fit == "squash"


def test_a_store_of_a_teacher_of_crops_is_cropped_where_others_are_padded(tmp_path: Path, capsys: Any) -> None:
    kdcache.train(tmp_path / "crop", model="kdcache:tiny", data=WIDE, size=(32, 32), fit="crop", **SHORT)
    for data, fit in ((WIDE, "crop"), ("scenes:32x32,train=2,val=1", "squash")):
        kdcache.build_cache(data, tmp_path / "crop", tmp_path / f"{fit}.zarr", device="cpu")
        assert read_manifest(tmp_path / f"{fit}.zarr").view.fit == fit
    assert "images are cropped, as the teacher learnt them" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"fit": "stretch"}, "Give one of auto, squash, crop, pad, for example fit="),
        ({"window": 0}, "Invalid value of window=: 0"),
        ({"window": (0, 8)}, "Give HEIGHTxWIDTH in pixels"),
        ({"window": (16, 16), "stride": (32, 8)}, "stride='32x8' is larger than window='16x16'"),
        ({"stride": (8, 8)}, "stride='8x8' needs window="),
        ({"window": (32, 32)}, "window='32x32' is larger than"),
    ],
)
def test_what_makes_no_sense_is_refused(runs: Path, settings: dict[str, Any], rule: str) -> None:
    for call in (
        lambda: kdcache.evaluate(runs / "pad", WIDE, **settings, **QUIET),
        lambda: kdcache.compare([runs / "pad"], data=WIDE, split="val", repeats=0, **settings, **QUIET),
    ):
        with pytest.raises(RecipeError) as caught:
            call()
        assert rule in str(caught.value)
