"""Any damage of any file of a store: `verify` says it, its remedy works, and one more build mends it to the byte."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pytest

from kdcache.errors import KDCacheError, MismatchError, StoreError
from kdcache.store import open_cache, open_writer, read_manifest, verify_files
from kdcache.store.backend.local import Folder
from kdcache.store.freshness import BuiltFrom

SEAL, WHOLE, RECORD, SPARE = "complete.json", "ledger.jsonl", "ledger/00000001.json", "manifest.json"
VALUES = "targets/segmentation/values/c/1/0/0/0"


def flip(content: bytes, at: int, mask: int = 1) -> bytes:
    return content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


def other_digit(content: bytes, nth: int) -> bytes | None:
    """Another hexadecimal digit in place of the nth from the start (or the end) of text; None for what is no text."""
    at = [place for place, byte in enumerate(content) if byte in b"0123456789"]
    if not content.lstrip().startswith(b"{") or not at:
        return None
    place = at[nth % len(at)]
    return content[:place] + (b"8" if content[place : place + 1] == b"7" else b"7") + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "a flipped bit at the start": lambda content: flip(content, 0),
    "a flipped bit in the middle": lambda content: flip(content, len(content) // 2),
    "a flipped bit at the end": lambda content: flip(content, len(content) - 1, 0x80),
    "a line feed at the end": lambda content: content + b"\n",
    "a space at the start": lambda content: b" " + content,
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another digit first": lambda content: other_digit(content, 0),
    "another digit in the middle": lambda content: other_digit(content, len(content) // 3),
    "another digit last": lambda content: other_digit(content, -1),
    "another field": lambda content: content.replace(b'"sha256"', b'"sha257"').replace(b'"zarr_format"', b'"zarr"'),
    "zeros": lambda content: bytes(len(content)),
}


class Files(Protocol):
    """The files of a store, past the code that is tested."""

    location: Any

    def read(self) -> dict[str, bytes]: ...
    def put(self, key: str, content: bytes | None) -> None: ...


class OnDisk:
    def __init__(self, location: Path) -> None:
        self.location = location

    def read(self) -> dict[str, bytes]:
        found = [path for path in self.location.rglob("*") if path.is_file()]
        return {path.relative_to(self.location).as_posix(): path.read_bytes() for path in found}

    def put(self, key: str, content: bytes | None) -> None:
        (self.location / key).unlink(missing_ok=True)
        if content is not None:
            (self.location / key).parent.mkdir(parents=True, exist_ok=True)
            (self.location / key).write_bytes(content)


class InMemory:
    """An object store that obstore keeps in memory."""

    def __init__(self, location: str, store: Any) -> None:
        self.location, self._store = location, store

    def read(self) -> dict[str, bytes]:
        import obstore

        keys = [about["path"] for page in obstore.list(self._store) for about in page]
        return {key: bytes(obstore.get(self._store, key).bytes()) for key in keys}

    def put(self, key: str, content: bytes | None) -> None:
        import obstore

        if content is None:
            obstore.delete(self._store, key)
        else:
            obstore.put(self._store, key, content)


@pytest.fixture(scope="module")
def wanted(plan) -> Any:
    """In two shards, of which one is short: every kind of file, few of each."""
    return plan(k=3, features=False, pixels="source", records=3, shard_records=2)


@pytest.fixture(scope="module", params=["folder", "bucket"])
def files(request, wanted, tmp_path_factory) -> Iterator[Files]:
    """A finished store, whole between the tests."""
    folder = tmp_path_factory.mktemp("store")
    if request.param == "folder":
        yield OnDisk(wanted.write(folder / "s.zarr"))
        return
    from obstore.store import MemoryStore

    from kdcache.store.backend import object_store

    with pytest.MonkeyPatch.context() as patch:
        store = MemoryStore()
        patch.setenv("KDCACHE_CACHE_DIR", str(folder))
        patch.setattr(object_store, "from_url", lambda *_, **__: store)
        patch.setattr(object_store, "PAUSE_SECONDS", 0.0)
        wanted.write("s3://memory/s.zarr")
        yield InMemory("s3://memory/s.zarr", store)


@pytest.fixture(scope="module")
def whole(files: Files) -> dict[str, bytes]:
    return files.read()


def build(location: Any, wanted: Any) -> None:
    """The command that wrote it, a year later."""
    later = wanted.manifest.model_copy(update={"created": "2027-01-01T00:00:00+00:00", "fidelity": None})
    type(wanted)(later, wanted.ids, wanted.arrays).write(location)


def verified(location: Any) -> tuple[list[str], str]:
    """What `verify` says is damaged, and its fix; a store that it stops at is named whole."""
    try:
        report = verify_files(location)
    except KDCacheError as error:
        return [error.problem], error.fix
    return report.damaged, report.fix


def follow(fix: str, damaged: list[str], files: Files, wanted: Any) -> None:
    """Do what a fix says, to the letter."""
    assert "Run the command that" in fix
    if "Delete" in fix:
        for key in damaged:
            files.put(key, None)
    build(files.location, wanted)


def says(location: Any) -> bool:
    """Whether a reader finds anything wrong."""
    try:
        cache = open_cache(location)
        cache.check_files()
        for record in range(len(cache)):
            cache.read(record, list(cache.specs))
    except KDCacheError:
        return True
    return False


def walk(files: Files, whole: dict[str, bytes], wanted: Any, hows: Callable[[int, str], list[str]]) -> None:
    """Each file in turn is damaged, looked at, mended as `verify` says, and then what it was."""
    for number, (key, content) in enumerate(sorted(whole.items())):
        for how in hows(number, key):
            damaged = None if how == "deleted" else DAMAGES[how](content)
            if damaged != content and (damaged is not None or how == "deleted"):
                files.put(key, damaged)
                mend(files, key, damaged is not None and json_equal(damaged, content), wanted)
                after = files.read()
                assert [name for name in {*after, *whole} if after.get(name) != whole.get(name)] == [], (key, how)


def mend(files: Files, key: str, cosmetic: bool, wanted: Any) -> None:
    """Have `verify` look at a store of which one file is damaged, and follow its remedy."""
    refused = says(files.location)
    found, fix = verified(files.location)
    assert not refused or found, f"{key}: the reader sees more than verify"
    if found:
        # A seal that was changed makes others look wrong: they are named together.
        assert any(name in text for text in found for name in (key, SEAL)) or key == SEAL, (key, found)
        follow(fix, found, files, wanted)
    else:
        assert cosmetic, f"{key}: verify sees nothing"
        build(files.location, wanted)


def test_every_file(files, whole, wanted) -> None:
    """Each of them two damages of those that there are, in turn."""
    kinds = [*DAMAGES, "deleted"]
    walk(files, whole, wanted, lambda number, _: [kinds[(2 * number + more) % len(kinds)] for more in range(2)])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "how"), list(enumerate([*DAMAGES, "deleted"])))
def test_every_damage_of_every_file(files, whole, wanted, number, how) -> None:
    """In the bucket every third file: the remedy is the folder's, and a bucket takes four times as long."""
    every = 3 if isinstance(files, InMemory) else 1
    walk(files, whole, wanted, lambda file, _: [how] if (file + number) % every == 0 else [])


