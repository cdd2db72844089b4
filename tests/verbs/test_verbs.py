"""The way from data to a comparison in Python, and what it shows on the way."""

from __future__ import annotations

import importlib
import inspect
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import kdcache
from kdcache import progress
from kdcache.data import open_split, write_scenes
from kdcache.errors import ModelError, RecipeError
from kdcache.progress import Bar

SCENES = "scenes:32x48,train=6,val=3"
SHORT: dict[str, Any] = {"iterations": 2, "batch_size": 2, "device": "cpu", "gradients_every": 0}


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self, split: str) -> None:
        self.scenes = open_split(SCENES, split)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Any:
        return self.scenes.image(index), self.scenes.label(index)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Data in memory, a module as teacher, a store of them, and two runs."""
    folder = tmp_path_factory.mktemp("verbs")
    names = open_split(SCENES, "train").classes.names
    data, val = (kdcache.from_dataset(Items(split), names, split=split) for split in ("train", "val"))
    torch.manual_seed(5)
    module = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 7, 1))
    result = kdcache.build_cache(data, module, folder / "s.zarr", size=(32, 48), views=2, device="cpu", progress=False)
    runs = [
        kdcache.train(
            folder / method,
            model="kdcache:tiny",
            cache=folder / "s.zarr",
            method=method,
            val=val,
            progress=False,
            **SHORT,
        )
        for method in ("none", "kl")
    ]
    return {"folder": folder, "data": data, "val": val, "module": module, "result": result, "runs": runs}


def html_of(value: Any) -> str:
    text: str = value._repr_html_()
    assert text.startswith("<table>")
    assert text.endswith("</table>")
    return text


def test_a_build_shows_what_it_made(world: dict[str, Any]) -> None:
    result, cache = world["result"], kdcache.open_cache(world["folder"] / "s.zarr")
    assert result.complete
    assert result.records == 12
    assert "12 in " in repr(result)
    assert len(repr(result)) < 400
    assert "2 of 32x48" in repr(cache)
    assert "segmentation 8x12, 7 of 7 classes" in html_of(cache)
    assert "memory:Sequential" in html_of(result)
    again = kdcache.build_cache(world["data"], world["module"], result.out, size="32x48", views=2, progress=False)
    assert again.kept == 12


@pytest.mark.parametrize("opened", [False, True])
def test_a_cache_is_built_from_an_earlier_one(world: dict[str, Any], tmp_path: Path, opened: bool) -> None:
    """What is not given is as there: its size, its views and how they are drawn."""
    data, module, place = world["data"], world["module"], world["folder"] / "s.zarr"
    reuse = kdcache.open_cache(place) if opened else place
    more = kdcache.build_cache(data, module, tmp_path / "more.zarr", reuse=reuse, views=3, progress=False)
    assert (more.records, more.reused, more.manifest.view.size) == (6, 12, (32, 48))
    with pytest.raises(RecipeError, match=r"Cannot change size=, top_k= with reuse='.*s.zarr':"):
        kdcache.build_cache(data, module, tmp_path / "other.zarr", reuse=reuse, size=(32, 32), top_k=3)
    with pytest.raises(RecipeError, match="from itself"):
        kdcache.build_cache(data, module, place, reuse=reuse)


def test_runs_show_what_they_reached(world: dict[str, Any]) -> None:
    run = world["runs"][1]
    assert run.recipe["method"] == "kl"
    assert run.recipe["val"] == world["val"].data
    assert "best mIoU" in repr(run)
    assert "kdcache:tiny" in html_of(run)


def test_evaluations_are_kept_and_modules_are_judged(world: dict[str, Any]) -> None:
    run = world["runs"][0]
    metrics = kdcache.evaluate(run, world["val"], device="cpu", progress=False)
    assert list(run.folder.glob("evaluation-val*.json"))
    assert metrics == kdcache.evaluate(str(run.folder), world["val"], device="cpu", progress=False)
    assert "mIoU" in repr(metrics)
    assert "road" in html_of(metrics)
    own = kdcache.evaluate(world["module"], SCENES, size=(32, 48), device="cpu", progress=False)
    assert own.segmentation is not None
    assert own.segmentation.miou >= 0
    with pytest.raises(RecipeError, match="Missing the size"):
        kdcache.evaluate(world["module"], SCENES, progress=False)


def test_a_fresh_evaluation_is_measured_again(world: dict[str, Any]) -> None:
    run = world["runs"][1]
    first, again = (kdcache.evaluate(run, SCENES, device="cpu", progress=False) for _ in range(2))
    fresh = kdcache.evaluate(run, SCENES, fresh=True, device="cpu", progress=False)
    assert (first.reused, again.reused, fresh.reused) == (False, True, False)
    assert first == again == fresh


def test_a_comparison_shows_its_rows(world: dict[str, Any]) -> None:
    comparison = kdcache.compare(world["runs"], repeats=0, device="cpu", progress=False)
    assert comparison.data == world["val"].data
    assert len(comparison.rows) == 2
    assert len(repr(comparison)) < 300
    assert re.search(r"images: \w+ \d+\.\d, \w+ \d+\.\d>", repr(comparison))
    assert "mIoU %" in html_of(comparison)
    assert "&lt;" not in html_of(comparison)


def test_a_teacher_by_itself_is_trained_on_labels(world: dict[str, Any], tmp_path: Path) -> None:
    run = kdcache.train(tmp_path / "t", model="kdcache:tiny", data=SCENES, size=(32, 48), progress=False, **SHORT)
    assert run.recipe is not None
    assert (run.recipe["verb"], run.recipe["val"]) == ("train-teacher", SCENES)
    assert run.recipe.get("val-split", "val") == "val"
    unjudged = kdcache.train(
        tmp_path / "u", model="kdcache:tiny", data=world["data"], size="32x48", progress=False, **SHORT
    )
    assert unjudged.recipe is not None
    assert "val" not in unjudged.recipe
    result = kdcache.build_cache(SCENES, run.folder, tmp_path / "s.zarr", views=1, device="cpu", progress=False)
    assert result.records == 6


def test_what_is_given_goes_before_a_preset(world: dict[str, Any], tmp_path: Path) -> None:
    cache = world["folder"] / "s.zarr"
    run = kdcache.train(tmp_path / "p", model="kdcache:tiny", cache=cache, preset="few-labels", progress=False, **SHORT)
    assert run.recipe is not None
    assert (run.recipe["iterations"], run.recipe["batch-size"]) == (SHORT["iterations"], SHORT["batch_size"])
    assert (run.recipe["method"], run.recipe["augment"]) == ("dist", "replay")


def test_changed_data_fails_a_verification(world: dict[str, Any], tmp_path: Path) -> None:
    data, cache = write_scenes(tmp_path / "data", "scenes:32x48,train=2,val=1"), tmp_path / "s.zarr"
    kdcache.build_cache(data, world["module"], cache, size=(32, 48), views=1, device="cpu", progress=False)
    assert kdcache.verify(cache, data=data, progress=False)
    one, other = sorted((tmp_path / "data/labels/train").iterdir())
    one.write_bytes(other.read_bytes())
    assert kdcache.verify(cache, progress=False)
    assert not kdcache.verify(cache, data=data, progress=False)


def test_what_a_training_cannot_take_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    out, model = tmp_path / "run", "kdcache:tiny"
    with pytest.raises(RecipeError, match=r"value of model=: a torch\.nn\..*Sequential\n.*DistillLoss"):
        kdcache.train(out, model=world["module"], data=SCENES)
    with pytest.raises(RecipeError, match="data is split 'train', not 'val'"):
        kdcache.train(out, model=model, data=world["data"], split="val", size=(32, 48))
    with pytest.raises(RecipeError, match=r"itrations=\n.*iterations="):
        kdcache.train(out, model=model, data=SCENES, itrations=3)
    with pytest.raises(RecipeError, match=r"value of val=: .*DataLoader.*\n.*kdcache\.from_dataset"):
        kdcache.train(out, model=model, data=SCENES, val=torch.utils.data.DataLoader(Items("val")))
    with pytest.raises(RecipeError, match=r"value of data=: .*Items.*\n.*kdcache\.from_dataset"):
        kdcache.build_cache(Items("train"), world["module"], tmp_path / "s", size=(32, 48))
    with pytest.raises(RecipeError, match="Nothing to train on"):
        kdcache.train(out, model=model)
    with pytest.raises(ModelError, match="has 7 classes, but the data set has 2"):
        kdcache.build_cache(
            kdcache.from_dataset([(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))], ["a", "b"]),
            world["module"], tmp_path / "s", size=(8, 8), progress=False,
        )  # fmt: skip
    with pytest.raises(RecipeError, match="Cannot use tta='flip' with a module"):
        kdcache.build_cache(world["data"], world["module"], tmp_path / "s", tta="flip", size=(32, 48), progress=False)
    assert not out.exists()


def test_progress_is_a_bar_where_one_can_move(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for console, bars in (
        (Console(file=io.StringIO(), force_terminal=True), True),
        (Console(file=io.StringIO()), False),
        (Console(file=io.StringIO(), force_jupyter=True), None),
    ):
        for widgets in (None, object()):
            monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name, widgets=widgets: widgets)
            assert Bar(console).disable is not (bars if bars is not None else widgets is not None)
    with progress.progress_bar() as bar:
        bar.console.print("a note " * 20)
    assert capsys.readouterr().err == "a note " * 20 + "\n"
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    with progress.progress_bar() as bar:
        task = bar.add_task("building", total=4, note="n" * 100)
        bar.update(task, completed=1)
        while not (text := capsys.readouterr().err):
            pass
    assert text.startswith("building: 1/4, ")
    assert "n" * 100 in text
    with progress.progress_bar(shown=False) as bar:
        bar.add_task("building", total=4, note="")
    assert capsys.readouterr().err == ""


def test_the_function_stays_one_whatever_is_imported() -> None:
    import kdcache.training
    from kdcache import verbs

    assert inspect.unwrap(kdcache.train) is verbs.train
    assert inspect.isfunction(kdcache.train)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("kdcache.train")
