"""Joined caches: which array comes from where, and what does not belong together."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.errors import CorruptError, MismatchError, RecipeError
from kdcache.store import JoinedCache, open_cache, open_caches, seal_of
from kdcache.store.format.manifest_models import DepthLabels, Drawn, Regression
from kdcache.tasks import SEGMENTATION

DEPTH = Regression(
    kind="regression", channels=1, size=(6, 8), align_corners=False, unit="m", range=(0.0, 80.0), parameterisation="exp"
)


def other(plan: Any, **changes: Any) -> Any:
    """The plan of a cache of other arrays, without a head, for the views of `plan(k=5)` with as many records."""
    made = plan(seed=1, eight_bits=True, k=5, **changes)
    first = plan(k=5, records=made.manifest.records, views=made.manifest.view.views_per_sample)
    made.arrays |= {path: rows for path, rows in first.arrays.items() if path.startswith("records/")}
    made.manifest = made.manifest.model_copy(update={"heads": {}})
    made.arrays = {path: rows for path, rows in made.arrays.items() if not path.startswith("targets/")}
    return made


@pytest.fixture(scope="session")
def written(plan: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """main.zarr, and of every number of records in a shard a K.zarr with features in bytes and similarities."""
    root = tmp_path_factory.mktemp("join")
    plan(k=5, views=2).write(root / "main.zarr")
    for shard in (1, 3, 4, 16):
        other(plan, views=2, shard_records=shard, pixels="source").write(root / f"{shard}.zarr")
    return root


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shard=st.sampled_from([1, 3, 4, 16]), record=st.integers(0, 9), named=st.booleans(), pickled=st.booleans())
def test_every_array_is_that_of_its_cache(written: Path, shard: int, record: int, named: bool, pickled: bool) -> None:
    place = written / f"{shard}.zarr"
    cache = open_caches([written / "main.zarr", f"sam={place}" if named else place])
    cache = pickle.loads(pickle.dumps(cache)) if pickled else cache
    name = "sam" if named else str(shard)
    main, further = open_cache(written / "main.zarr"), open_cache(place)
    assert isinstance(cache, JoinedCache)
    assert cache.manifest.joined == ("main", name)
    assert list(cache.manifest.heads) == [SEGMENTATION]
    pairs = {
        f"features/{name}:stage1": "features/stage1",
        f"scales/{name}:stage1": "scales/stage1",
        f"features/{name}:head": "features/head",
        f"statistics/similarity.{name}:stage1": "statistics/similarity.stage1",
    }
    assert set(cache.specs) == {*main.specs, *pairs}
    rows, own = cache.read(record, [*main.specs, *pairs]), further.read(record, list(pairs.values()))
    for path, row in main.read(record, list(main.specs)).items():
        np.testing.assert_array_equal(rows[path], row)
    for path, its in pairs.items():
        np.testing.assert_array_equal(rows[path], own[its])
    np.testing.assert_array_equal(cache.feature(record, f"{name}:stage1"), further.feature(record, "stage1"))
    assert cache.unread(["targets/segmentation/values"]) == [name]
    assert cache.unread([f"scales/{name}:stage1"]) == []
    for number in range(cache.manifest.shards):
        cache.fetch(number, f"features/{name}:stage1")


def test_one_cache_is_itself_and_seals_are_in_order(written: Path) -> None:
    main = open_caches(written / "main.zarr")
    assert type(main) is type(open_cache(written / "main.zarr"))
    assert main.parts == (main,)
    joined = open_caches([written / "main.zarr", written / "1.zarr", written / "3.zarr"])
    seals = [seal_of(open_cache(written / name)) for name in ("main.zarr", "1.zarr", "3.zarr")]
    assert seal_of(joined) == "+".join(seals)
    assert len(set(seals)) == 3
    assert not joined.remote
    joined.check_files()


def test_files_of_every_part_are_looked_for(plan: Any, tmp_path: Path) -> None:
    plan(k=5).write(tmp_path / "main.zarr")
    other(plan).write(tmp_path / "sam.zarr")
    joined = open_caches([tmp_path / "main.zarr", tmp_path / "sam.zarr"])
    joined.check_files()
    next(path for path in (tmp_path / "sam.zarr/features/stage1/c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(CorruptError, match=r"sam\.zarr"):
        joined.check_files()


def test_a_depth_head_joins_with_its_zoom(plan: Any, tmp_path: Path) -> None:
    plan(k=5, views=2).write(tmp_path / "main.zarr")
    depth = other(plan, views=2, pixels="source")
    labels = DepthLabels(labelled=3, zoom="divide")
    depth.manifest = depth.manifest.model_copy(update={"heads": {"depth": DEPTH}, "depth": labels})
    depth.arrays["targets/depth/values"] = np.ones((10, 1, 6, 8), DEPTH.dtype)
    depth.arrays["records/depth_digest"] = np.zeros((10, 16), np.uint8)
    depth.write(tmp_path / "far.zarr")
    cache = open_caches([tmp_path / "main.zarr", tmp_path / "far.zarr"])
    assert list(cache.manifest.heads) == [SEGMENTATION, "depth"]
    assert cache.manifest.depth == DepthLabels(labelled=0, zoom="divide")
    assert cache.read(7, ["targets/depth/values"])["targets/depth/values"].max() == 1
    kept = plan(k=5, views=2)
    kept.manifest = kept.manifest.model_copy(update={"depth": DepthLabels(labelled=0, zoom="keep")})
    kept.write(tmp_path / "kept.zarr")
    with pytest.raises(MismatchError, match="A zoom does something else") as caught:
        open_caches([tmp_path / "kept.zarr", tmp_path / "far.zarr"])
    assert "far.zarr has --depth-zoom divide" in caught.value.problem


def changed(made: Any, **parts: Any) -> Any:
    return made.changed(**parts)


def pixels_changed(made: Any) -> Any:
    made.arrays["records/pixel_checksum"] = made.arrays["records/pixel_checksum"].copy()
    made.arrays["records/pixel_checksum"][5] += np.uint64(1)
    return changed(made, build={"libraries": {"pillow": "9.5.0"}})


def ids_changed(made: Any) -> Any:
    made.ids = [*made.ids[:3], "another"]
    return made


WRONG = {
    "pixels": (
        {},
        pixels_changed,
        "The views of .*further.zarr are not those of",
        ["view 1 of sample 'folder/ä 2' shows other pixels", "built with Pillow 9.5.0 against (unknown)"],
    ),
    "settings of views": (
        {},
        lambda made: changed(made, view={"drawn": Drawn(seed=4, scale=(1, 2), flip=True)}),
        "The views of",
        ["view.drawn: seed 4 against 3", "Pillow"],
    ),
    "views": ({"views": 1, "records": 5}, lambda made: made, "The views of", ["view.views_per_sample: 1 against 2"]),
    "samples": (
        {"records": 8},
        ids_changed,
        "The samples of .* are not those of",
        ["4 against 5 samples, number 3 is 'another' against 'folder/ä 3'"],
    ),
    "fewer samples": ({"records": 8}, lambda made: made, "The samples of", ["number 4 is not there against"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_differs_is_named(plan: Any, tmp_path: Path, name: str) -> None:
    changes, change, problem, words = WRONG[name]
    plan(k=5, views=2).write(tmp_path / "main.zarr")
    change(other(plan, **{"views": 2, **changes})).write(tmp_path / "further.zarr")
    with pytest.raises(MismatchError, match=problem) as caught:
        open_caches([tmp_path / "main.zarr", tmp_path / "further.zarr"])
    for text in words:
        assert text in caught.value.problem
    assert f"--like {tmp_path / 'main.zarr'}" in caught.value.fix


def test_heads_classes_and_names_belong_to_one(plan: Any, tmp_path: Path) -> None:
    plan(k=5).write(tmp_path / "main.zarr")
    plan(k=5).write(tmp_path / "second.zarr")
    with pytest.raises(MismatchError, match="Two joined caches have a segmentation head") as caught:
        open_caches([tmp_path / "main.zarr", tmp_path / "second.zarr"])
    assert "--features-only" in caught.value.fix
    with pytest.raises(RecipeError, match="Two joined caches have the name main") as named:
        open_caches([tmp_path / "main.zarr", f"main={tmp_path / 'second.zarr'}"])
    assert named.value.fix == f"Name one of them: --cache NAME={tmp_path / 'second.zarr'}"
    headless = other(plan)
    names = tuple(f"other {number}" for number in range(5))
    changed(headless, dataset={"class_names": names}).write(tmp_path / "features.zarr")
    assert len(open_caches([tmp_path / "main.zarr", tmp_path / "features.zarr"]).parts) == 2
    with pytest.raises(MismatchError, match=r"The classes of .*main.zarr are not those of"):
        open_caches([tmp_path / "features.zarr", tmp_path / "main.zarr"])


def test_a_path_with_an_equals_sign_is_a_path_where_it_is_there(plan: Any, tmp_path: Path, monkeypatch: Any) -> None:
    plan(k=5).write(tmp_path / "seed=3.zarr")
    monkeypatch.chdir(tmp_path)
    assert open_caches("seed=3.zarr").place.folder.name == "seed=3.zarr"
    assert open_caches(f"sam={tmp_path}/seed=3.zarr").place.folder.name == "seed=3.zarr"
