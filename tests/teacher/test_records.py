"""Pixels, labels and targets of a store's records, from the store or from the data set beside it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdcache.data import Split, open_split
from kdcache.errors import MismatchError
from kdcache.store import Records, open_cache
from kdcache.teacher import BuildOptions, Teacher, build_cache

OTHER = "scenes:36x52,train=2"


@pytest.fixture
def stores(tmp_path: Path, teacher: Teacher, split: Split, options: Callable[..., BuildOptions]) -> dict[str, Records]:
    """Of whole images and drawn views, by where their pixels are."""
    for pixels in ("stored", "source"):
        build_cache(split, teacher, tmp_path / pixels, options(views=2, pixels=pixels))
    return {
        "stored": Records.open(tmp_path / "stored"),
        "source": Records(open_cache(tmp_path / "source"), split),
        "bare": Records.open(tmp_path / "source"),
    }


def test_records_are_the_same_wherever_their_pixels_are(stores: dict[str, Records], split: Split) -> None:
    stored, source = stores["stored"], stores["source"]
    assert len(stored) == len(source) == 2 * len(split)
    again = pickle.loads(pickle.dumps(source))
    for record in range(len(stored)):
        for records in (source, again):
            assert np.array_equal(records.pixels(record), stored.pixels(record))
            assert np.array_equal(records.label(record), stored.label(record))
        assert stored.sample(record) == source.sample(record) == split.ids[record // 2]
        one, other = stored.target(record), source.target(record)
        assert one.keys() == other.keys() == {"values"}
        assert np.array_equal(one["values"], other["values"])


def test_a_store_without_pixels_needs_its_data_set(stores: dict[str, Records]) -> None:
    bare = stores["bare"]
    assert [records.complete for records in stores.values()] == [True, True, False]
    assert bare.target(0).keys() == {"values"}
    for ask in (bare.pixels, bare.label, bare.render):
        with pytest.raises(MismatchError, match="Missing --data"):
            ask(0)
    for store in ("stored", "source"):
        with pytest.raises(MismatchError, match="is not what"):
            Records(stores[store].cache, open_split(OTHER, "train"))


def test_an_image_that_renders_to_other_pixels_is_refused(stores: dict[str, Records], split: Split) -> None:
    source = stores["source"]
    image = split.image(1)
    source.check_image(2, image)
    with pytest.raises(MismatchError, match="does not render as at the build") as caught:
        source.check_image(3, image[::-1])
    assert split.ids[1] in caught.value.problem
    source.check_image(2, image[::-1])  # each record is looked at once: a training visits it often
    assert source.is_same(2, source.render(2)[0])
    assert not source.is_same(2, source.render(2, (16, 24))[0])
