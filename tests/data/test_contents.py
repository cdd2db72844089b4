"""Digests of what samples hold, and the private index that saves reading: never stale, and nothing is lost with it."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdcache.data import Contents, Split, contents, open_split, read_contents, short_digests, write_scenes
from kdcache.errors import DataError

LATER_NS = 10_000_000_000


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the indexes, empty."""
    monkeypatch.setenv("KDCACHE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache/digests"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all files that are there be old enough for the index to trust them."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + LATER_NS)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read for their digest."""
    names, digest = list[str](), contents.file_digest

    def counted(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(contents, "file_digest", counted)
    return names


@pytest.fixture
def split(builder, index: Path) -> Split:
    """Three samples, the last without a label."""
    builder.pair("a").pair("b").image("c.png")
    return open_split(str(builder.root), "train")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def changed_in_place(path: Path) -> None:
    """Write other bytes of the same size, and put the time of the last write back."""
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def poison(index: Path) -> None:
    """Let the index say of each file that it has the digest of another one."""
    (file,) = index.iterdir()
    with sqlite3.connect(file) as database:
        assert database.execute("UPDATE digests SET digest = ?", ("0f" * 32,)).rowcount
    database.close()


def test_a_digest_is_the_first_half_of_the_files_sha256(split: Split, builder) -> None:
    read = read_contents(split)
    assert read.ids == ("a", "b", "c")
    for number, name in enumerate("abc"):
        assert read.image[number].tobytes().hex() == sha256(builder.root / f"images/train/{name}.png")[:32]
    assert read.label[0].tobytes().hex() == sha256(builder.root / "labels/train/a.png")[:32]
    assert not read.label[2].any()
    assert not read.depth.any()
    np.testing.assert_array_equal(short_digests(split, 0), [read.image[0], read.label[0], read.depth[0]])


def test_some_samples_are_read_in_the_order_that_is_asked_for(split: Split) -> None:
    seen: list[tuple[int, int]] = []
    some, all_of_them = read_contents(split, [2, 0], progress=lambda *at: seen.append(at)), read_contents(split)
    assert some.ids == ("c", "a")
    np.testing.assert_array_equal(some.image, all_of_them.image[[2, 0]])
    assert seen == [(1, 2), (2, 2)]


def test_digests_of_depth(tmp_path: Path, index: Path) -> None:
    folder = write_scenes(tmp_path / "data", "scenes:32x48,train=2,val=1,depth=exact")
    before = read_contents(open_split(str(folder), "train"))
    assert before.depth.any(1).all()
    changed = next(path for path in sorted((folder / "depth/train").iterdir()))
    changed_in_place(changed)
    after = read_contents(open_split(str(folder), "train"))
    assert (before.depth != after.depth).any(1).tolist() == [True, False]
    assert (before.image == after.image).all()


def test_contents_survive_json(split: Split) -> None:
    read = read_contents(split)
    again = Contents.from_json(read.to_json())
    assert again.ids == read.ids
    assert again.digest == read.digest
    assert "depth" not in read.to_json()


@pytest.mark.parametrize("change", [{"ids": ["a"]}, {"image": "AAAA"}, {"image": 3}, {"label": "?"}, {"ids": None}])
def test_damaged_json_is_an_error(split: Split, change: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Contents.from_json({**read_contents(split).to_json(), **change})


def test_names_and_contents_are_in_the_digest(split: Split, builder) -> None:
    before = read_contents(split).digest
    (builder.root / "images/train/c.png").rename(builder.root / "images/train/d.png")
    renamed = read_contents(open_split(str(builder.root), "train")).digest
    (builder.root / "images/train/d.png").rename(builder.root / "images/train/c.png")
    changed_in_place(builder.root / "labels/train/a.png")
    assert len({before, renamed, read_contents(open_split(str(builder.root), "train")).digest}) == 3


def test_a_renamed_folder_has_the_same_contents(split: Split, builder) -> None:
    before = read_contents(split).digest
    moved = builder.root.rename(builder.root.with_name("elsewhere"))
    assert read_contents(open_split(str(moved), "train")).digest == before


class TestIndex:
    def test_old_files_are_read_once(self, split: Split, reads: list[str], later: None) -> None:
        first = read_contents(split)
        assert sorted(reads) == ["a.png", "a.png", "b.png", "b.png", "c.png"]
        reads.clear()
        assert read_contents(split).digest == first.digest
        assert reads == []

    def test_files_of_this_moment_are_read_again(self, split: Split, reads: list[str], builder) -> None:
        """Two writes within the resolution of a file's times leave no trace in them."""
        first = read_contents(split)
        reads.clear()
        changed_in_place(builder.root / "labels/train/b.png")
        assert (read_contents(split).label != first.label).any(1).tolist() == [False, True, False]
        assert len(reads) == 5

    def test_it_is_never_stale(self, split: Split, builder, later: None) -> None:
        """Not even of a file of the same size whose time of the last write was put back: its ctime is another one."""
        first = read_contents(split)
        changed_in_place(builder.root / "labels/train/b.png")
        second = read_contents(split)
        assert (second.label != first.label).any(1).tolist() == [False, True, False]
        assert (second.image == first.image).all()

    def test_another_file_in_its_place_is_read(self, split: Split, reads: list[str], builder, later: None) -> None:
        read_contents(split)
        reads.clear()
        path = builder.root / "images/train/a.png"
        os.replace(builder.image("new.png"), path)
        assert read_contents(split, [0]).image[0].tobytes().hex() == sha256(path)[:32]
        assert reads == ["a.png"]

    @pytest.mark.parametrize("damage", ["lost", "cut", "garbage", "other table", "folder"])
    def test_losing_it_costs_time_only(
        self, split: Split, index: Path, reads: list[str], later: None, damage: str
    ) -> None:
        first = read_contents(split)
        (file,) = index.iterdir()
        content = file.read_bytes()
        file.unlink()
        if damage == "folder":
            file.mkdir()
        elif damage == "other table":
            with sqlite3.connect(file) as database:
                database.execute("CREATE TABLE digests (path TEXT)")
            database.close()
        elif damage != "lost":
            file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"nothing of the kind" * 100)
        reads.clear()
        assert read_contents(split).digest == first.digest
        assert len(reads) == 5

    def test_without_a_place_for_it_files_are_read(
        self, split: Split, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("KDCACHE_CACHE_DIR", str(tmp_path / "file"))
        assert read_contents(split).ids == ("a", "b", "c")

    def test_who_does_not_ask_it_is_not_fooled(self, split: Split, index: Path, later: None) -> None:
        true = read_contents(split).digest
        poison(index)
        assert read_contents(split).digest != true
        assert read_contents(split, indexed=False).digest == true

    def test_a_file_that_is_gone_is_an_error_that_names_it(self, split: Split, builder, later: None) -> None:
        read_contents(split)
        (builder.root / "labels/train/b.png").unlink()
        with pytest.raises(DataError, match=r"b\.png"):
            read_contents(split)


def test_arrays_have_digests_too(index: Path) -> None:
    scenes = open_split("scenes:32x48,train=2,val=1", "train")
    assert read_contents(scenes).digest == read_contents(open_split("scenes:32x48,train=2,val=1", "train")).digest
    other = read_contents(open_split("scenes:32x48,train=2,val=1,seed=1", "train"))
    assert (other.image != read_contents(scenes).image).any(1).all()


def test_palettes_of_equal_ids_are_other_files(split: Split, builder) -> None:
    """What a digest cannot say: whether another file has another content. `data_changes` renders it again."""
    before = read_contents(split)
    path = builder.root / "labels/train/a.png"
    palette = Image.fromarray(np.array(Image.open(path)), "P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.save(path)
    assert (read_contents(split).label[0] != before.label[0]).any()
