"""Pseudo labels, against each pixel's softmax in float64."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import operator
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
from numcodecs import zstd
from PIL import Image
from torch.nn import functional as F

from kdcache.data import open_split
from kdcache.data.classes import read_classes
from kdcache.errors import CorruptError, KDCacheError, MismatchError, RecipeError, StoreError
from kdcache.metrics.figures import VOID_RGB
from kdcache.store import CopyChanges, Records, copy_store, open_cache
from kdcache.teacher import build_cache
from kdcache.teacher.audit.audit import audit_cache
from kdcache.teacher.audit.figures import write_report
from kdcache.teacher.audit.pseudo_labels import SETTINGS, Rule, export_pseudo_labels, label_file
from kdcache.teacher.audit.store_audit import StoreAudit


def judged(cache, record: int):
    """Class and probability of every pixel of the view."""
    values = cache.read(record, ["targets/segmentation/values"])["targets/segmentation/values"]
    up = F.interpolate(torch.from_numpy(values)[None].double(), (32, 48), mode="bilinear", align_corners=False)
    sure, said = up.softmax(1)[0].max(0)
    return said.numpy(), sure.numpy()


@pytest.fixture(params=["stored", "source", "views"])
def built(request, tmp_path, teacher, folder_data, options):
    """(cache, split); one of seven images has no label."""
    (folder_data / "labels" / "train" / "train-000001.png").unlink()
    split = open_split(folder_data, "train")
    changes = {"source": {"pixels": "source"}, "views": {"views": 2}}.get(request.param, {})
    build_cache(split, teacher, tmp_path / "s.zarr", options(**changes))
    return open_cache(tmp_path / "s.zarr"), split


def test_padding_is_no_pseudo_label(teacher, folder_data, options, tmp_path) -> None:
    split = open_split(folder_data, "train")
    build_cache(split, teacher, tmp_path / "pad.zarr", options(size=(52, 52), fit="pad"))
    records = Records(open_cache(tmp_path / "pad.zarr"), split)
    found = export_pseudo_labels(records, tmp_path / "out", Rule(quantile=0.999), images=True)
    assert sum(found.coverage.predicted) == len(split) * 36 * 52  # of 52 x 52
    for number, sample in enumerate(split.ids):
        for kind in ("labels", "images"):
            with Image.open(tmp_path / f"out/{kind}/train/{sample}.png") as picture:
                assert picture.size == (52, 36)
        with Image.open(tmp_path / f"out/images/train/{sample}.png") as picture:
            assert (np.asarray(picture) == split.image(number)).all()
    build_cache(split, teacher, tmp_path / "crop.zarr", options(size=(32, 32), fit="crop"))
    with pytest.raises(MismatchError, match="--fit crop"):
        export_pseudo_labels(Records(open_cache(tmp_path / "crop.zarr"), split), tmp_path / "c", Rule(threshold=0.5))


@pytest.mark.parametrize("rule", [Rule(threshold=0.6), Rule(quantile=0.4)])
def test_labels_are_what_the_teacher_is_sure_of(built, tmp_path, rule) -> None:
    cache, split = built
    found = export_pseudo_labels(Records(cache, split), tmp_path / "out", rule)
    views = cache.manifest.view.views_per_sample
    said, sure = (np.stack(part) for part in zip(*(judged(cache, 7 * 0 + s * views) for s in range(7)), strict=True))
    files = sorted((tmp_path / "out/labels/train").rglob("*.png"))
    assert [path.relative_to(tmp_path / "out/labels/train").with_suffix("").as_posix() for path in files] == list(
        cache.ids
    )
    ids = np.stack([np.asarray(Image.open(path)) for path in files])
    assert ids.dtype == np.uint8
    close = np.zeros_like(sure, bool)
    kept = np.zeros_like(close)
    for c in range(7):
        mine = said == c
        if mine.any():
            ranked = np.sort(sure[mine])[::-1]
            least = rule.threshold or ranked[int(np.ceil(rule.quantile * len(ranked))) - 1]
            kept |= mine & (sure >= least)
            close |= mine & (np.abs(sure - least) < 1e-3)  # float16 has rounded them
    expected = np.where(kept, said, 255)
    assert ((ids == expected) | close).all()
    assert close.mean() < 0.05
    assert {255} < set(np.unique(ids))
    # The table counts the files themselves; precision is over labelled pixels.
    truth = np.stack([_label(split, sample) for sample in range(7)])
    for c in range(7):
        assert found.coverage.selected[c] == (ids == c).sum()
        known = (ids == c) & (truth != 255)
        if known.any():
            assert found.coverage.precision[c] == pytest.approx((truth[known] == c).mean())
        else:
            assert np.isnan(found.coverage.precision[c])
    assert found.coverage.total_share == pytest.approx((ids != 255).mean())
    assert (found.written, found.kept) == (7, 0)


def test_a_rule_that_keeps_nothing_is_refused_before_a_file_is_written(built, tmp_path) -> None:
    cache, split = built
    with pytest.raises(RecipeError, match=r"as sure as 0\.9999 in all 7 samples") as caught:
        export_pseudo_labels(Records(cache, split), tmp_path / "out", Rule(threshold=0.9999))
    assert str(cache.place) in caught.value.problem
    assert not (tmp_path / "out").exists()
    half = float(caught.value.fix.split("--threshold ")[1].split(",")[0])
    coverage = export_pseudo_labels(Records(cache, split), tmp_path / "out", Rule(threshold=half)).coverage
    assert coverage.total_share == pytest.approx(0.5, abs=0.1)  # two digits


def _label(split, sample: int) -> np.ndarray:
    from kdcache.data import Window, render

    image = split.image(sample)
    return render(image, split.label(sample), Window.full(*image.shape[:2]), flip=False, size=(32, 48))[1]


def test_files_show_the_colours_and_hold_the_ids(built, tmp_path, classes) -> None:
    cache, _ = built
    export_pseudo_labels(Records(cache), tmp_path / "out", Rule(threshold=0.5))
    with Image.open(tmp_path / f"out/labels/train/{cache.ids[0]}.png") as image:
        assert image.mode == "P"
        ids, shown = np.asarray(image), np.asarray(image.convert("RGB"))
    for c in np.unique(ids):
        colour = VOID_RGB if c == 255 else classes.colours[c]
        assert (shown[ids == c] == colour).all()
    assert read_classes(tmp_path / "out") == classes


def test_with_images_it_is_a_data_folder(built, tmp_path) -> None:
    cache, split = built
    export_pseudo_labels(Records(cache, split), tmp_path / "out", Rule(quantile=0.5), images=True)
    data = open_split(tmp_path / "out", "train")
    assert (data.ids, data.classes) == (cache.ids, split.classes)
    for sample in range(7):
        assert data.image(sample).shape == (32, 48, 3)
        assert data.label(sample).shape == (32, 48)
    if cache.pixels_stored:
        record = cache.manifest.record(3)
        assert (data.image(3) == cache.read(record, ["pixels/image"])["pixels/image"]).all()


def test_it_goes_on_and_keeps_what_is_there(built, tmp_path, tree, monkeypatch) -> None:
    cache, _ = built
    out = tmp_path / "out"
    export_pseudo_labels(Records(cache), tmp_path / "whole", Rule(threshold=0.5))

    def stop(what, done, _total):
        if what == "writing labels" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_pseudo_labels(Records(cache), out, Rule(threshold=0.5), progress=stop)
    assert len(list(out.rglob("*.png"))) == 3
    assert not list(out.rglob("*.partial"))
    first = out / f"labels/train/{cache.ids[0]}.png"
    os.utime(first, (1, 1))
    found = export_pseudo_labels(Records(cache), out, Rule(threshold=0.5))
    assert (found.written, found.kept) == (4, 3)
    assert first.stat().st_mtime == 1
    assert tree(out) == tree(tmp_path / "whole")
    again = export_pseudo_labels(Records(cache), out, Rule(threshold=0.5))
    assert (again.written, again.kept) == (0, 7)
    assert again.coverage.selected == found.coverage.selected


def test_another_rule_or_store_is_refused(built, tmp_path, teacher, options, tree) -> None:
    cache, split = built
    out = tmp_path / "out"
    export_pseudo_labels(Records(cache), out, Rule(threshold=0.5))
    before = tree(out)
    with pytest.raises(MismatchError, match="another threshold"):
        export_pseudo_labels(Records(cache), out, Rule(threshold=0.6))
    with pytest.raises(MismatchError, match="another threshold and quantile"):
        export_pseudo_labels(Records(cache), out, Rule(quantile=0.5))
    with torch.no_grad():
        teacher.model.get_submodule("classifier").weight.mul_(1.1)
    build_cache(split, teacher, tmp_path / "other.zarr", options())
    with pytest.raises(MismatchError, match="another store"):
        export_pseudo_labels(Records(open_cache(tmp_path / "other.zarr")), out, Rule(threshold=0.5))
    copy_store(cache, tmp_path / "small.zarr", CopyChanges(codec="small"))
    with pytest.raises(MismatchError, match="another store"):  # of the same teacher and day, but other numbers
        export_pseudo_labels(Records(open_cache(tmp_path / "small.zarr")), out, Rule(threshold=0.5))
    (out / SETTINGS).write_text("{")
    with pytest.raises(RecipeError, match=f"Cannot read .*{SETTINGS}"):
        export_pseudo_labels(Records(cache), out, Rule(threshold=0.5))
    before.pop(SETTINGS)
    assert {name: content for name, content in tree(out).items() if name != SETTINGS} == before


@pytest.mark.parametrize("held", ["file", "other"])
def test_nothing_else_is_touched(built, tmp_path, held) -> None:
    cache, _ = built
    out = tmp_path / "out"
    if held == "other":
        out.mkdir()
    thesis = out if held == "file" else out / "thesis.tex"
    thesis.write_text("thesis")
    with pytest.raises(RecipeError, match="out"):
        export_pseudo_labels(Records(cache), out, Rule(threshold=0.5))
    assert thesis.read_text() == "thesis"


def test_crops_have_no_whole_images(tmp_path, teacher, split, options) -> None:
    build_cache(split, teacher, tmp_path / "s.zarr", options(crop=(16, 24)))
    with pytest.raises(MismatchError, match="has only crops"):
        export_pseudo_labels(Records(open_cache(tmp_path / "s.zarr")), tmp_path / "out", Rule(threshold=0.5))
    assert not (tmp_path / "out").exists()


def test_another_data_set_is_refused(built, tmp_path) -> None:
    cache, _ = built
    with pytest.raises(KDCacheError, match="built from"):
        export_pseudo_labels(
            Records(cache, open_split("scenes:36x52,train=2", "train")), tmp_path / "out", Rule(threshold=0.5)
        )
    assert not (tmp_path / "out").exists()


def test_images_need_pixels_or_data(tmp_path, teacher, split, options) -> None:
    build_cache(split, teacher, tmp_path / "s.zarr", options(pixels="source"))
    cache = open_cache(tmp_path / "s.zarr")
    with pytest.raises(MismatchError, match="--data"):
        export_pseudo_labels(Records(cache), tmp_path / "out", Rule(threshold=0.5), images=True)
    assert not (tmp_path / "out").exists()
    found = export_pseudo_labels(Records(cache), tmp_path / "out", Rule(threshold=0.5))
    assert np.isnan(found.coverage.total_precision)  # nobody knows the labels
    assert "/" in cache.ids[0]  # an id with folders
    assert json.loads((tmp_path / "out" / SETTINGS).read_text())["threshold"] == 0.5


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["threshold", "quantile"])
def test_rules_lie_between_0_and_1(name, value) -> None:
    with pytest.raises(RecipeError, match=rf"--{name}: {value}, which is not between 0 and 1"):
        Rule(**{name: value})


@pytest.mark.parametrize("rule", [{}, {"threshold": 0.5, "quantile": 0.5}])
def test_one_rule_is_given(rule) -> None:
    with pytest.raises(RecipeError, match=r"--threshold .*or --quantile"):
        Rule(**rule)


@pytest.mark.parametrize("sample", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", "a\0", ""])
def test_ids_do_not_lead_out_of_the_folder(sample) -> None:
    with pytest.raises(CorruptError, match="id"):
        label_file(sample)


def test_ids_are_paths() -> None:
    assert label_file("b/a.left8bit").as_posix() == "b/a.left8bit.png"


FORGED = ["../..", "..", "a/b", "", ".", "a\0b", "a\\b", "x" * 300]


def strings(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to the strings below a JSON value, the first of a list for all of them."""
    if isinstance(value, str):
        return [at]
    parts = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else []
    return [way for key, part in parts for way in strings(part, (*at, key))]


