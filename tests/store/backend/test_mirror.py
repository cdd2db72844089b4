"""Copies of remote files: bounded, shared by processes, never taken for whole when they are not, never trusted."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import pytest

from kdcache.errors import CorruptError, StoreError
from kdcache.locks import Lock
from kdcache.store import open_cache
from kdcache.store.backend import mirror, object_store
from kdcache.store.backend.mirror import Mirror

VALUES = "targets/segmentation/values"
SHARD_FILE = f"{VALUES}/c/1/0/0/0"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    monkeypatch.setattr(object_store, "PAUSE_SECONDS", 0.001)


@pytest.fixture(scope="module")
def small(plan):
    return plan(features=False, pixels="source", records=12)


@pytest.fixture(scope="module")
def warm(s3_server, small, tmp_path_factory) -> Path:
    """Copies of every file of a store that is only read."""
    folder = tmp_path_factory.mktemp("warm")
    with pytest.MonkeyPatch.context() as patch:
        s3_server.enter(patch, folder)
        small.write(s3_server.address("mirrored"))
        read_everything(open_cache(s3_server.address("mirrored")), small)
    return folder


@pytest.fixture(scope="module")
def address(s3_server, warm) -> str:
    """Of that store."""
    return s3_server.address("mirrored")


class Source:
    """Files to be fetched, and how often each was."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def open(self, copies: Mirror, key: str, size: int) -> None:
        def download(file: BinaryIO) -> int:
            self.fetched.append(key)
            return file.write(key.encode() * (size // len(key)))

        handle = copies.open(copies.folder / "store", key, size, download)
        assert os.pread(handle, size + 1, 0) == key.encode() * (size // len(key))
        os.close(handle)


def held(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.rglob("*") if path.is_file() and ".locks" not in path.relative_to(folder).parts
    )


def bytes_of(folder: Path) -> int:
    """What the copies take, as far as one can see while others write."""
    total = 0
    for top, _, names in os.walk(folder):  # unlike rglob it does not mind folders that go
        for name in names if not top.endswith(".locks") else ():
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(f"{top}/{name}").st_size
    return total


def read_everything(cache, small, order=None) -> None:
    for record in range(len(cache)) if order is None else order:
        for path, row in cache.read(int(record), list(cache.specs)).items():
            np.testing.assert_array_equal(row, small.arrays[path][record], err_msg=path)


def test_who_was_not_used_for_longest_makes_room(tmp_path) -> None:
    copies, source = Mirror(tmp_path, 100), Source()
    for key in "abc":
        source.open(copies, key, 30)
    source.open(copies, "a", 30)
    assert held(copies.folder) == ["a", "b", "c"]
    source.open(copies, "d", 30)  # a tenth of what could stay goes as well, so that one round serves several
    assert held(copies.folder) == ["a", "c", "d"]
    source.open(copies, "b", 30)
    assert held(copies.folder) == ["a", "b", "d"]
    source.open(copies, "big", 99)
    assert held(copies.folder) == ["big"]
    assert source.fetched == ["a", "b", "c", "d", "b", "big"]


def test_room_is_made_for_several_at_once(tmp_path) -> None:
    """To look at every copy for each new file would take longer than to fetch it."""
    copies, source = Mirror(tmp_path, 100), Source()
    for key in "abcdefghij":
        source.open(copies, key, 10)
    source.open(copies, "k", 10)
    assert held(copies.folder) == list("cdefghijk")
    source.open(copies, "l", 10)
    assert held(copies.folder) == list("cdefghijkl")


def test_a_copy_of_another_size_is_none(tmp_path) -> None:
    copies, source = Mirror(tmp_path, 100), Source()
    source.open(copies, "a", 30)
    source.open(copies, "a", 60)
    assert source.fetched == ["a", "a"]
    assert bytes_of(copies.folder) == 60


def test_a_bound_that_became_smaller(tmp_path) -> None:
    source = Source()
    for key in "abcdef":
        source.open(Mirror(tmp_path, 1000), key, 100)
    source.open(Mirror(tmp_path, 350), "g", 100)
    assert held(tmp_path / "mirrors") == ["e", "f", "g"]
    assert Mirror(tmp_path).most() > 2**20


def test_the_bound_is_half_of_what_is_free_copies_included(tmp_path, monkeypatch) -> None:
    """So that it stays the same while the copies grow."""
    copies, source, disk = Mirror(tmp_path), Source(), 1000
    monkeypatch.setattr(
        mirror.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk - bytes_of(tmp_path / "mirrors"))
    )
    for key in "abcd":
        source.open(copies, key, 200)
        assert copies.most() == 500
    assert bytes_of(copies.folder) == 400
    disk = 1400
    assert copies.most() == 700


def test_a_file_beyond_the_bound_is_refused(tmp_path) -> None:
    copies, source = Mirror(tmp_path, 100), Source()
    source.open(copies, "a", 50)
    with pytest.raises(StoreError, match="does not fit") as caught:
        source.open(copies, "b", 101)
    assert "101 bytes does not fit into --cache-bytes 100" in caught.value.problem
    assert "--cache-bytes" in caught.value.fix
    assert held(tmp_path) == ["a"]
    assert source.fetched == ["a"]


@pytest.mark.parametrize("count", ["", "what", "-5", "99999999999"])
def test_a_wrong_count_is_made_right(tmp_path, count) -> None:
    """Of bytes that are held: what a crash, or somebody who deleted files, leaves."""
    copies, source = Mirror(tmp_path, 100), Source()
    source.open(copies, "a", 60)
    (copies.folder / ".locks" / "held").write_text(count)
    for key in "bcdef":
        source.open(copies, key, 60)
    assert bytes_of(copies.folder) <= 120
    assert held(copies.folder)[-1] == "f"


def test_what_else_is_in_the_folder_stays(tmp_path, tree) -> None:
    (tmp_path / "thesis.zarr" / "c").mkdir(parents=True)
    (tmp_path / "thesis.zarr" / "c" / "0").write_bytes(b"x" * 1000)
    (tmp_path / "mirrors").mkdir()
    (tmp_path / "mirrors" / "link").symlink_to(tmp_path / "thesis.zarr")
    before = tree(tmp_path / "thesis.zarr")
    copies, source = Mirror(tmp_path, 100), Source()
    for key in "abc":
        source.open(copies, key, 90)
    assert tree(tmp_path / "thesis.zarr") == before
    assert held(copies.folder) == ["c"]


def test_a_download_that_fails_leaves_nothing(tmp_path) -> None:
    copies = Mirror(tmp_path, 100)

    def broken(file: BinaryIO) -> int:
        file.write(b"half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        copies.open(copies.folder / "store", "a", 8, broken)
    assert held(copies.folder) == []
    Source().open(copies, "a", 8)


def test_a_full_disk_says_so(tmp_path, small_disk) -> None:
    disk = small_disk(64)
    copies = Mirror(disk.path, 2**20)
    with pytest.raises(StoreError, match="No space left"):
        Source().open(copies, "a", 2**17)
    assert held(copies.folder) == []


def test_a_folder_that_cannot_be_made(s3, address, tmp_path) -> None:
    (tmp_path / "file").write_text("thesis")
    with pytest.raises(StoreError, match="--cache-dir") as caught:
        open_cache(address, cache_dir=tmp_path / "file")
    assert str(tmp_path / "file") in caught.value.problem


def test_threads_share_a_bound_that_is_too_small(s3, small, address, tmp_path) -> None:
    """Every shard makes room for another all the time, and every row is right."""
    cache = open_cache(address, cache_dir=tmp_path, cache_bytes=9_000)
    orders = [np.random.default_rng(seed).permutation(len(cache)) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(read_everything, cache, small, order) for order in orders]:
            done.result()
    assert bytes_of(tmp_path) <= 9_000


def test_what_made_room_takes_none(s3, small, address, tmp_path) -> None:
    """A file that was removed would go on taking its place on the disk while the store has it open."""
    cache = open_cache(address, cache_dir=tmp_path, cache_bytes=9_000)
    read_everything(cache, small)
    links = [link for link in map(_target, Path("/proc/self/fd").iterdir()) if link.startswith(str(tmp_path))]
    assert links
    assert not [link for link in links if link.endswith("(deleted)")]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # that of the listing itself
        return ""


def test_a_shard_that_made_room_is_fetched_again(s3, small, address, tmp_path) -> None:
    cache = open_cache(address, cache_dir=tmp_path)
    for record in (5, 0, 5, 0):
        np.testing.assert_array_equal(cache.read(record, [VALUES])[VALUES], small.arrays[VALUES][record])
        assert cache.place.forget(f"{VALUES}/c/{record // 4}/0/0/0")
    np.testing.assert_array_equal(cache.column("window"), small.arrays["records/window"])


READ = """
import sys
import numpy as np
from kdcache.store import open_cache
address, folder, most, plan, seed = sys.argv[1:]
arrays = np.load(plan)
cache = open_cache(address, cache_dir=folder, cache_bytes=int(most) or None)
for epoch in range(2):
    for record in np.random.default_rng([int(seed), epoch]).permutation(len(cache)):
        for path, row in cache.read(int(record), list(cache.specs)).items():
            assert np.array_equal(row, arrays[path][record]), (path, record)
"""


def readers(small, address: str, folder: Path, most: int, count: int) -> list[subprocess.Popen[str]]:
    np.savez(folder / "plan.npz", **small.arrays)
    script = [sys.executable, "-c", READ, address, str(folder), str(most), str(folder / "plan.npz")]
    return [subprocess.Popen([*script, str(n)], stderr=subprocess.PIPE, text=True) for n in range(count)]


def test_processes_share_a_bound_that_is_too_small(s3, small, address, tmp_path) -> None:
    most = 9_000
    assert most < sum(map(len, s3.objects(address).values())) / 2
    reading = readers(small, address, tmp_path, most, 3)
    seen = []
    room = tmp_path / "mirrors" / ".locks" / "room"
    while any(process.poll() is None for process in reading):
        if room.parent.exists():
            with Lock(room):  # room is made and taken under it: a look that others change meanwhile counts both
                seen.append(bytes_of(tmp_path / "mirrors"))
        time.sleep(0.01)
    assert [process.communicate()[1] for process in reading] == [""] * 3
    assert max(seen) <= most
    assert max(seen) > most / 3
    assert not [name for name in held(tmp_path / "mirrors") if name.endswith(".partial")]


def test_processes_fetch_each_file_once(s3, small, address, tmp_path) -> None:
    s3.fail("slow", times=10, seconds=0.05)
    reading = readers(small, address, tmp_path, 0, 3)
    assert [process.communicate()[1] for process in reading] == [""] * 3
    keys = [request.key.partition("store.zarr/")[2] for request in s3.requests]
    asked = {key: keys.count(key) for key in keys}
    assert (asked.pop("zarr.json"), asked.pop("complete.json")) == (4, 3)  # by each, to know what is there
    assert set(asked.values()) == {1}


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(s3, small, address, tmp_path) -> None:
    """Its file is fetched anew, and what it left half fetched goes: at once with the same file, else for room."""
    open_cache(address, cache_dir=tmp_path)
    fault = s3.fail("drip", SHARD_FILE, times=2, seconds=60)
    code = """
    import sys
    from kdcache.store import open_cache
    open_cache(sys.argv[1], cache_dir=sys.argv[2]).read(5, ["targets/segmentation/values"])
    """
    script = [sys.executable, "-c", textwrap.dedent(code), address, str(tmp_path)]
    with subprocess.Popen(script) as doomed:
        while fault.times == 2 or not list(tmp_path.rglob("*.partial")):
            time.sleep(0.01)
            assert doomed.poll() is None
        doomed.send_signal(signal.SIGKILL)
    fault.times = 0
    left = list(tmp_path.rglob("*.partial"))
    assert len(left) == 1
    copies, source = Mirror(tmp_path, bytes_of(tmp_path / "mirrors") + 10), Source()
    read_everything(open_cache(address, cache_dir=tmp_path), small)
    assert not left[0].exists()
    left[0].write_bytes(b"half")
    source.open(copies, "another", 700)
    assert not left[0].exists()


def test_a_file_that_is_being_fetched_makes_no_room(tmp_path) -> None:
    """Who needs its room waits until it is whole."""
    copies, source, began, go = Mirror(tmp_path, 100), Source(), threading.Event(), threading.Event()

    def slow(file: BinaryIO) -> int:
        began.set()
        assert go.wait(10)
        return file.write(b"s" * 60)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(copies.open, copies.folder / "store", "slow", 60, slow)
        assert began.wait(10)
        other = pool.submit(source.open, copies, "b", 60)
        time.sleep(3 * mirror.WAIT_SECONDS)
        assert not other.done()
        assert bytes_of(copies.folder) == 60
        go.set()
        other.result(timeout=10)
    assert os.pread(one.result(), 100, 0) == b"s" * 60
    os.close(one.result())
    assert held(copies.folder) == ["b"]


def test_a_store_built_anew_gets_no_old_copies(s3, plan, small) -> None:
    address = s3.address()
    other = plan(features=False, pixels="source", records=12, seed=1)
    small.write(address)
    old = open_cache(address)
    read_everything(old, small)
    for key in s3.objects(address):
        s3.put(address, key, None)
    other.write(address)
    read_everything(open_cache(address), other)
    read_everything(old, small)  # what it has it may go on with
    old.place.forget(SHARD_FILE)
    old.open_arrays.clear()
    with pytest.raises(CorruptError):
        old.read(5, [VALUES])


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "extended"])
@pytest.mark.parametrize("key", [SHARD_FILE, "records/window/c/1/0", f"{VALUES}/zarr.json", "ledger.jsonl"])
def test_a_damaged_copy_is_fetched_again(s3, small, address, warm, tmp_path, key, how) -> None:
    shutil.copytree(warm / "mirrors", tmp_path / "mirrors")
    (copy,) = tmp_path.glob(f"mirrors/*/{key}")
    content = copy.read_bytes()
    middle = len(content) // 2
    damaged = {
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "truncated": content[:-3],
        "empty": b"",
        "extended": content + b"\0",
    }[how]
    copy.write_bytes(damaged)
    s3.reset()
    read_everything(open_cache(address, cache_dir=tmp_path), small)
    assert s3.counted("GET", key) == 1 + (key == "zarr.json")
    assert copy.read_bytes() == content


def test_a_copy_that_is_damaged_under_an_open_cache(s3, small, address, tmp_path) -> None:
    cache = open_cache(address, cache_dir=tmp_path)
    cache.read(4, [VALUES])
    (copy,) = tmp_path.glob(f"mirrors/*/{SHARD_FILE}")
    with copy.open("r+b") as file:
        file.truncate(100)
    np.testing.assert_array_equal(cache.read(5, [VALUES])[VALUES], small.arrays[VALUES][5])


def test_fetching_ahead(s3, small, address) -> None:
    cache = open_cache(address)
    s3.reset()
    cache.fetch(1, VALUES)
    cache.fetch(1, VALUES)
    assert s3.counted("GET", SHARD_FILE) == 1
    s3.reset()
    cache.read(4, [VALUES])
    assert s3.requests == []
    s3.fail("404", "c/2/0/0/0", times=10_000)
    with pytest.raises(CorruptError, match="cannot be opened"):
        cache.fetch(2, VALUES)


INDEX_BYTES = 16 + 4  # of a shard of one chunk


def test_a_copy_that_is_spoiled_between_two_reads(s3, small, address, tmp_path) -> None:
    """It is fetched again: what is read is what was written, at every read."""
    cache = open_cache(address, cache_dir=tmp_path)
    read_everything(cache, small)
    shards = [path for path in tmp_path.rglob("c/**/*") if path.is_file() and "samples" not in str(path)]
    assert len(shards) == 3 * len(cache.specs)
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[(len(content) - INDEX_BYTES) // 2] ^= 4
        with shard.open("r+b") as opened:  # in place: the store has it open
            opened.write(content)
    read_everything(cache, small)
