"""Class lists, and the arithmetic of labels."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.data import ClassList, Numbered, Sample, Split
from kdcache.data.sample import default_colours, ids_out_of_range
from kdcache.errors import DataError


def only_ids(names: tuple[str, ...], ids: tuple[str, ...]) -> Split:
    """Return a split in memory. Only its first sample has a label."""
    image = lambda number: np.full((2, 3, 3), number, np.uint8)  # noqa: E731
    label = Numbered(lambda number: np.zeros((2, 3), np.uint8), 0)
    samples = tuple(
        Sample(name, Numbered(image, number), {} if number else {"segmentation": label}, name)
        for number, name in enumerate(ids)
    )
    return Split("memory", "train", ClassList(names), samples)


def test_default_colours_are_distinct_and_kept_through_json() -> None:
    classes = ClassList(tuple(f"class {i}" for i in range(255)))
    assert len(set(classes.colours)) == 255 == len(classes)
    assert ClassList.from_json(classes.to_json()) == classes
    assert ClassList.from_json({"names": ["a", "b"]}) == ClassList(("a", "b"))


def test_default_colours_avoid_the_taken_ones() -> None:
    taken = default_colours(4)[::2]
    assert not set(default_colours(255 - 2, taken=taken)) & set(taken)
    assert default_colours(2) == ((128, 0, 0), (0, 128, 0))


@pytest.mark.parametrize(
    ("names", "colours", "rule"),
    [
        (("a",), (), r"(?s)classes: 1\n.*2 to 255"),
        (tuple(map(str, range(256))), (), r"(?s)classes: 256\n.*2 to 255"),
        (("a", "b", "a"), (), "'a' 2 times"),
        (("a", " "), (), "' ' 1 times"),
        (("a", "b"), ((1, 2, 3),), r"(?s)2 classes: \(\(1, 2, 3\),\).*one RGB triple"),
        (("a", "b"), ((1, 2, 3), (0, 0, 256)), r"(?s)\(0, 0, 256\).*one RGB triple"),
    ],
)
def test_malformed_class_lists_are_refused(names, colours, rule) -> None:
    with pytest.raises(DataError, match=rule):
        ClassList(names, colours)


def test_digest_sees_names_and_ids_and_where_they_end() -> None:
    splits = [
        only_ids(("a", "b"), ("1", "2")),
        only_ids(("a", "c"), ("1", "2")),
        only_ids(("a", "b"), ("12",)),
        only_ids(("a", "b", "1"), ("2",)),
    ]
    assert len({split.digest() for split in splits}) == len(splits)
    assert splits[0].digest() == only_ids(("a", "b"), ("1", "2")).digest()


def test_default_content_digests_cover_arrays() -> None:
    split = only_ids(("a", "b"), ("1", "2"))
    (image0, label0), (image1, label1) = split.content_digests(0), split.content_digests(1)
    assert image0 != image1
    assert label0 is not None
    assert label1 is None
    assert np.array_equal(split.raw_label(0), split.label(0))


def test_ids_out_of_range_spare_void() -> None:
    label = np.array([[0, 1, 2], [2, 254, 255]], np.uint8)
    assert ids_out_of_range(label, 2) == {2: 2, 254: 1}
    assert ids_out_of_range(label, 255) == {}
