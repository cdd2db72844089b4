"""Builds that repeat the views of a cache: from its data set, from its pixels, and what contradicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL import __version__ as pillow

import kdcache
from kdcache.data import open_split, write_scenes
from kdcache.errors import IncompleteError, MismatchError, RecipeError, StoreError
from kdcache.store import Cache, JoinedCache, Records, open_cache, open_caches, verify_files
from kdcache.teacher import score_cache
from kdcache.teacher.build import render

VIEWS: dict[str, dict[str, Any]] = {
    "views": {"size": (32, 48), "views": 3, "view_scale": (1.0, 2.0)},
    "beyond": {"size": (32, 48), "views": 2, "view_scale": (0.5, 1.0), "fit": "pad"},
    "crops": {"size": (48, 72), "crop": (32, 48), "views": 2, "view_scale": (0.75, 1.5), "view_flip": False},
    "one": {"size": (32, 48), "views": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five images, some with a label only."""
    return write_scenes(tmp_path_factory.mktemp("like") / "data", "scenes:36x52,train=5,val=2,unlabelled=1")


@pytest.fixture
def make(data: Path, teacher: Any) -> Any:
    """make(out, ...): a cache of the teacher by the public function."""

    def built(out: Path, **settings: Any) -> Cache:
        settings = {"data": str(data), "shard_records": 4, "progress": False, **settings}
        kdcache.build_cache(teacher=teacher, out=out, **settings)
        return open_cache(out)

    return built


def arrays(store: Path) -> dict[str, bytes]:
    """The files of all arrays."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("c/*") if path.is_file()} | {
        str(path.relative_to(store)): path.read_bytes() for path in store.rglob("c/**/*") if path.is_file()
    }


@pytest.mark.parametrize("way", VIEWS)
def test_views_are_those_of_the_cache_from_data_and_from_its_pixels(
    tmp_path: Path, make: Any, data: Path, way: str
) -> None:
    main = make(tmp_path / "main", **VIEWS[way])
    taps = {"like": tmp_path / "main", "features": ("stage2",), "features_only": True, "shard_records": 4}
    of_data = make(tmp_path / "data", **taps)
    of_pixels = make(tmp_path / "pixels", **taps, data=None)
    assert arrays(tmp_path / "data") == arrays(tmp_path / "pixels")
    for cache in (of_data, of_pixels):
        assert not cache.manifest.heads
        assert cache.manifest.view == main.manifest.view.model_copy(update={"pixels": "source"})
        assert cache.manifest.build.shard_records == 4
        assert tuple(cache.ids) == tuple(main.ids)
        for name in ("pixel_checksum", "window", "flip", "label_checksum", "image_digest", "label_digest", "labelled"):
            np.testing.assert_array_equal(cache.column(name), main.column(name))
        assert cache.manifest.dataset.ids_digest == main.manifest.dataset.ids_digest
    joined = open_caches([tmp_path / "main", f"taps={tmp_path / 'pixels'}"])
    whole = make(tmp_path / "whole", **VIEWS[way], features=("stage2",))
    for record in range(len(whole)):
        one, other = (
            cache.read(record, [path])[path]
            for cache, path in ((joined, "features/taps:stage2"), (whole, "features/stage2"))
        )
        np.testing.assert_array_equal(one, other)
    assert verify_files(tmp_path / "pixels").damaged == []
    records = Records(of_pixels, open_split(str(data), "train"))
    np.testing.assert_array_equal(records.pixels(1), Records(main).pixels(1))


def test_pixels_are_stored_only_on_demand(tmp_path: Path, make: Any) -> None:
    main = make(tmp_path / "main", **VIEWS["views"])
    stored = make(tmp_path / "stored", like=main, data=None, pixels="stored")
    assert stored.manifest.view.pixels == "stored"
    for path in ("pixels/image", "labels/segmentation", "targets/segmentation/values"):
        for record in range(len(main)):
            np.testing.assert_array_equal(stored.read(record, [path])[path], main.read(record, [path])[path])


def test_labels_of_depth_come_from_the_cache_too(tmp_path: Path, make: Any) -> None:
    scenes = "scenes:36x52,train=4,val=2,depth=sparse,tasks=halves"
    zoomed = {"data": scenes, "views": 2, "view_scale": (1.0, 2.0), "depth_zoom": "divide", "size": (32, 48)}
    main = make(tmp_path / "main", **zoomed)
    like = make(tmp_path / "like", like=main, data=None, pixels="stored")
    assert like.manifest.depth == main.manifest.depth
    np.testing.assert_array_equal(like.column("depth_digest"), main.column("depth_digest"))
    for record in range(len(main)):
        path = "labels/depth"
        np.testing.assert_array_equal(like.read(record, [path])[path], main.read(record, [path])[path])


def test_the_teacher_may_see_larger_images_of_the_data(tmp_path: Path, make: Any) -> None:
    main = make(tmp_path / "main", **VIEWS["views"])
    large = make(tmp_path / "large", like=main, teacher_size=(64, 96), features=("stage2",), features_only=True)
    assert large.manifest.view.teacher_size == (64, 96)
    assert open_caches([tmp_path / "main", tmp_path / "large"]).manifest.joined == ("main", "large")
    with pytest.raises(RecipeError, match="Cannot show the teacher pixels of 64x96") as caught:
        make(tmp_path / "none", like=main, data=None, teacher_size=(64, 96))
    assert "data=" in caught.value.fix


def test_a_build_goes_on_and_is_repaired(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are those of an uninterrupted one."""
    make(tmp_path / "main", **VIEWS["views"])
    settings = {"like": tmp_path / "main", "data": None, "features": ("stage2",), "features_only": True}
    make(tmp_path / "whole", **settings)
    read, calls = render.stored_views, []

    def failing(split: Any, records: Any) -> Any:
        calls.append(records)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return read(split, records)

    monkeypatch.setattr(render, "stored_views", failing)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "torn", **settings)
    monkeypatch.undo()
    with pytest.raises(IncompleteError):
        make(tmp_path / "none", **{**settings, "like": tmp_path / "torn"})
    make(tmp_path / "torn", **settings)
    assert arrays(tmp_path / "torn") == arrays(tmp_path / "whole")
    victim = next(path for path in (tmp_path / "torn/features").rglob("*") if path.is_file() and path.parts[-4] == "1")
    victim.write_bytes(victim.read_bytes()[:-3])
    make(tmp_path / "torn", **settings)
    assert arrays(tmp_path / "torn") == arrays(tmp_path / "whole")