@pytest.mark.parametrize("key", [SEAL, WHOLE, RECORD, SPARE, "zarr.json", VALUES])
def test_every_damage_of_what_speaks_of_others(files, whole, wanted, key) -> None:
    walk(files, whole, wanted, lambda _, name: [*DAMAGES, "deleted"] if name == key else [])


def json_equal(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("how", ["another digit last", "deleted"])
def test_every_file_of_a_half_built_store(wanted, tmp_path, how) -> None:
    """Without a seal: the spare alone tells which manifest is right."""
    clean = OnDisk(wanted.write(tmp_path / "clean")).read()
    files = OnDisk(wanted.write(tmp_path / "s.zarr", [0], seal=False))
    begun = files.read()
    for key, content in begun.items():
        damaged = None if how == "deleted" else DAMAGES[how](content)
        if damaged == content or (damaged is None and how != "deleted"):
            continue
        files.put(key, damaged)
        build(files.location, wanted)
        assert files.read() == clean, (key, how)
        for name in {*clean, *begun}:
            files.put(name, begun.get(name))


@pytest.mark.parametrize("keys", [("zarr.json", SEAL), (WHOLE, SEAL), (RECORD, WHOLE), (SPARE, SEAL), (VALUES, RECORD)])
def test_two_files_at_once(wanted, tmp_path, keys) -> None:
    files = OnDisk(wanted.write(tmp_path / "s.zarr"))
    clean = files.read()
    for how in ("a flipped bit in the middle", "another digit last", "empty"):
        for key in keys:
            files.put(key, DAMAGES[how](clean[key]) or b"")
        build(files.location, wanted)
        assert files.read() == clean, how


def test_a_wrong_checksum_that_was_sealed(wanted, tmp_path, forger) -> None:
    """Ledger and seal agree, and the reader refuses the chunk: so does `verify`, and no record is written again."""
    files = OnDisk(wanted.write(tmp_path / "s.zarr"))
    clean = files.read()
    records = [json.loads(line) for line in clean[WHOLE].splitlines()]
    entry = records[1]["files"][VALUES]
    entry["crc32c"] = ("1" if entry["crc32c"][0] == "0" else "0") + entry["crc32c"][1:]
    forger.write_ledger(files.location, records)
    with pytest.raises(KDCacheError, match="another chunk"):
        open_cache(files.location).read(2, [VALUES.partition("/c/")[0]])
    assert verify_files(files.location).damaged == [WHOLE, RECORD]
    with open_writer(files.location, wanted.manifest, wanted.ids) as writer:
        assert writer.missing == []
        assert writer.seal()
    assert not says(files.location)
    assert verify_files(files.location).damaged == []
    assert files.read()[WHOLE] == clean[WHOLE]


@pytest.mark.parametrize("key", [SEAL, WHOLE, RECORD, SPARE, "zarr.json", "samples/id_ends/c/0", VALUES])
def test_a_folder_in_the_place_of_a_file(wanted, tmp_path, key) -> None:
    files = OnDisk(wanted.write(tmp_path / "s.zarr"))
    clean = files.read()
    files.put(key, None)
    (files.location / key).mkdir()
    assert verified(files.location)[0]
    build(files.location, wanted)
    assert files.read() == clean
    files.put(key, None)
    (files.location / key).mkdir()
    (files.location / key / "mine.txt").write_text("thesis")
    with pytest.raises(StoreError, match="is a folder") as caught:
        build(files.location, wanted)
    assert "Move it elsewhere" in caught.value.fix
    (files.location / key).rename(tmp_path / "moved")
    build(files.location, wanted)
    assert files.read() == clean


@pytest.mark.parametrize("how", ["a file", "a link"])
def test_something_in_the_place_of_a_folder(wanted, tmp_path, how) -> None:
    """What a link points to is not written to."""
    files = OnDisk(wanted.write(tmp_path / "s.zarr"))
    clean = files.read()
    (files.location / "records/view").rename(tmp_path / "elsewhere")
    if how == "a link":
        (files.location / "records/view").symlink_to(tmp_path / "elsewhere")
        before = OnDisk(tmp_path / "elsewhere").read()
    else:
        (files.location / "records/view").write_text("thesis")
    assert verified(files.location)[0]
    with pytest.raises(StoreError, match="is not a folder") as caught:
        build(files.location, wanted)
    assert "Move it elsewhere" in caught.value.fix
    if how == "a link":
        assert OnDisk(tmp_path / "elsewhere").read() == before
    (files.location / "records/view").unlink()
    build(files.location, wanted)
    assert files.read() == clean


def test_a_finished_store_is_not_written(files, wanted, monkeypatch) -> None:
    """Not even what is there already: it may be on a disk that cannot be written."""
    from kdcache.store.backend import object_store

    written: list[str] = []
    for kind in (Folder, object_store.Bucket):
        for name in ("publish", "publish_exclusive", "remove"):
            monkeypatch.setattr(kind, name, lambda self, key, *_: written.append(key))
    for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync", "link", "symlink"):
        monkeypatch.setattr(os, name, lambda *args, name=name, **_: written.append(f"{name} {args}"))
    opened = os.open

    def reading(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(str(path))
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", reading)
    monkeypatch.setattr(Path, "mkdir", lambda self, *_, **__: None if self.is_dir() else written.append(str(self)))
    build(files.location, wanted)
    assert written == []


def test_a_seal_that_fits_in_other_words(wanted, tmp_path) -> None:
    """A store that was sealed before there were spares stays what it is."""
    files = OnDisk(wanted.write(tmp_path / "s.zarr"))
    seal = json.loads(files.read()[SEAL])
    del seal["metadata"][SPARE]
    files.put(SEAL, (json.dumps(seal, indent=1, sort_keys=True) + "\n").encode())
    files.put(SPARE, None)
    before = files.read()
    assert verify_files(files.location).damaged == []
    build(files.location, wanted)
    assert files.read() == before
    files.put(VALUES, b"")
    build(files.location, wanted)
    assert files.read() == before


def test_a_spare_of_another_store(wanted, plan, tmp_path) -> None:
    """With and without a seal, the store remains its own."""
    other = plan(features=False, records=4, shard_records=2)
    spare = OnDisk(other.write(tmp_path / "other")).read()[SPARE]
    for shards in (None, [0]):
        files = OnDisk(wanted.write(tmp_path / f"s{shards}", shards))
        before = files.read()
        files.put(SPARE, spare)
        open_writer(files.location, wanted.manifest, wanted.ids).close()
        assert files.read() == before
        with pytest.raises(MismatchError):
            open_writer(files.location, other.manifest, other.ids)


def test_a_manifest_without_spare_is_not_guessed(wanted, tmp_path) -> None:
    """Another teacher's targets may be in the shards."""
    files = OnDisk(wanted.write(tmp_path / "s.zarr"))
    files.put(SPARE, None)
    files.put("zarr.json", None)
    before = files.read()
    with pytest.raises(StoreError, match=r"zarr\.json"):
        build(files.location, wanted)
    assert files.read() == before


class TestWithoutSpare:
    """A store of an earlier version: nothing says what its zarr.json was."""

    KINDS: ClassVar = [
        *(how for how in DAMAGES if how != "another field"),
        *("deleted", "a folder", "another teacher", "another format", "another version", "not ours"),
    ]

    @pytest.fixture(params=["folder", "bucket"])
    def old(self, request, wanted, tmp_path, monkeypatch) -> Files:
        if request.param == "folder":
            files: Files = OnDisk(wanted.write(tmp_path / "s.zarr"))
        else:
            from obstore.store import MemoryStore

            from kdcache.store.backend import object_store

            store = MemoryStore()
            monkeypatch.setenv("KDCACHE_CACHE_DIR", str(tmp_path))
            monkeypatch.setattr(object_store, "from_url", lambda *_, **__: store)
            monkeypatch.setattr(object_store, "PAUSE_SECONDS", 0.0)
            wanted.write("s3://memory/s.zarr")
            files = InMemory("s3://memory/s.zarr", store)
        seal = json.loads(files.read()[SEAL])
        del seal["metadata"][SPARE]
        files.put(SEAL, (json.dumps(seal, indent=1, sort_keys=True) + "\n").encode())
        files.put(SPARE, None)
        return files

    def damage(self, how: str, files: Files, content: bytes) -> None:
        edits = {
            "another teacher": (b'"probe": [', b'"probe": [7.0,'),
            "another format": (b'"format": "kdcache"', b'"format": "kdcachf"'),
            "another version": (b'"version": 3', b'"version": 4'),
            "not ours": (b'"kdcache": {', b'"kdcachf": {'),
        }
        if how in edits:
            assert content.count(edits[how][0]) >= 1, how
            files.put("zarr.json", content.replace(*edits[how], 1))
        elif how == "deleted":
            files.put("zarr.json", None)
        elif how == "a folder":
            files.put("zarr.json", None)
            files.put("zarr.json/mine.txt", b"thesis")
        else:
            files.put("zarr.json", DAMAGES[how](content))

    @pytest.mark.parametrize("how", KINDS)
    def test_the_fix_works(self, old, wanted, how) -> None:
        """To the letter: the command again where that is said, then the copy, or the folder deleted."""
        whole = old.read()
        for restored in (True, False):
            self.damage(how, old, whole["zarr.json"])
            found, fix = verified(old.location)
            assert len(found) == 1
            if isinstance(old, OnDisk):  # else what was read lies here
                with pytest.raises(KDCacheError) as opened:
                    open_cache(old.location)
                assert (found, fix) == ([opened.value.problem], opened.value.fix)
            before = old.read()
            refused = self.refusal(old, wanted)
            if refused is None:
                assert fix.startswith("Run the command that wrote it"), how
            else:
                assert old.read() == before
                assert f"delete all of {old.location}" in refused.fix, how
                assert "no spare" in refused.problem
                self.delete(old)
                for key, content in whole.items() if restored else ():
                    old.put(key, content)
                build(old.location, wanted)
            assert not says(old.location)
            assert verify_files(old.location).damaged == []
            self.delete(old)
            for key, content in whole.items():
                old.put(key, content)

    def delete(self, files: Files) -> None:
        if isinstance(files, OnDisk):
            shutil.rmtree(files.location)
        for key in files.read():
            files.put(key, None)

    def refusal(self, files: Files, wanted: Any) -> KDCacheError | None:
        try:
            build(files.location, wanted)
        except KDCacheError as error:
            return error
        return None


class TestWithOtherVersions:
    """The store was finished with other libraries than those of today."""

    NOW: ClassVar = {"python": "4", "pillow": "99.1"}

    @pytest.fixture
    def files(self, wanted, tmp_path) -> OnDisk:
        return OnDisk(wanted.write(tmp_path / "s.zarr"))

    @pytest.fixture
    def now(self, wanted) -> Any:
        return wanted.changed(build={"libraries": self.NOW, "device": "NVIDIA X"})

    @staticmethod
    def pixels(plan: Any, more: int = 0, path: str = "records/pixel_checksum") -> BuiltFrom:
        """What the data set renders to now: the stored checksums, or others in one array."""
        paths = ("records/pixel_checksum", "records/label_checksum")
        return BuiltFrom(None, lambda shard: {p: plan.rows(shard)[p] + np.uint64(more * (p == path)) for p in paths})

    def repair(self, files: OnDisk, now: Any, *, seal: bool = True) -> list[int]:
        with open_writer(files.location, now.manifest, now.ids, None, self.pixels(now)) as writer:
            missing = writer.missing
            for shard in missing if seal else []:
                writer.write_shard(shard, now.rows(shard))
            assert not seal or writer.seal()
        return missing

    @pytest.mark.parametrize("key", [VALUES, "records/pixel_checksum/c/1", "records/view/c/1"])
    @pytest.mark.parametrize("interrupted", [False, True])
    def test_a_damaged_shard_is_repaired_and_noted(self, files, now, wanted, key, interrupted) -> None:
        clean = files.read()
        files.put(key, b"")
        if interrupted:
            assert self.repair(files, now, seal=False) == [1]
            assert not (files.location / SEAL).exists()
        assert self.repair(files, now) == [1]
        assert not says(files.location)
        assert verify_files(files.location).damaged == []
        changed = {name for name, content in files.read().items() if clean.get(name) != content}
        assert changed == {"zarr.json", SPARE, SEAL}
        manifest = read_manifest(files.location)
        (repair,) = manifest.repairs
        assert (repair.libraries, repair.device, repair.shards) == (self.NOW, "NVIDIA X", (1,))
        assert manifest.model_copy(update={"repairs": ()}) == wanted.manifest
        assert json.loads((files.location / "zarr.json").read_bytes())["attributes"]["kdcache"]["repairs"]
        before = files.read()
        assert self.repair(files, now) == []
        build(files.location, wanted)
        assert files.read() == before

    def test_a_second_repair_is_noted_too(self, files, now, wanted) -> None:
        for key in (VALUES, VALUES.replace("c/1", "c/0")):
            files.put(key, b"")
            self.repair(files, now)
        later = wanted.changed(build={"libraries": {"python": "5"}})
        files.put(VALUES, b"")
        self.repair(files, later)
        assert [(repair.shards, repair.libraries) for repair in read_manifest(files.location).repairs] == [
            ((0, 1), self.NOW),
            ((1,), {"python": "5"}),
        ]

    @pytest.mark.parametrize("key", [RECORD, WHOLE, SEAL, SPARE, "zarr.json", "records/view/zarr.json"])
    def test_what_needs_no_teacher_leaves_no_note(self, files, now, key) -> None:
        clean = files.read()
        files.put(key, None)
        assert self.repair(files, now) == []
        assert files.read() == clean

    @pytest.mark.parametrize("array", ["records/pixel_checksum", "records/label_checksum"])
    @pytest.mark.parametrize("key", [VALUES, "records/pixel_checksum/c/1", "records/label_checksum/c/1"])
    @pytest.mark.parametrize("versions", ["others", "the same"])
    def test_other_data_are_refused_before_anything_is_given_up(self, files, now, wanted, key, versions, array) -> None:
        files.put(key, b"")
        before = files.read()
        plan = now if versions == "others" else wanted
        with pytest.raises(MismatchError, match="do not render as they did at the build"):
            open_writer(files.location, plan.manifest, plan.ids, None, self.pixels(plan, 1, array))
        assert files.read() == before

    def test_another_teacher_is_refused(self, files, now) -> None:
        files.put(VALUES, b"")
        before = files.read()
        other = now.changed(teacher={"probe": (1.0, -2.0, 3.5)})
        with pytest.raises(MismatchError, match="probe"):
            open_writer(files.location, other.manifest, other.ids, None, self.pixels(other))
        assert files.read() == before

    def test_a_half_built_store_is_not_continued(self, now, wanted, tmp_path) -> None:
        """No checksum says what was taught on; the difference is said whole."""
        libraries = {name: f"{name} 1.{'0' * 30}" for name in ("python", "torch", "pillow", "zarr", "numcodecs")}
        old = wanted.changed(build={"libraries": libraries})
        new = wanted.changed(build={"libraries": {**libraries, "numcodecs": "2", "more": "1"}})
        files = OnDisk(old.write(tmp_path / "half", [0]))
        before = files.read()
        with pytest.raises(MismatchError) as caught:
            open_writer(files.location, new.manifest, new.ids, None, self.pixels(new))
        assert f"numcodecs {libraries['numcodecs']} against 2, more nothing against 1" in caught.value.problem
        assert files.read() == before
        assert "with the same teacher, data, libraries and device" in caught.value.fix
        assert "give another --out" in caught.value.fix
        again, other = OnDisk(old.write(tmp_path / "half")), OnDisk(new.write(tmp_path / "other"))
        for store, libraries_now in ((again, libraries), (other, new.manifest.build.libraries)):
            assert verify_files(store.location).damaged == []
            assert read_manifest(store.location).build.libraries == libraries_now
        assert again.read() == OnDisk(old.write(tmp_path / "undisturbed")).read()

    def test_nobody_to_ask_about_pixels(self, files, now) -> None:
        files.put(VALUES, b"")
        with pytest.raises(MismatchError, match="libraries"):
            open_writer(files.location, now.manifest, now.ids)
