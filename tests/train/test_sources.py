"""What a training may draw from: folds of a store that leave out a class are refused as those of a folder are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcache.data import folds_of, open_split, write_scenes
from kdcache.errors import RecipeError
from kdcache.store import Cache, open_cache
from kdcache.train import make_config
from kdcache.train.sources import open_dataset, open_validation, shared_with_judge

SIZE = (32, 48)
RARE = 6


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images with a label of class 1 alone."""
    folder = write_scenes(tmp_path / "data", "scenes:32x48,train=6,val=1")
    for path in (folder / "labels/train").iterdir():
        write(path, np.full(SIZE, 1, np.uint8))
    return folder


@pytest.fixture
def draw(settings: dict[str, Any], make_cache: Callable[..., Path], data: Path) -> Callable[..., Cache]:
    """Builds a store of `data` and opens it as a training with --fold 0/2 does."""

    def make(**options: Any) -> Cache:
        cache = open_cache(make_cache(str(data), **options))
        source = str(data) if options.get("pixels") == "source" else None
        changes = {"verb": "train-student", "method": "none", "fold": "0/2", "data": source, "size": None}
        open_dataset(make_config(**(settings | changes | {"cache": str(cache.place)})), cache)
        return cache

    return make


def write(path: Path, label: np.ndarray[Any, Any]) -> None:
    Image.fromarray(label).save(path)


def with_rare(rows: slice, columns: slice) -> np.ndarray[Any, Any]:
    label = np.full(SIZE, 1, np.uint8)
    label[rows, columns] = RARE
    return label


VIDEOS = [f"{video}_{frame:04d}" for video in ("bus", "tram") for frame in range(0, 120, 30)]


@pytest.fixture
def videos(tmp_path: Path) -> str:
    """Two videos of four frames, and two more frames of one of them for validation."""
    folder = write_scenes(tmp_path / "videos", "scenes:32x48,train=8,val=2")
    for split, names in (("train", VIDEOS), ("val", ["bus_0045", "bus_0047"])):
        for kind in ("images", "labels"):
            for path, name in zip(sorted((folder / kind / split).iterdir()), names, strict=True):
                path.rename(path.with_stem(name))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"val": None}, None),
        ({}, "judges it (validation) share sequences: bus_* (2 judged, 4 trained on). Frames"),
        ({"val": None, "fold": "0/2"}, "judges it (fold 0/2) share sequences: "),
        ({"val_split": "train", "val_fold": "0/2", "fold": "0/2"}, "(validation and fold 0/2) share sequences: "),
        ({"val_split": "train", "val_fold": "0/2", "fold": "0/2", "folds_by": "^(.+)_"}, None),
        ({"fold": "0/2", "folds_by": "^(.+)_"}, "bus (2 judged, 4 trained on). Frames"),
        ({"fold": "1/2", "folds_by": "^(.+)_"}, None),
    ],
)
def test_sequences_that_judge_and_training_share(
    settings: dict[str, Any], videos: str, changes: dict[str, Any], shared: str | None
) -> None:
    config = make_config(**(settings | {"data": videos, "val": videos} | changes))
    dataset = open_dataset(config, None)
    text = shared_with_judge(config, dataset, open_validation(config))
    assert (text is None) if shared is None else (text is not None and shared in text), text


def test_folds_of_a_store_keep_sequences_whole(
    settings: dict[str, Any], make_cache: Callable[..., Path], videos: str
) -> None:
    cache = open_cache(make_cache(videos))
    changes = {"verb": "train-student", "method": "none", "data": None, "size": None, "cache": str(cache.place)}
    config = make_config(**(settings | changes | {"fold": "0/2", "folds_by": "^(.+)_"}))
    dataset = open_dataset(config, cache)
    assert [dataset.sample_id(index) for index in range(len(dataset))] in (VIDEOS[:4], VIDEOS[4:])
    with pytest.raises(RecipeError, match="a sequence for each fold"):
        open_dataset(config.model_copy(update={"fold": "0/3"}), cache)


def labels_of(data: Path) -> tuple[Path, Path]:
    """A label of each of two folds."""
    paths = sorted((data / "labels/train").iterdir())
    folds = folds_of(open_split(data, "train").ids, 2).tolist()
    return paths[folds.index(0)], paths[folds.index(1)]


WAYS = {"stored": {}, "source": {"pixels": "source"}, "crops": {"crop": (16, 24), "view_scale": (1.0, 1.0), "views": 8}}


@pytest.mark.parametrize("way", [pytest.param(options, id=name) for name, options in WAYS.items()])
def test_a_class_of_one_fold_alone_is_refused(data: Path, draw: Callable[..., Cache], way: dict[str, Any]) -> None:
    draw(**way)  # classes that nobody has are nobody's loss
    first, second = labels_of(data)
    write(first, with_rare(slice(4, 28), slice(4, 44)))
    with pytest.raises(RecipeError, match="every class") as caught:
        draw(**way)
    names = open_split(data, "train").classes.names
    assert caught.value.received == f"{names[RARE]} is in fold 0 alone of 2"
    assert caught.value.remedy
    write(second, with_rare(slice(4, 28), slice(4, 44)))
    draw(**way)


def test_a_view_may_show_what_the_whole_image_loses(data: Path, draw: Callable[..., Cache]) -> None:
    """Every second pixel: the whole image at half its size shows the others."""
    first, second = labels_of(data)
    write(first, with_rare(slice(4, 28), slice(4, 44)))
    write(second, with_rare(slice(0, None, 2), slice(0, None, 2)))
    half = {"size": (16, 24), "view_scale": (2.0, 2.0)}
    with pytest.raises(RecipeError, match="every class"):
        draw(**half)
    draw(**half, views=8)


def test_one_label_of_a_sample_is_read_where_that_suffices(
    data: Path, draw: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, records = Cache.read, list[int]()

    def count(cache: Cache, record: int, paths: Any) -> Any:
        records.append(record)
        return read(cache, record, paths)

    monkeypatch.setattr(Cache, "read", count)
    draw(views=4, fidelity=False)
    assert sorted(records) == [4 * sample for sample in range(6)]