def test_another_image_is_named_with_both_versions_of_pillow(tmp_path: Path, make: Any, data: Path) -> None:
    main = make(tmp_path / "main", **VIEWS["views"])
    moved = tmp_path / "moved"
    write_scenes(moved, "scenes:36x52,train=5,val=2,unlabelled=1")
    image = sorted((moved / "images/train").glob("*"))[3]
    pixels = np.array(Image.open(image))
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(image)
    with pytest.raises(MismatchError, match=r"The views of .*moved are not those of") as caught:
        make(tmp_path / "none", like=main, data=str(moved), features=("stage2",), features_only=True)
    assert f"view 0 of sample {main.ids[3]!r} shows other pixels" in caught.value.problem
    assert f"built with Pillow {pillow} against {pillow}" in caught.value.problem
    assert "leave data= out to use the stored pixels" in caught.value.fix


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"size": (64, 96)}, "size='64x96' (there 32x48)"),
    "views": ({"views": 2}, "views=2 (there 3)"),
    "seed": ({"view_seed": 7}, "view_seed=7 (there 0)"),
    "scale": ({"view_scale": (1.0, 3.0)}, "view_scale='1:3' (there 1:2)"),
    "shards": ({"shard_records": 8}, "shard_records=8 (there 4)"),
    "fit": ({"fit": "pad"}, "fit='pad' (there squash)"),
    "crop": ({"crop": (16, 16)}, "crop='16x16' (there none)"),
    "split": ({"split": "val", "data": None}, "val (there train)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_flags_that_contradict_the_cache_are_named(tmp_path: Path, make: Any, name: str) -> None:
    main = make(tmp_path / "main", **VIEWS["views"])
    changes, words = WRONG[name]
    with pytest.raises(RecipeError, match="with like=") as caught:
        make(tmp_path / "none", like=main, **{"shard_records": 4, **changes})
    assert words in caught.value.problem
    assert not (tmp_path / "none").exists()


def test_what_the_cache_has_may_be_repeated(tmp_path: Path, make: Any) -> None:
    main = make(tmp_path / "main", **VIEWS["views"])
    again = make(tmp_path / "again", like=main, size=(32, 48), views=3, view_scale=(1.0, 2.0), split="train")
    assert again.manifest.view.views_per_sample == 3


def test_caches_that_nothing_can_be_like(tmp_path: Path, make: Any) -> None:
    main = make(tmp_path / "main", **VIEWS["one"])
    bare = make(tmp_path / "bare", **VIEWS["one"], pixels="source")
    with pytest.raises(StoreError, match="Cache not found"):
        make(tmp_path / "none", like=tmp_path / "nowhere")
    with pytest.raises(MismatchError, match="bare does not store pixels") as caught:
        make(tmp_path / "none", like=bare, data=None)
    assert "Add data= (the folder of 'data')" in caught.value.fix
    with pytest.raises(RecipeError, match="Missing data="):
        make(tmp_path / "none", data=None)
    with pytest.raises(RecipeError, match=r"Use either reuse=.* or like=.*, not both"):
        make(tmp_path / "none", like=main, reuse=main)
    with pytest.raises(RecipeError, match=r"Cannot build .* from itself"):
        make(tmp_path / "main", like=main)
    with pytest.raises(
        MismatchError, match=r"The samples of scenes:36x52,train=3,val=2, split 'train' are not those of"
    ):
        make(tmp_path / "none", like=main, data="scenes:36x52,train=3,val=2")
    assert not (tmp_path / "none").exists()


def test_a_head_is_judged_on_the_labels_of_the_cache(tmp_path: Path, make: Any, data: Path) -> None:
    main = make(tmp_path / "main", **VIEWS["views"])
    like = make(tmp_path / "like", like=main, data=None, top_k=3)
    joined = score_cache(Records(JoinedCache({"main": main, "like": like})))
    beside = score_cache(Records(like, open_split(str(data), "train")))
    assert joined is not None
    assert beside is not None
    assert joined.metrics.miou == beside.metrics.miou
