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
from kdcache.training import make_config
from kdcache.training.sources import open_dataset

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
    with pytest.raises(RecipeError, match="would miss a class") as caught:
        draw(**way)
    names = open_split(data, "train").classes.names
    assert f"{names[RARE]} is only in fold 0 of 2" in caught.value.problem
    assert caught.value.fix
    write(second, with_rare(slice(4, 28), slice(4, 44)))
    draw(**way)


def test_a_view_may_show_what_the_whole_image_loses(data: Path, draw: Callable[..., Cache]) -> None:
    """Every second pixel: the whole image at half its size shows the others."""
    first, second = labels_of(data)
    write(first, with_rare(slice(4, 28), slice(4, 44)))
    write(second, with_rare(slice(0, None, 2), slice(0, None, 2)))
    half = {"size": (16, 24), "view_scale": (2.0, 2.0)}
    with pytest.raises(RecipeError, match="would miss a class"):
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