def forge(store: Path, manifest: Any, changes: Mapping[tuple[Any, ...], str]) -> Path:
    """The store with other strings in its manifest, and a seal that fits."""
    manifest = copy.deepcopy(manifest)
    for (*way, last), value in changes.items():
        reduce(operator.getitem, way, manifest)[last] = value
    about = json.loads((store / "zarr.json").read_bytes())
    about["attributes"]["kdcache"] = manifest
    (store / "zarr.json").write_text(json.dumps(about))
    return reseal(store)


def reseal(store: Path) -> Path:
    seal = json.loads((store / "complete.json").read_bytes())
    seal["metadata"] = {key: hashlib.sha256((store / key).read_bytes()).hexdigest() for key in seal["metadata"]}
    (store / "complete.json").write_text(json.dumps(seal))
    return store


def use(store: Path, out: Path) -> None:
    """All that writes files beside a store, whose names may come from it."""
    cache = open_cache(store)
    with contextlib.suppress(KDCacheError):
        export_pseudo_labels(Records(cache), out / "labels", Rule(threshold=0.3), images=True)
    with contextlib.suppress(KDCacheError):
        write_report(StoreAudit(1, audit_cache(Records(cache), worst=1)), Records(cache), out / "report")
    with contextlib.suppress(KDCacheError):
        copy_store(cache, out / "copy.zarr")


