"""Restyled data sets: whole or not there, the same whatever came between, with the labels of their source."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from kdcache.data import Style, check, list_splits, open_split, restyle
from kdcache.data.restyling import restyle as module
from kdcache.data.restyling.transfer import fourier_transfer, match_histograms
from kdcache.errors import DataError, RecipeError

SCENES, LIKE = "scenes:24x32,train=5,val=2", "scenes:24x32,train=3,val=0,seed=9"
LARGER = "scenes:40x30,train=3,val=0,seed=9"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pairs(out: Path, split: str = "train") -> dict[str, str]:
    with (out / "restyled" / f"{split}.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "target"]
    return dict(rows[1:])


@pytest.mark.parametrize("method", ["fda", "histogram"])
def test_each_image_has_the_style_of_its_recorded_target(method, tmp_path) -> None:
    style = Style(method, beta=0.1, seed=4)
    restyled = restyle(SCENES, LARGER, tmp_path / "new", style, resize=True, threads=2)
    assert (restyled.written, restyled.kept, restyled.linked, restyled.copied) == (5, 0, 0, 5)
    source, target, new = (open_split(data, "train") for data in (SCENES, LARGER, tmp_path / "new"))
    assert (new.ids, new.classes) == (source.ids, source.classes)
    for index, sample in enumerate(new.ids):
        like = target.image(target.ids.index(pairs(tmp_path / "new")[sample]))
        own = source.image(index)
        wanted = fourier_transfer(own, like, 0.1) if method == "fda" else match_histograms(own, like)
        np.testing.assert_array_equal(new.image(index), wanted)
        np.testing.assert_array_equal(new.label(index), source.label(index))
    assert check(tmp_path / "new").problems == []


def test_the_seed_decides_the_targets_and_another_split_comes_beside(tmp_path) -> None:
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        for split in ("train", "val"):
            restyle(SCENES, LIKE, tmp_path / out, Style(seed=seed), split=split, threads=len(out))
    assert list_splits(tmp_path / "a") == ["train", "val"]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert pairs(tmp_path / "a") != pairs(tmp_path / "c")


@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_restyling_is_no_data_set_and_goes_on(at, tmp_path, monkeypatch) -> None:
    restyle(SCENES, LIKE, tmp_path / "whole", Style(beta=0.1))
    calls = []

    def transfer(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return fourier_transfer(*arguments)

    monkeypatch.setattr(module, "fourier_transfer", transfer)
    with pytest.raises(KeyboardInterrupt):
        restyle(SCENES, LIKE, tmp_path / "cut", Style(beta=0.1), threads=0)
    with pytest.raises(DataError, match="layout"):
        open_split(tmp_path / "cut", "train")
    restyled = restyle(SCENES, LIKE, tmp_path / "cut", Style(beta=0.1), threads=2)
    assert (restyled.written, restyled.kept) == (5 - at + 1, at - 1)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert restyle(SCENES, LIKE, tmp_path / "cut", Style(beta=0.1)).written == 0


def test_labels_of_class_ids_are_linked_and_others_mapped(tiny, tmp_path, monkeypatch) -> None:
    own = tiny.write("folder", tmp_path / "own")
    assert restyle(own, LIKE, tmp_path / "linked", resize=True).linked == 3
    label = tmp_path / "linked/labels/train/a.png"
    assert label.is_symlink()
    assert label.resolve() == (own / "labels/train/a.png").resolve()
    monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    restyled = restyle(own, LIKE, tmp_path / "copied", resize=True)
    assert (restyled.linked, restyled.copied) == (0, 3)
    assert (tmp_path / "copied/labels/train/a.png").read_bytes() == label.read_bytes()
    mapped = restyle(f"gta5:{tiny.write('gta5', tmp_path / 'gta5')}", LIKE, tmp_path / "mapped", resize=True)
    assert (mapped.linked, mapped.copied) == (0, 3)
    source, new = open_split(tmp_path / "gta5", "train"), open_split(tmp_path / "mapped", "train")
    assert new.classes == source.classes
    for index in range(3):
        np.testing.assert_array_equal(new.label(index), source.label(index))
    assert check(tmp_path / "mapped").problems == []


def test_depth_goes_along_with_its_unit(builder, tmp_path) -> None:
    from PIL import Image

    builder.pair("a")
    (builder.root / "depth/train").mkdir(parents=True)
    metres = np.full((6, 8), 2500, np.uint16)
    metres[0] = 7
    Image.fromarray(metres).save(builder.root / "depth/train/a.png")
    (builder.root / "depth.toml").write_text("units_per_metre = 1000\ninvalid = [7]\n")
    restyle(builder.root, LIKE, tmp_path / "linked", resize=True)
    restyle("scenes:24x32,train=2,val=0,depth=sparse", LIKE, tmp_path / "written")
    restyle("depth:scenes:24x32,train=2,val=0,depth=exact", LIKE, tmp_path / "alone")
    assert (tmp_path / "linked/depth/train/a.png").is_symlink()
    for source, new in (
        (builder.root, "linked"),
        ("scenes:24x32,train=2,val=0,depth=sparse", "written"),
        ("scenes:24x32,train=2,val=0,depth=exact", "alone"),
    ):
        np.testing.assert_array_equal(
            open_split(tmp_path / new, "train").label(0, "depth"), open_split(source, "train").label(0, "depth")
        )
    assert open_split(tmp_path / "alone", "train").tasks == ("depth",)


def test_what_a_folder_holds_decides(tmp_path) -> None:
    restyle(SCENES, LIKE, tmp_path / "new", Style(beta=0.1))
    before = contents(tmp_path / "new")
    for changed in ({"beta": 0.2}, {"seed": 1}, {"method": "histogram"}):
        with pytest.raises(RecipeError, match="another style"):
            restyle(SCENES, LIKE, tmp_path / "new", Style(**{"beta": 0.1} | changed))
    with pytest.raises(RecipeError, match="another like"):
        restyle(SCENES, "scenes:24x32,train=4,val=0,seed=9", tmp_path / "new", Style(beta=0.1))
    with pytest.raises(RecipeError, match="another source"):
        restyle("scenes:24x32,train=5,val=2,seed=1", LIKE, tmp_path / "new", Style(beta=0.1))
    with pytest.raises(RecipeError, match="something else"):
        restyle(SCENES, LIKE, Path(__file__).parent)
    assert contents(tmp_path / "new") == before


def test_images_of_two_sizes_are_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(DataError) as refused:
        restyle(SCENES, LARGER, tmp_path / "new")
    assert "of 24x32 and" in refused.value.received
    assert "of 40x30 (height x width)" in refused.value.received
    assert "--resize" in refused.value.remedy
    assert not (tmp_path / "new").exists()
    assert restyle(SCENES, LARGER, tmp_path / "new", Style("histogram")).written == 5


def test_a_restyling_that_met_another_size_goes_on_with_resize(builder, tmp_path) -> None:
    """The third sample is the first whose target image is the larger one."""
    builder.image("a.png", size=(24, 32))
    builder.image("b.png", size=(48, 64))
    style = Style(beta=0.1, seed=2)
    with pytest.raises(DataError, match="of 24x32 and b of 48x64"):
        restyle(SCENES, builder.root, tmp_path / "new", style, threads=0)
    restyled = restyle(SCENES, builder.root, tmp_path / "new", style, resize=True)
    assert (restyled.written, restyled.kept) == (3, 2)
    restyle(SCENES, builder.root, tmp_path / "whole", style, resize=True)
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")


@pytest.mark.parametrize("beta", [0, -1, 0.51, float("nan")])
def test_a_beta_that_is_none_is_refused(beta) -> None:
    with pytest.raises(RecipeError, match="shorter side"):
        Style(beta=beta)


def test_less_than_one_frequency_is_said(tmp_path) -> None:
    note = restyle(SCENES, LIKE, tmp_path / "new").notes
    assert "less than one frequency" in note[0]
    assert restyle(SCENES, LIKE, tmp_path / "other", Style("histogram")).notes == ()
    assert os.listdir(tmp_path / "other/images") == ["train"]
