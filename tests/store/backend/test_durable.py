"""Files that appear whole or not at all, and a full disk by whatever name its error has.

What would be on the disk after a power cut is told by a layer that notes every sync and every rename, by path.
Kills cannot show it: what a killed process wrote is there, synced or not. Three rules make a cut harmless. A file's
bytes are synced before its name appears. Its name, and those of all folders up to the store, are synced before anything
that speaks of it is named. A seal that is taken away is gone from the disk before what it sealed is written again.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kdcache.errors import StoreError
from kdcache.store import open_writer
from kdcache.store.backend.durable import disk_space_errors, file_digest, write_durably

SEAL, WHOLE = "complete.json", "ledger.jsonl"


def test_a_file_is_whole_or_not_there(tmp_path) -> None:
    path = tmp_path / "a.json"
    write_durably(path, b"first")
    digest = file_digest(path)
    with pytest.raises(TypeError):
        write_durably(path, "no bytes")
    assert (path.read_bytes(), file_digest(path)) == (b"first", digest)
    write_durably(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.json"]


def test_other_errors_pass(tmp_path) -> None:
    for error in (OSError(errno.EIO, "no"), RuntimeError("inline_container"), KeyError("x")):
        with pytest.raises(type(error)) as caught, disk_space_errors(tmp_path / "x"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_to_be_full(tmp_path, number) -> None:
    with pytest.raises(StoreError, match="No space left"), disk_space_errors(tmp_path):
        raise OSError(number, "full")


@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_writers_that_lose_the_error_number(small_disk, how) -> None:
    import torch
    from safetensors.torch import save_file

    disk = small_disk(100)
    state = {"a": torch.zeros(100_000)}
    write = torch.save if how == "torch" else save_file
    with pytest.raises(StoreError, match="No space left"), disk_space_errors(disk.path / "run"):
        write(state, disk.path / "x")


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "not permitted"),
        (errno.ENAMETOOLONG, "name too long"),
    ],
)
def test_what_cannot_be_written_is_named_for_what_it_is(tmp_path, number, says) -> None:
    with pytest.raises(StoreError) as caught, disk_space_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))
    assert says in caught.value.problem
    assert str(tmp_path / "file") in caught.value.problem
    assert "space" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 252, "x" * 255, "ä" * 127, "\N{GRINNING FACE}" * 63])
def test_a_name_may_be_as_long_as_the_file_system_lets_it(tmp_path, name) -> None:
    """What it is called while it is written is no longer than that."""
    write_durably(tmp_path / name, b"content")
    write_durably(tmp_path / name, b"other")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"other"


def test_a_name_that_is_too_long(tmp_path) -> None:
    with pytest.raises(StoreError, match="255 bytes"), disk_space_errors(tmp_path):
        write_durably(tmp_path / ("x" * 256), b"content")
    assert os.listdir(tmp_path) == []


# After a power cut


class Event(NamedTuple):
    what: str  # "sync", "name" or "remove"
    path: Path
    content: int = 0  # of a sync: bytes of the file; of a name: bytes that were synced before it


class Disk:
    """Notes what is done to the disk."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self._synced: dict[int, int] = {}  # bytes by inode
        fsync, rename, replace, unlink = os.fsync, os.rename, os.replace, os.unlink

        def synced(handle: int) -> None:
            fsync(handle)
            status = os.fstat(handle)
            self._synced[status.st_ino] = status.st_size
            self.events.append(Event("sync", Path(os.readlink(f"/proc/self/fd/{handle}")), status.st_size))

        def named(original: Any) -> Any:
            def move(source: Any, target: Any, **options: Any) -> None:
                known = self._synced.get(os.stat(source).st_ino, -1)
                original(source, target, **options)
                self.events.append(Event("name", Path(target), known))

            return move

        def removed(path: Any, **options: Any) -> None:
            unlink(path, **options)
            self.events.append(Event("remove", Path(path)))

        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "rename", named(rename))
        patch.setattr(os, "replace", named(replace))
        patch.setattr(os, "unlink", removed)

    def first(self, what: str, path: Path, after: int = -1) -> int:
        """When something first happened after a moment; far in the future if it never did."""
        there = (at for at, event in enumerate(self.events) if at > after and (event.what, event.path) == (what, path))
        return next(there, 10**9)


