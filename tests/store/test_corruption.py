"""Any file of a store, damaged in any way: refused by name, or harmless; never a wrong record, and repaired or left."""

from __future__ import annotations

import contextlib
import random
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import CorruptError, KDCacheError
from kdcache.store import open_cache, open_writer, verify_files
from kdcache.store.format.schema import SMALL_BYTES

ARRAYS_BYTES = "targets/segmentation/values"


def flipped(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flipped": flipped,
    "truncated": lambda content, rng: content[: rng.randrange(len(content))],
    "zeroed": lambda content, rng: bytes(len(content)),
    "removed": lambda content, rng: None,
}


class Patient:
    """A store that is damaged again and again, and what it must say."""

    def __init__(self, store: Path, plan: Any, tree: Callable[[Path], dict[str, bytes]]) -> None:
        self.store, self.plan, self.tree = store, plan, tree
        self.files = tree(store)
        self.refused = self.harmless = 0

    def put(self, name: str, content: bytes | None) -> None:
        path = self.store / name
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def examine(self, damaged: dict[str, bytes | None], *, repairs: bool = True) -> None:
        """Damage some files, look at every record, verify, build on; the store is whole again afterwards."""
        damaged = {name: content for name, content in damaged.items() if content != self.files[name]}
        for name, content in damaged.items():
            self.put(name, content)
        try:
            self._read(damaged)
            self._verify(damaged)
            if repairs:
                self._build(damaged)
        finally:
            for name, content in self.files.items():
                if not (self.store / name).exists() or name in damaged:
                    self.put(name, content)
        assert self.tree(self.store) == self.files, list(damaged)

    def _read(self, damaged: dict[str, bytes | None]) -> None:
        try:
            cache = open_cache(self.store)
            cache.check_files()
            assert cache.ids == tuple(self.plan.ids), list(damaged)
            assert cache.manifest == self.plan.manifest, list(damaged)
        except KDCacheError as error:
            self._named(damaged, error)
            return
        refused = False
        for path, wanted in self.plan.arrays.items():
            refused |= self._read_array(cache, path, wanted, damaged)
        self.refused += refused
        self.harmless += not refused

    def _read_array(self, cache: Any, path: str, wanted: Any, damaged: dict[str, bytes | None]) -> bool:
        """Whether a record of an array was refused. Every one that is not must be right."""
        reads = [(partial(cache.read, record, [path]), wanted[record]) for record in range(len(wanted))]
        if path.startswith("records/"):
            reads.append((lambda: {path: cache.column(path.rpartition("/")[2])}, wanted))
        errors = []
        for read, expected in reads:
            try:
                found = read()[path]
            except KDCacheError as error:
                errors.append(str(error))
            else:
                assert np.array_equal(found, expected), (path, list(damaged))
        assert all(path in error for error in errors), (errors, list(damaged))
        assert not errors or any(name.startswith(path) for name in damaged), (errors, list(damaged))
        return bool(errors)

    def _verify(self, damaged: dict[str, bytes | None]) -> None:
        try:
            found = verify_files(self.store).damaged
        except KDCacheError as error:
            self._named(damaged, error)
        else:
            assert sorted(found) == sorted(damaged)

    def _build(self, damaged: dict[str, bytes | None]) -> None:
        try:
            with open_writer(self.store, self.plan.manifest, self.plan.ids) as writer:
                for shard in writer.missing:
                    writer.write_shard(shard, self.plan.rows(shard))
                assert writer.seal()
        except KDCacheError as error:
            self._named(damaged, error)
        else:
            assert self.tree(self.store) == self.files, list(damaged)

    def _named(self, damaged: dict[str, bytes | None], error: KDCacheError) -> None:
        self.refused += 1
        assert error.fix
        # A seal that is missing is no file to name; a wrong one makes others look wrong.
        # To a build, a folder without zarr.json is no store but somebody else's.
        whole = "complete.json" in damaged or (damaged.get("zarr.json", b"") is None and "no zarr.json" in str(error))
        named = [self.store] if whole else [self.store / name for name in damaged]
        assert any(str(path) in str(error) for path in named), (str(error), list(damaged))


@pytest.fixture(scope="module")
def patient(plan, tree, tmp_path_factory) -> Patient:
    """Top-k, with features and pixels: every kind of file. Whole between the tests."""
    wanted = plan()
    return Patient(wanted.write(tmp_path_factory.mktemp("patient") / "s.zarr"), wanted, tree)


def damage_all(patient: Patient, rng: random.Random, hows: Callable[[], list[str]], **options: bool) -> None:
    for name, content in patient.files.items():
        for how in hows():
            patient.examine({name: DAMAGES[how](content, rng)}, **options)


