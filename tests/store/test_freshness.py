"""The comparison of a data set with what a store was built from: what is a change, and what is another file only."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import (
    UNRECORDED,
    Changes,
    Split,
    changed_data,
    open_split,
    pixel_checksum,
    read_contents,
    render,
    whole_window,
    write_scenes,
)
from kdcache.data.changes import class_changes, digest_changes
from kdcache.store import data_changes
from kdcache.store.freshness import Recorded

SIZE = (16, 24)
VIEWS = 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples with labels of classes and of depth, not to be touched."""
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data", "scenes:32x48,train=4,val=1,depth=exact")


@pytest.fixture
def folder(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCACHE_CACHE_DIR", str(tmp_path / "cache"))
    return shutil.copytree(scenes, tmp_path / "data")


@pytest.fixture
def recorded(folder: Path) -> Recorded:
    """What two views of each sample, whole and mirrored, say of the data set at first."""
    split = train_of(folder)
    contents = read_contents(split)
    views = [(number, view) for number in range(len(split)) for view in range(VIEWS)]
    rendered = [rendered_view(split, number, flip=bool(view)) for number, view in views]
    return Recorded(
        ids=split.ids,
        class_names=split.classes.names,
        views=VIEWS,
        columns={
            "image_digest": contents.image.repeat(VIEWS, 0),
            "label_digest": contents.label.repeat(VIEWS, 0),
            "depth_digest": contents.depth.repeat(VIEWS, 0),
            "label_checksum": np.array([pixel_checksum(label) for _, label in rendered], np.uint64),
            "pixel_checksum": np.array([pixel_checksum(pixels) for pixels, _ in rendered], np.uint64),
            "window": np.array([whole_window("squash", (32, 48), SIZE).as_tuple()] * len(views)),
            "flip": np.array([bool(view) for _, view in views]),
        },
        known=np.ones(len(views), np.bool_),
        size=SIZE,
    )


def train_of(folder: Path) -> Split:
    return open_split(str(folder), "train")


def rendered_view(split: Split, number: int, *, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    window = whole_window("squash", (32, 48), SIZE)
    return render(split.image(number), split.label(number), window, flip=flip, size=SIZE)


def file_of(folder: Path, kind: str, number: int) -> Path:
    return sorted(path for path in (folder / kind / "train").iterdir())[number]


def corrected(folder: Path, number: int) -> None:
    path = file_of(folder, "labels", number)
    Image.fromarray((np.array(Image.open(path)) + 1) % 3).save(path)


def replaced(folder: Path, number: int) -> None:
    path = file_of(folder, "images", number)
    Image.fromarray(255 - np.array(Image.open(path))).save(path)


def encoded_again(path: Path) -> None:
    before = path.read_bytes()
    Image.open(path).save(path, compress_level=0)
    assert path.read_bytes() != before


def test_nothing_changed(folder: Path, recorded: Recorded) -> None:
    changes = data_changes(recorded, train_of(folder))
    assert (bool(changes), changes.notes(), changes.describe()) == (False, [], "")


def test_each_kind_of_change_names_its_samples(folder: Path, recorded: Recorded) -> None:
    corrected(folder, 1)
    replaced(folder, 2)
    depth = file_of(folder, "depth", 3)
    depth.write_bytes(file_of(folder, "depth", 0).read_bytes())
    changes = data_changes(recorded, train_of(folder))
    ids = recorded.ids
    assert changes == Changes(labels=(ids[1],), images=(ids[2],), depths=(ids[3],))
    assert changes.describe() == (
        f"1 label differs ({ids[1]!r}), 1 image differs ({ids[2]!r}), 1 depth label differs ({ids[3]!r})"
    )


def test_added_removed_and_renamed_samples(folder: Path, recorded: Recorded) -> None:
    for kind in ("images", "labels", "depth"):
        path = file_of(folder, kind, 0)
        path.rename(path.with_stem("zzz"))
    changes = data_changes(recorded, train_of(folder))
    assert (changes.added, changes.removed) == (("zzz",), recorded.ids[:1])
    assert (changes.images, changes.labels) == ((), ())


def test_the_same_content_in_another_file_is_a_note(folder: Path, recorded: Recorded) -> None:
    encoded_again(file_of(folder, "images", 0))
    encoded_again(file_of(folder, "labels", 2))
    changes = data_changes(recorded, train_of(folder))
    assert not changes
    assert changes.same == (recorded.ids[0], recorded.ids[2])
    assert "2 samples have the same content in another file" in changes.notes()[0]


def test_a_label_that_is_gone_or_new_is_a_change(folder: Path, recorded: Recorded) -> None:
    path = file_of(folder, "labels", 1)
    content = path.read_bytes()
    path.unlink()
    assert data_changes(recorded, train_of(folder)).labels == recorded.ids[1:2]
    without = {name: rows.copy() for name, rows in recorded.columns.items()}
    without["label_digest"][2 * VIEWS : 3 * VIEWS] = 0
    path.write_bytes(content)
    assert data_changes(replace(recorded, columns=without), train_of(folder)).labels == recorded.ids[2:3]


def test_one_view_is_enough_to_see_a_change(folder: Path, recorded: Recorded) -> None:
    """As where only the second view of a crop shows what was corrected."""
    encoded_again(file_of(folder, "labels", 0))
    columns = {name: rows.copy() for name, rows in recorded.columns.items()}
    columns["label_checksum"][1] ^= np.uint64(1)
    assert data_changes(replace(recorded, columns=columns), train_of(folder)).labels == recorded.ids[:1]


def test_records_that_are_not_known_are_not_compared(folder: Path, recorded: Recorded) -> None:
    corrected(folder, 1)
    corrected(folder, 3)
    known = np.arange(len(recorded.known)) < 2 * VIEWS
    assert data_changes(replace(recorded, known=known), train_of(folder)).labels == recorded.ids[1:2]


def test_an_earlier_store_says_that_labels_are_not_recorded(folder: Path, recorded: Recorded) -> None:
    corrected(folder, 0)
    early = replace(recorded, columns={}, known=np.zeros_like(recorded.known))
    changes = data_changes(early, train_of(folder))
    assert (bool(changes), changes.notes()) == (False, [UNRECORDED])
    file_of(folder, "images", 3).unlink()
    file_of(folder, "labels", 3).unlink()
    file_of(folder, "depth", 3).unlink()
    assert data_changes(early, train_of(folder)).removed == recorded.ids[3:]


def test_every_file_can_be_read(folder: Path, recorded: Recorded) -> None:
    seen: list[tuple[int, int]] = []
    assert not data_changes(recorded, train_of(folder), indexed=False, progress=lambda *at: seen.append(at))
    assert seen[-1] == (4, 4)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (("a", "b", "c"), ""),
        (("a", "c", "b"), "the classes are in another order (a, c, b, before a, b, c)"),
        (("a", "x", "c"), "classes were renamed: 'b' is now 'x'"),
        (("a", "b", "c", "d"), "class 'd' was added"),
        (("a", "c"), "class 'b' was removed"),
    ],
)
def test_how_classes_differ(now: tuple[str, ...], words: str) -> None:
    assert class_changes(("a", "b", "c"), now) == words
    assert bool(Changes(classes=words)) == bool(words)


def test_digests_of_two_times(folder: Path) -> None:
    before = read_contents(train_of(folder))
    corrected(folder, 0)
    replaced(folder, 1)
    file_of(folder, "depth", 2).write_bytes(file_of(folder, "depth", 0).read_bytes())
    for kind in ("images", "labels", "depth"):
        file_of(folder, kind, 3).unlink()
    changes = digest_changes(before, read_contents(train_of(folder)))
    ids = before.ids
    assert changes == Changes(labels=(ids[0],), images=(ids[1],), depths=(ids[2],), removed=(ids[3],))


def test_many_samples_are_counted(folder: Path) -> None:
    split = train_of(folder)
    error = changed_data("c.zarr", Changes(labels=tuple("abcde")), split, "Restore it.")
    assert "5 labels differ ('a', 'b', 'c' and 2 more)" in error.problem


def test_a_data_set_without_any_of_the_samples_is_called_another_one(folder: Path, recorded: Recorded) -> None:
    changes = data_changes(replace(recorded, ids=("w", "x", "y", "z")), train_of(folder))
    error = changed_data("c.zarr", changes, train_of(folder), "give the data set")
    assert error.problem == (
        f"Not the data set that c.zarr was made from: no sample is the same ({folder}, split 'train')"
    )
