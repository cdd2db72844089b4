"""Every cell of the matrix: what each verb says after each change of the data (matrix.py)."""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from matrix import (
    BUILD,
    CHANGES,
    COLUMNS,
    DATA,
    HARMLESS,
    MATRIX,
    NOT_APPLICABLE,
    NOTICED,
    VERBS,
    WORDS,
    kdcache,
    make_world,
)

from kdcache.data import open_split, read_contents
from kdcache.store import data_changes, open_cache

CELLS = [
    pytest.param(row, column, word, id=f"{row}-{column}")
    for row, words in MATRIX.items()
    for column, word in zip(COLUMNS, words, strict=True)
    if word != NOT_APPLICABLE
]
ROWS = (
    *("label corrected", "masks swapped", "image replaced", "sample added", "sample removed", "id renamed"),
    *("class renamed", "classes reordered", "class added", "label format changed", "same content in another file"),
    *("folder renamed", "teacher retrained", "library upgraded", "val changed"),
    "val holds copies of training images",
)

Tree = dict[str, bytes]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A world in which nothing changed, never to be touched."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(folder)
        make_world()
        yield folder


def copied(base: Path, column: str, folder: Path) -> Path:
    """Copy what a verb reads."""
    folder.mkdir()
    for name in (str(DATA), "t-other", *VERBS[column].needs):
        copy = shutil.copytree if (base / name).is_dir() else shutil.copy2
        copy(base / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def usual(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], set[str]]:
    """The lines that the verb of a column prints without a change."""

    @cache
    def lines(column: str) -> set[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(copied(base, column, tmp_path_factory.mktemp("usual") / "world"))
            return lines_of(VERBS[column].run(DATA).text)

    return lines


def test_the_table_has_every_row_and_column_and_no_blank_cell() -> None:
    assert set(ROWS) <= set(MATRIX)
    assert set(MATRIX) == set(CHANGES)
    assert set(COLUMNS) == set(VERBS)
    for row, words in MATRIX.items():
        assert len(words) == len(COLUMNS), row
        assert set(words) <= set(WORDS), row


@pytest.mark.parametrize(("row", "column", "word"), CELLS)
def test_cell(
    row: str,
    column: str,
    word: str,
    base: Path,
    usual: Callable[[str], set[str]],
    tree: Callable[[Path], Tree],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, verb = CHANGES[row], VERBS[column]
    expected = usual(column) if word == HARMLESS else set()
    monkeypatch.chdir(copied(base, column, tmp_path / "world"))
    data = change.make(monkeypatch) or DATA
    before = tree(Path())
    ended = verb.run(data)
    after = tree(Path())
    if word == NOTICED:
        code = change.codes.get(column, verb.code)
        assert ended.code == code, ended.text
        assert re.search(change.names, ended.text), ended.text
        if code:
            assert re.search("fix: |to renew the cache", ended.text), ended.text
            assert {path: after.get(path) for path in before} == before
    else:
        assert word == HARMLESS
        assert ended.code == 0, ended.text
        assert not re.search("differ|changed|trained on", ended.text), ended.text
        assert lines_of(ended.text) <= expected, ended.text
    if ended.code == 0:
        check_made(column, data)


def lines_of(text: str) -> set[str]:
    """The beginnings of lines, without numbers and but for a note on the same content in another file."""
    lines = [re.sub(r"[^A-Za-z ]", "", line).split() for line in text.splitlines() if "same content" not in line]
    return {" ".join(words[:6]) for words in lines}


def check_made(column: str, data: Path) -> None:
    """Check that a store that was written now holds what the data set holds now."""
    made = {"build continued (half built)": "H.zarr", "repair (a shard lost)": "L.zarr", "extend": "new.zarr"}
    if column in made:
        assert not data_changes(open_cache(made[column]), open_split(str(data), "train"))


def test_a_worker_compares_what_the_others_have_finished(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else a label that was corrected between two workers would be the old one in the shards of one of them."""
    monkeypatch.chdir(copied(base, "build continued (half built)", tmp_path / "world"))
    CHANGES["label corrected"].make(monkeypatch)
    ended = kdcache(f"{BUILD} --data {DATA} --worker 0/2 --out H.zarr")
    assert ended.code == 2
    assert "1 label differs ('s3')" in ended.text


def test_verify_reads_every_file_whatever_the_index_says(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that holds the old digest of a corrected label fools who trusts it, and not `verify --data`."""
    monkeypatch.setenv("KDCACHE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(copied(base, "verify --data", tmp_path / "world"))
    now, train = time.time_ns, open_split(str(DATA), "train")
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10_000_000_000)  # files of this moment are never trusted
    before = train.content_digests(3)[1]
    CHANGES["label corrected"].make(monkeypatch)
    read_contents(train)
    (index,) = (tmp_path / "cache/digests").iterdir()
    with contextlib.closing(sqlite3.connect(index)) as database, database:
        changed = database.execute(
            "UPDATE digests SET digest = ? WHERE digest = ?", (before, train.content_digests(3)[1])
        )
        assert changed.rowcount == 1
    assert VERBS["train-student --data (pixels stored)"].run(DATA).code == 0
    ended = VERBS["verify --data"].run(DATA)
    assert ended.code == 1
    assert "1 label differs ('s3')" in ended.text