def test_one_damage_of_every_file(patient) -> None:
    rng = random.Random(0)
    damage_all(patient, rng, lambda: rng.sample(list(DAMAGES), 1))
    assert patient.refused > len(patient.files)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "hows"), [(0, list(DAMAGES)), (1, ["flipped", "truncated"])])
def test_every_damage_of_every_file(patient, seed, hows) -> None:
    """A second time where chance has a say."""
    damage_all(patient, random.Random(seed), lambda: hows)


def test_200_flipped_bytes(patient) -> None:
    """Spread over all bytes of a store, as a failing disk does it."""
    rng = random.Random(1)
    names = rng.choices(list(patient.files), [len(content) for content in patient.files.values()], k=200)
    for name in names:
        patient.examine({name: flipped(patient.files[name], rng)}, repairs=False)


@pytest.mark.parametrize("codec", ["default", "none"])
def test_files_in_each_other_s_place(plan, tree, tmp_path, codec) -> None:
    """Two shards of an array, each whole in itself and often of one size."""
    wanted = plan(codec=codec)
    patient = Patient(wanted.write(tmp_path / "s.zarr"), wanted, tree)
    for path in wanted.arrays:
        one, other = (name for name in patient.files if name.startswith(f"{path}/c/") and "/c/2" not in name)
        patient.examine({one: patient.files[other], other: patient.files[one]})


@pytest.mark.parametrize("codec", ["default", "none"])
def test_a_file_of_another_store(plan, tree, tmp_path, codec) -> None:
    wanted, other = plan(codec=codec), plan(codec=codec, seed=1)
    patient = Patient(wanted.write(tmp_path / "s.zarr"), wanted, tree)
    others = tree(other.write(tmp_path / "other.zarr"))
    for name, content in others.items():
        patient.examine({name: content})


def large(cache: Any, path: str) -> bool:
    """Whether a record of an array is a chunk of its own."""
    return cache.specs[path].record_bytes > SMALL_BYTES


def flipped_in_each_chunk(shard: bytes, chunks: int, rng: random.Random) -> bytes:
    """A bit in the middle of each, where no decoder's header is."""
    content = bytearray(shard)
    for offset, size in struct.iter_unpack("<QQ", shard[-16 * chunks - 4 : -4]):
        content[offset + size // 2] ^= 1 << rng.randrange(8)
    return bytes(content)


@pytest.mark.parametrize("codec", ["default", "small", "none"])
def test_a_bit_that_flips_under_an_open_store(plan, tmp_path, codec) -> None:
    """In every chunk of every array, after it was read: no later read serves it."""
    wanted = plan(codec=codec, shard_records=2)
    store = wanted.write(tmp_path / "s.zarr")
    cache, rng, refused = open_cache(store), random.Random(codec), 0
    rows = [cache.read(record, list(cache.specs)) for record in range(len(cache))]
    assert np.array_equal(rows[3]["pixels/image"], wanted.arrays["pixels/image"][3])
    for file in (file for file in store.glob("*/*/**/c/**/*") if file.is_file() and "samples" not in str(file)):
        path, number = file.relative_to(store).as_posix().split("/c/")
        content, shard = file.read_bytes(), int(number.split("/")[0])
        with file.open("r+b") as opened:  # in place: the store has it open
            opened.write(flipped_in_each_chunk(content, 2 if large(cache, path) else 1, rng))
        for record in range(*cache.manifest.shard_range(shard)):
            if large(cache, path):
                with pytest.raises(CorruptError, match=re.escape(str(file))):
                    cache.read(record, [path])
                refused += 1
            else:  # rows that are in memory stay what they were; others are refused
                with contextlib.suppress(CorruptError):
                    assert np.array_equal(cache.read(record, [path])[path], rows[record][path])
        with file.open("r+b") as opened:
            opened.write(content)
    assert refused >= 2 * len(cache)
    for record, row in enumerate(rows):
        again = cache.read(record, list(cache.specs))
        assert all(np.array_equal(again[path], row[path]) for path in row)


def test_a_bit_that_flips_in_a_column_of_an_open_store(plan, tmp_path) -> None:
    store = plan().write(tmp_path / "s.zarr")
    cache = open_cache(store)
    wanted = cache.column("window")
    file = store / "records/window/c/1/0"
    content = file.read_bytes()
    for at in range(len(content) - 64):
        with file.open("r+b") as opened:
            opened.write(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        with pytest.raises(CorruptError, match="records/window"):
            cache.column("window")
    file.write_bytes(content)
    assert np.array_equal(open_cache(store).column("window"), wanted)
