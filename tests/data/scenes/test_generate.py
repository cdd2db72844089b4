"""The procedural data set: reproducible anywhere, uneven as streets are, writable as a folder."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest

from kdcache.data import IGNORE_INDEX, list_splits, open_split, pixel_checksum, write_scenes
from kdcache.data.scenes.generate import ScenesSpec, _Cache
from kdcache.errors import DataError

SMALL = "scenes:48x64,train=6,val=2,unlabelled=3,seed=7"


def checksums(data: str) -> list[int]:
    """Image and label checksums of the train split."""
    split = open_split(data, "train")
    return [pixel_checksum(array) for i in range(len(split)) for array in (split.image(i), split.label(i))]


def test_the_defaults() -> None:
    train, val = open_split("scenes", "train"), open_split("scenes", "val")
    assert (len(train), len(val)) == (64, 16)
    assert train.image(0).shape == (96, 128, 3)
    assert len(train.classes) == 7
    assert list_splits("scenes") == ["train", "val"]
    assert list_splits(SMALL) == ["train", "unlabelled", "val"]


def test_a_spawned_process_draws_the_same() -> None:
    code = (
        "from kdcache.data import open_split, pixel_checksum as c;"
        f"s = open_split({SMALL!r}, 'train');"
        "print([c(a) for i in range(len(s)) for a in (s.image(i), s.label(i))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(checksums(SMALL))


def test_a_split_crosses_to_a_spawned_process_by_pickle() -> None:
    split = open_split(SMALL, "train")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        image = pool.apply(split.image, (2,))
    assert np.array_equal(image, split.image(2))
    assert len(pickle.dumps(split)) < 4000


def test_samples_depend_on_seed_split_and_index_only() -> None:
    def image(data: str, split: str, index: int) -> int:
        return pixel_checksum(open_split(data, split).image(index))

    base = image("scenes:48x64", "train", 1)
    assert image("scenes:48x64,train=1000,val=3", "train", 1) == base
    others = [("scenes:48x64,seed=1", "train", 1), ("scenes:48x64", "val", 1), ("scenes:48x64", "train", 2)]
    assert len({base, *(image(*other) for other in others)}) == 4


def test_digest_tells_the_pixels_apart() -> None:
    specs = ["scenes:48x64", "scenes:48x65", "scenes:48x64,seed=1", "scenes:48x64,train=65"]
    assert len({open_split(spec, "train").digest() for spec in specs}) == len(specs)


def test_what_is_returned_belongs_to_the_caller() -> None:
    split = open_split(SMALL, "val")
    for read in (split.image, split.label):
        before = read(0).copy()
        read(0)[:] = 9
        assert np.array_equal(read(0), before)


def test_unlabelled_has_images_only() -> None:
    split = open_split(SMALL, "unlabelled")
    assert [split.has_label(i) for i in range(len(split))] == [False] * 3
    assert split.label(0) is None
    assert split.image(2).shape == (48, 64, 3)


def test_classes_are_all_there_and_uneven() -> None:
    split = open_split("scenes:train=40", "train")
    counts = sum(np.bincount(split.label(i).reshape(-1), minlength=256) for i in range(40))
    shares = counts / counts.sum()
    assert (shares[:7] > 0.003).all()
    assert shares[:7].max() / shares[:7].min() > 10
    assert 0.005 < shares[IGNORE_INDEX] < 0.06
    assert counts[7:IGNORE_INDEX].sum() == 0


def test_colours_overlap_between_classes() -> None:
    """The nearest mean colour is a poor classifier, so texture and place are what there is to learn."""
    split = open_split("scenes:train=24", "train")
    colours = np.concatenate([split.image(i).reshape(-1, 3) for i in range(24)]).astype(np.float32)
    ids = np.concatenate([split.label(i).reshape(-1) for i in range(24)])
    means = np.stack([colours[ids == c].mean(axis=0) for c in range(7)])
    nearest = ((colours[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    recalls = [(nearest[ids == c] == c).mean() for c in range(7)]
    assert np.mean(recalls) < 0.5


@pytest.mark.parametrize("size", ["16x16", "17x31", "16x200", "200x16", "65x40"])
def test_odd_sizes(size) -> None:
    split = open_split(f"scenes:{size},train=20", "train")
    for index in range(20):
        assert split.image(index).shape == (*map(int, size.split("x")), 3)


@pytest.mark.parametrize(
    "data", ["scenes:96", "scenes:96x", "scenes:trian=4", "scenes:train=-1", "scenes:8x8", "scenes:train=1,train=2"]
)
def test_malformed_specs_show_what_is_wrong(data) -> None:
    with pytest.raises(DataError) as caught:
        open_split(data, "train")
    assert data in caught.value.received


def test_missing_splits_are_named() -> None:
    with pytest.raises(DataError, match="there are: train, val"):
        open_split("scenes", "unlabelled")
    with pytest.raises(DataError, match="there are: val"):
        open_split("scenes:train=0", "train")


def test_indices_are_those_of_a_sequence() -> None:
    split = open_split(SMALL, "val")
    assert np.array_equal(split.image(-1), split.image(1))
    with pytest.raises(IndexError):
        split.image(2)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_written_out_it_is_a_folder_data_set(tmp_path, suffix) -> None:
    root = write_scenes(tmp_path / "data", SMALL, suffix=suffix)
    assert list_splits(root) == list_splits(SMALL)
    for name in list_splits(root):
        made, read = open_split(SMALL, name), open_split(root, name)
        assert read.classes == made.classes
        assert len(read) == len(made)
        for i in range(len(made)):
            assert read.has_label(i) == made.has_label(i)
            difference = np.abs(read.image(i).astype(int) - made.image(i)).mean()
            assert difference == 0 if suffix == ".png" else difference < 6
            if made.has_label(i):
                assert np.array_equal(read.label(i), made.label(i))


def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    cache = _Cache(limit_bytes=3 * 16 * 16 * 4)
    first = cache.get(16, 16, 0, "train", 0)
    for index in range(1, 10):
        cache.get(16, 16, 0, "train", index)
        assert cache.get(16, 16, 0, "train", 0)[0] is first[0]
        assert len(cache._samples) <= 3
    assert cache._held_bytes == sum(a.nbytes for sample in cache._samples.values() for a in sample)


def test_the_spec_is_read_in_any_order() -> None:
    assert ScenesSpec.parse("scenes:val=2,32x48,seed=5") == ScenesSpec(32, 48, val=2, seed=5)
    assert ScenesSpec.parse("scenes") == ScenesSpec.parse("scenes:") == ScenesSpec()