@pytest.fixture
def forgeable(tmp_path, teacher, folder_data, options, monkeypatch) -> Path:
    """A store with names of every kind, several folders deep. Where pictures lie matters, not what they show."""

    def save(_: object, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    monkeypatch.setattr("kdcache.teacher.audit.figures.save_figure", save)
    path = tmp_path / "a/b/s.zarr"
    path.parent.mkdir(parents=True)
    build_cache(
        open_split(folder_data, "train"), teacher, path, options(features=("stage1",), statistics=("at:stage1",))
    )
    return path


def test_a_forged_manifest_writes_nowhere_else(forgeable, tmp_path, tree) -> None:
    """Each of its strings in turn as what might be a path; then all together that the store is not refused for."""
    manifest = json.loads((forgeable / "zarr.json").read_bytes())["attributes"]["kdcache"]
    ways = strings(manifest)
    assert ("dataset", "split") in ways
    assert len(ways) > 15
    before = {name for name in tree(tmp_path) if not name.startswith("a/b/s.zarr")}
    for value in (str(tmp_path / "abs"), *FORGED):
        taken = {}
        for way in ways:
            try:
                open_cache(forge(forgeable, manifest, {way: value}))
            except KDCacheError:
                continue
            taken[way] = value
        assert not {("dataset", "split"), ("statistics", "at.stage1", "tap")} & set(taken), value
        out = tmp_path / "a/b/out"
        use(forge(forgeable, manifest, taken), out)
        shutil.rmtree(out, ignore_errors=True)
        assert {name for name in tree(tmp_path) if not name.startswith("a/b/s.zarr")} == before, value


@pytest.mark.parametrize("value", [*FORGED, "/abs", "a/../../../b", "\x1b]0;x\a", "ä" * 1000])
def test_forged_ids_write_nowhere_else(forgeable, tmp_path, tree, value) -> None:
    value = value.replace("/abs", str(tmp_path / "abs"))
    encoded = [value.encode(), *(sample.encode() for sample in open_cache(forgeable).ids[1:])]
    for name, content in (
        ("id_bytes", b"".join(encoded)),
        ("id_ends", np.cumsum([len(part) for part in encoded], dtype="<i8").tobytes()),
    ):
        frame = bytes(zstd.compress(content))
        crc = google_crc32c.value(frame).to_bytes(4, "little")
        (forgeable / f"samples/{name}/c/0").write_bytes(frame + crc)
    assert open_cache(reseal(forgeable)).ids[0] == value
    before = set(tree(tmp_path))
    use(forgeable, tmp_path / "a/b/out")
    written = set(tree(tmp_path)) - before
    assert all(name.startswith("a/b/out/") for name in written)
    assert any(name.startswith("a/b/out/copy.zarr") for name in written)


def test_a_split_whose_name_is_no_folder_is_refused_before_the_build(split, teacher, options, tmp_path) -> None:
    with pytest.raises(StoreError, match=r"split.*'\.\./train'"):
        build_cache(replace(split, split="../train"), teacher, tmp_path / "s.zarr", options())
    assert not (tmp_path / "s.zarr").exists()
