"""Folds: equal, stable, and none that leaves a class out."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.data import check_folds, fold_alone, folds_of, open_split, parse_fold, write_scenes
from kdcache.data.folds import excerpt
from kdcache.errors import RecipeError


@given(ids=st.lists(st.text(min_size=1), min_size=2, max_size=40, unique=True), data=st.data())
def test_folds_are_equal_and_of_the_ids_alone(ids, data) -> None:
    folds = data.draw(st.integers(2, len(ids)))
    fold_of = folds_of(ids, folds)
    counts = np.bincount(fold_of, minlength=folds)
    assert len(counts) == folds
    assert counts.max() - counts.min() <= 1
    order = data.draw(st.permutations(range(len(ids))))
    assert folds_of([ids[n] for n in order], folds).tolist() == fold_of[list(order)].tolist()
    ranked = sorted(ids, key=lambda i: hashlib.blake2b(i.encode(), digest_size=8, key=b"kdcache folds").digest())
    assert [fold_of[ids.index(sample)] for sample in ranked] == [n % folds for n in range(len(ids))]


@pytest.mark.parametrize(("ids", "folds"), [("abc", 1), ("abc", 0), ("abc", -2), ("abc", 4), ("", 2)])
def test_folds_that_cannot_be(ids, folds) -> None:
    with pytest.raises(RecipeError, match="folds") as caught:
        folds_of(ids, folds)
    assert caught.value.problem == f"Cannot deal {len(ids)} samples into {folds} folds"


def test_a_fold_by_its_name() -> None:
    assert parse_fold("1/4") == (1, 4, None)
    assert str(parse_fold("1/4", "^.")) == "1/4 by ^."
    for text in ("", "4/4", "-1/4", "1", "0/1", "1/4/5", "a/b", "1.0/4"):
        with pytest.raises(RecipeError, match="--fold"):
            parse_fold(text)


def test_folds_are_parts_of_a_split() -> None:
    split = open_split("scenes:36x52,train=7", "train")
    parts = [fold_alone(split, fold, 3) for fold in range(3)]
    assert sorted(sample for part in parts for sample in part.ids) == list(split.ids)
    for fold, part in enumerate(parts):
        assert [folds_of(split.ids, 3)[split.ids.index(sample)] for sample in part.ids] == [fold] * len(part)
        assert part.ids == tuple(sorted(part.ids))
        number = split.ids.index(part.ids[-1])
        assert np.array_equal(part.image(len(part) - 1), split.image(number))
        assert np.array_equal(part.label(len(part) - 1), split.label(number))
        assert part.has_label(0)


@pytest.mark.parametrize("parted", [lambda split: fold_alone(split, 1, 3), lambda split: excerpt(split, [4, 6])])
def test_a_part_gives_what_the_whole_has(tmp_path, parted) -> None:
    """Image, label, the numbers in the label's file, and digests of the files, each of the sample with that id."""
    split = open_split(write_scenes(tmp_path / "data", "scenes:36x52,train=8,val=1"), "train")
    part = parted(split)
    assert part.ids != split.ids[: len(part)]
    for number, sample in enumerate(part.ids):
        index = split.ids.index(sample)
        assert np.array_equal(part.image(number), split.image(index))
        for name in ("label", "raw_label"):
            array, wanted = getattr(part, name)(number), getattr(split, name)(index)
            assert np.array_equal(array, wanted), name
            others = [getattr(split, name)(n) for n in range(len(split)) if n != index]
            assert not any(np.array_equal(array, other) for other in others), name
        assert part.content_digests(number) == split.content_digests(index)
        assert part.has_label(number) == split.has_label(index)
    assert part.digest() != split.digest()
    assert len({split.content_digests(n) for n in range(len(split))}) == len(split)


def test_an_excerpt_keeps_the_folds_of_the_whole() -> None:
    split = open_split("scenes:36x52,train=9", "train")
    numbers = [1, 4, 8]
    assert excerpt(split, numbers).folds(5).tolist() == folds_of(split.ids, 5)[numbers].tolist()
    assert len(excerpt(split, [3]).folds(9)) == 1
    with pytest.raises(RecipeError, match="folds"):
        excerpt(split, numbers).folds(10)


def test_a_class_in_one_fold_alone(tmp_path) -> None:
    from PIL import Image

    folder = write_scenes(tmp_path / "data", "scenes:36x52,train=6,val=1")
    labels = sorted((folder / "labels/train").iterdir())
    for path in labels:
        Image.fromarray(np.full((36, 52), 1, np.uint8)).save(path)
    split = open_split(folder, "train")
    check_folds(split, 2)  # classes that nobody has are nobody's loss
    rare = np.full((36, 52), 1, np.uint8)
    rare[3, 4] = 6
    Image.fromarray(rare).save(labels[2])
    fold = folds_of(split.ids, 2)[2]
    with pytest.raises(RecipeError, match="would miss a class") as caught:
        check_folds(split, 2)
    assert f"{split.classes.names[6]} is only in fold {fold} of 2" in caught.value.problem
    other = int(np.flatnonzero(folds_of(split.ids, 2) != fold)[0])
    Image.fromarray(rare).save(labels[other])
    check_folds(split, 2)
    labels[other].unlink()  # an image without a label counts for nothing
    with pytest.raises(RecipeError, match="would miss a class"):
        check_folds(open_split(folder, "train"), 2)