@pytest.fixture
def small(plan) -> Any:
    return plan(features=False, pixels="source", records=3, shard_records=2)


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def files_of(store: Path) -> list[Path]:
    return [path for path in store.rglob("*") if path.is_file()]


def check_folders(disk: Disk, path: Path, store: Path, named: int, until: int) -> None:
    """All that leads to a file is synced before `until`: its own folder after it got its name, others once."""
    assert disk.first("sync", path.parent, named) < until, f"{path.parent} is not synced after {path.name} is there"
    for folder in path.parent.parents:
        if store in (folder, *folder.parents):
            assert disk.first("sync", folder) < until, f"{folder} is not synced"


def test_a_build_reaches_the_disk_in_its_order(small, tmp_path, disk) -> None:
    """Shard, record; all records, ledger, seal."""
    store = small.write(tmp_path / "s.zarr")
    seal = disk.first("name", store / SEAL)
    whole = disk.first("name", store / WHOLE)
    for path in files_of(store):
        named = disk.first("name", path)
        if named == 10**9:
            continue  # it came with the store's folder
        assert disk.events[named].content == path.stat().st_size, f"{path} is named before its bytes are synced"
        key = path.relative_to(store)
        until = seal
        if "c" in key.parts:
            until = disk.first("name", store / f"ledger/{int(key.parts[key.parts.index('c') + 1]):08d}.json")
        elif key.parts[0] == "ledger":
            until = whole
        elif key.name == SEAL:
            until = 10**8
        check_folders(disk, path, store, named, until)
    assert whole < seal


def test_a_store_appears_with_all_its_metadata_on_the_disk(small, tmp_path, disk) -> None:
    """Under another name, each file and folder is synced; then the folder is named, and that is synced too."""
    with open_writer(tmp_path / "s.zarr", small.manifest, small.ids):
        pass
    store, begun = tmp_path / "s.zarr", tmp_path / ".s.zarr.begun"
    named = disk.first("name", store)
    inside = [path for path in store.rglob("*") if path.name != "manifest.json"]
    for path in (*inside, store):
        there = begun / path.relative_to(store)
        last = max(at for at, event in enumerate(disk.events) if event[:2] == ("sync", there))
        assert last < named, f"{path} is not synced before the store is there"
    for path in (path for path in inside if path.is_file()):
        there = begun / path.relative_to(store)
        synced = disk.first("sync", there)
        assert disk.events[synced].content == path.stat().st_size
        for folder in there.parents:
            if begun in (folder, *folder.parents):
                assert disk.first("sync", folder, synced) < named, f"{folder} does not know {path.name} for sure"
    assert disk.first("sync", tmp_path, named) < 10**9


def test_a_repair_unseals_on_the_disk_first(small, tmp_path, disk) -> None:
    store = small.write(tmp_path / "s.zarr")
    file = store / "records/view/c/1"
    file.write_bytes(b"")
    start = len(disk.events) - 1
    small.write(store)
    unsealed = disk.first("remove", store / SEAL, start)
    forgotten = disk.first("remove", store / "ledger/00000001.json", start)
    written = disk.first("name", file, start)
    recorded = disk.first("name", store / "ledger/00000001.json", start)
    sealed = disk.first("name", store / SEAL, start)
    assert unsealed < disk.first("sync", store, unsealed) < forgotten
    assert forgotten < disk.first("sync", store / "ledger", forgotten) < written
    assert written < disk.first("sync", file.parent, written) < recorded
    assert recorded < disk.first("sync", store / "ledger", recorded) < sealed < disk.first("sync", store, sealed)


@pytest.mark.parametrize("key", ["zarr.json", "manifest.json", "records/view/zarr.json", WHOLE, SEAL])
def test_what_is_written_again_is_synced(small, tmp_path, disk, key) -> None:
    store = small.write(tmp_path / "s.zarr")
    (store / key).write_bytes(b"")
    start = len(disk.events) - 1
    small.write(store)
    named = disk.first("name", store / key, start)
    assert disk.events[named].content == (store / key).stat().st_size
    assert disk.first("sync", (store / key).parent, named) < 10**9
