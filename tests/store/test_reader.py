"""Opening and reading: what is not whole, or not ours, is refused with a remedy and never read wrong."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import zstd
from zarr.codecs import Crc32cCodec, GzipCodec

from kdcache.errors import CorruptError, IncompleteError, KDCacheError, StoreError, VersionError
from kdcache.store import Cache, inspect_store, open_cache, open_writer, read_manifest, verify_files

CHUNKED = "pixels/image/c/0/0/0/0"


def flip(path: Path, position: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


def refusal(kind: type[KDCacheError], action) -> KDCacheError:
    with pytest.raises(KDCacheError) as caught:
        action()
    assert type(caught.value) is kind, caught.value
    assert caught.value.problem
    assert caught.value.fix
    return caught.value


def open_whole(path: Path) -> Cache:
    """Open as a training does."""
    cache = open_cache(path)
    cache.check_files()
    return cache


def read_all(path: Path) -> None:
    cache = open_whole(path)
    for record in range(len(cache)):
        cache.read(record, list(cache.specs))


def test_a_half_built_store_says_how_far(plan, tmp_path) -> None:
    path = plan().write(tmp_path / "s.zarr", [0, 2])
    for action in (open_cache, verify_files):
        assert "2 of 3 shards" in refusal(IncompleteError, lambda action=action: action(path)).problem
    plan().write(path, [1], seal=False)  # every shard, no seal
    assert "3 of 3 shards" in refusal(IncompleteError, lambda: open_cache(path)).problem


@pytest.mark.parametrize("name", [CHUNKED, "records/labelled/c/2", "features/stage1/c/1/0/0/0"])
@pytest.mark.parametrize("how", ["missing", "truncated", "extended"])
def test_a_shard_of_another_size_is_refused(store, name, how) -> None:
    """Before a training, and wherever it is read."""
    path = store / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if how == "truncated" else path.read_bytes() + b"\0")
    array, _, place = name.partition("/c/")
    for action in (open_whole, lambda store: open_cache(store).read(4 * int(place[0]), [array])):
        error = refusal(CorruptError, lambda action=action: action(store))
        assert name in error.problem
        assert "(build-teacher-cache or copy) again" in error.fix
    assert verify_files(store).damaged == [name]


def test_a_folder_in_the_place_of_a_shard(store) -> None:
    path = store / CHUNKED
    path.unlink()
    path.mkdir()
    for action in (open_whole, read_all):
        refusal(CorruptError, lambda action=action: action(store))
    assert verify_files(store).damaged == [CHUNKED]
    path.rmdir()
    path.parent.rmdir()
    path.parent.touch()
    for action in (open_whole, read_all):
        refusal(CorruptError, lambda action=action: action(store))


@pytest.mark.parametrize("name", ["zarr.json", "complete.json", "ledger.jsonl", "pixels", "pixels/image"])
def test_links_are_not_followed(store, tmp_path, name) -> None:
    """Neither of a file nor of a folder above it: a store is data from elsewhere, and stays within itself."""
    (store / name).rename(tmp_path / "elsewhere")
    (store / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError) as caught:
        read_all(store)
    assert str(store) in caught.value.problem


def test_the_store_itself_may_be_a_link(store, tmp_path) -> None:
    (tmp_path / "link").symlink_to(store)
    read_all(tmp_path / "link")


@pytest.mark.parametrize(
    "name", [CHUNKED, "targets/segmentation/values/c/0/0/0/0", "records/window/c/0/0", "features/head/c/0/0/0/0"]
)
def test_a_flipped_byte_of_a_shard_is_never_read(store, plan, name) -> None:
    """At any position: an error that names the array, or (in what no reader looks at) the right bits."""
    wanted, array = plan().arrays, name.partition("/c/")[0]
    size = (store / name).stat().st_size
    caught = 0
    for position in {*range(0, size, max(1, size // 60)), size - 1, size - 5}:
        flip(store / name, position)
        cache = open_cache(store)  # sizes are right: the checksums find it
        for record in range(4):
            try:
                row = cache.read(record, [array])[array]
            except CorruptError as error:
                caught += array in error.problem
            else:
                assert np.array_equal(row, wanted[array][record]), position
        assert verify_files(store).damaged == [name], position
        flip(store / name, position)
    assert caught >= 60
    assert verify_files(store).damaged == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["link", "pipe", "nothing"])
@pytest.mark.parametrize("name", [CHUNKED, "records/window/c/0/0"])
def test_a_shard_that_goes_after_opening(store, tmp_path, name, what) -> None:
    cache, array = open_whole(store), name.partition("/c/")[0]
    (store / name).rename(tmp_path / "moved")
    if what == "link":
        (store / name).symlink_to(tmp_path / "moved")
    elif what == "pipe":
        os.mkfifo(store / name)
    for action in (lambda: cache.read(0, [array]), lambda: copy.deepcopy(cache).read(0, [array])):
        assert name in refusal(CorruptError, action).problem


def test_rows_are_read_into_given_buffers(variant, variant_store) -> None:
    cache = open_cache(variant_store)
    for path, spec in cache.specs.items():
        out = np.empty(spec.shape, spec.dtype)
        for record in range(len(cache)):
            cache.read_into(record, path, out)
            assert np.array_equal(out, variant.arrays[path][record])
        for wrong in (np.empty((*spec.shape, 1), spec.dtype), np.empty(spec.shape, "complex64")):
            assert "C-contiguous" in refusal(StoreError, lambda path=path, out=wrong: cache.read_into(0, path, out)).fix
        for record in (-1, len(cache)):
            with pytest.raises(IndexError):
                cache.read_into(record, path, out)


def rewrite(store: Path, path: str, values: np.ndarray, **options) -> None:
    """The same array, made by zarr-python in another way."""
    shape = values.shape
    options |= {"filters": None, "config": {"write_empty_chunks": True}}
    array = zarr.create_array(store / path, shape=shape, dtype=values.dtype, overwrite=True, **options)
    array[...] = values


@pytest.mark.parametrize("array", ["targets/segmentation/values", "records/pixel_checksum"])
@pytest.mark.parametrize("how", ["gzip", "no shards", "chunks across records"])
def test_an_array_of_another_writer_is_refused_at_opening(store, plan, forger, array, how) -> None:
    """By name of what is not supported, though zarr-python reads it; also before there is a seal."""
    values = plan().arrays[array]
    shape = values.shape[1:]
    options = {
        "gzip": {"chunks": (1, *shape), "shards": (4, *shape), "compressors": (GzipCodec(), Crc32cCodec())},
        "no shards": {"chunks": (1, *shape), "compressors": (Crc32cCodec(),)},
        "chunks across records": {"chunks": (3, *(1 for _ in shape)), "compressors": (Crc32cCodec(),)},
    }
    rewrite(store, array, values, **options[how])
    assert np.array_equal(zarr.open_array(store / array, mode="r")[...], values)
    cache = Cache(store, read_manifest(store))
    actions = [lambda: cache.check_arrays(), lambda: cache.read(0, [array])]
    if how == "gzip":  # others have no shards that a ledger could list
        forger.reseal(store)
        actions += [lambda: open_cache(store), lambda: verify_files(store), lambda: inspect_store(store)]
    for action in actions:
        error = refusal(VersionError, action)
        assert f"{array}/zarr.json" in error.problem
        assert ("gzip" if how == "gzip" else "codecs: ") in error.problem
        assert "Update kdcache" in error.fix


def test_a_zstd_frame_that_does_not_say_how_much_it_holds(store, plan) -> None:
    """It might fill the memory. Other chunks of the array are read."""
    values = plan().arrays["features/stage1"]
    file = store / "features/stage1/c/0/0/0/0"
    chunks = [bytes(zstd.compress(row, 1)) for row in values[:4]]
    raw = values[1].tobytes()  # a frame of one raw block, without its size
    chunks[1] = b"\x28\xb5\x2f\xfd\0\x18" + (len(raw) << 3 | 1).to_bytes(3, "little") + raw
    sealed = [chunk + google_crc32c.value(chunk).to_bytes(4, "little") for chunk in chunks]
    starts = np.cumsum([0, *map(len, sealed[:-1])])
    index = np.stack([starts, [len(chunk) for chunk in sealed]], 1).astype("<u8").tobytes()
    file.write_bytes(b"".join(sealed) + index + google_crc32c.value(index).to_bytes(4, "little"))
    cache = Cache(store, read_manifest(store))
    for record in [0, 2, 9]:
        assert np.array_equal(cache.read(record, ["features/stage1"])["features/stage1"], values[record])
    assert str(file) in refusal(VersionError, lambda: cache.read(1, ["features/stage1"])).problem


METADATA = ["zarr.json", "targets/zarr.json", "pixels/image/zarr.json", "samples/id_bytes/c/0", "samples/id_ends/c/0"]


@pytest.mark.parametrize("name", [*METADATA, "ledger.jsonl", "complete.json"])
@pytest.mark.parametrize("mask", [1, 0x80])
def test_a_flipped_byte_of_anything_else_is_refused_at_opening(store, name, mask) -> None:
    path = store / name
    size = path.stat().st_size
    spare = path.read_bytes().find(b'"manifest.json"')  # which no reader looks at
    for position in range(0, size, max(1, size // 25)):
        flip(path, position, mask)
        of_the_spare = name == "complete.json" and spare <= position < spare + len('"manifest.json": "') + 64
        for action in (verify_files,) if of_the_spare else (open_whole, verify_files):
            with pytest.raises(StoreError) as caught:
                action(store)
            assert caught.value.fix
            assert str(store) in caught.value.problem
        flip(path, position, mask)
    read_all(store)


@pytest.mark.parametrize("name", [*METADATA, "ledger.jsonl"])
def test_a_missing_file_is_refused_at_opening(store, name) -> None:
    (store / name).unlink()
    with pytest.raises(StoreError) as caught:
        open_whole(store)
    assert str(store) in caught.value.problem


@pytest.mark.parametrize("version", [0, 4, "1", None, 1.5, [1]])
def test_another_version(store, version) -> None:
    content = json.loads((store / "zarr.json").read_bytes())
    content["attributes"]["kdcache"]["version"] = version
    (store / "zarr.json").write_text(json.dumps(content))
    for action in (open_cache, verify_files, inspect_store, read_manifest):
        error = refusal(VersionError, lambda action=action: action(store))
        assert repr(version) in error.problem
        assert "created_by" in error.fix


def test_what_is_no_store(tmp_path) -> None:
    for place, name in ((tmp_path / "nowhere", "nowhere"), (tmp_path, "zarr.json")):
        error = refusal(StoreError, lambda place=place: open_cache(place))
        assert error.problem == f"Cache not found: {tmp_path}/{name}"
        built = f"kdcache build-teacher-cache --data DATA --teacher TEACHER --out {place}"
        assert error.fix.endswith(built if name == "nowhere" else "the --out of a build.")
    zarr.create_group(tmp_path / "group", attributes={"kdcache": "no"})
    zarr.create_array(tmp_path / "array", shape=(3,), dtype="i4")
    zarr.create_group(tmp_path / "old", zarr_format=2)
    (tmp_path / "file").touch()
    for name, kind in (("group", CorruptError), ("array", CorruptError), ("old", StoreError), ("file", StoreError)):
        for action in (open_cache, inspect_store, verify_files):
            assert name in refusal(kind, lambda name=name, action=action: action(tmp_path / name)).problem


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b"{}", b"1e999"])
def test_rubbish_for_metadata(store, content) -> None:
    (store / "zarr.json").write_bytes(content)
    for action in (open_cache, inspect_store, verify_files):
        refusal(CorruptError, lambda action=action: action(store))


def test_an_array_that_the_store_has_not(store) -> None:
    error = refusal(StoreError, lambda: open_cache(store).read(0, ["features/elsewhere"]))
    assert "features/elsewhere" in error.problem
    assert "features/head" in error.problem


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([2**31, 2**31 + 1, 2**63, 10**30]),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(["../../etc", "a/b", "segmentation", "stored", "0" * 64]),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


def places(value, at=()):
    """Paths of everything below a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


@pytest.fixture(scope="module")
def fuzzed(plan, tmp_path_factory) -> Path:
    """A half-built store: no seal yet that would catch a change of its manifest."""
    return plan(features=True).write(tmp_path_factory.mktemp("fuzz") / "s.zarr", [0])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_is_refused_or_read_never_a_crash(fuzzed, plan, data) -> None:
    file = fuzzed / "zarr.json"
    whole = file.read_bytes()
    content = json.loads(whole)
    manifest = content["attributes"]["kdcache"]
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(sorted(places(manifest), key=repr)))
        parent = manifest
        for step in way:
            parent = parent[step]
        what = data.draw(st.sampled_from(["replace", "delete", "rename", "copy"]))
        if what == "replace" or isinstance(parent, list):
            parent[last] = data.draw(VALUES)
        elif what == "copy":
            parent[data.draw(st.text(max_size=3))] = copy.deepcopy(parent[last])
        else:
            value = parent.pop(last)
            if what == "rename":
                parent[data.draw(st.text(max_size=3))] = value
    wanted = plan()
    file.write_text(json.dumps(content))
    try:
        for action in (
            open_cache,
            verify_files,
            lambda path: [inspect_store(path).facts(), json.dumps(inspect_store(path).to_json())],
            lambda path: open_writer(path, wanted.manifest, wanted.ids).close(),
        ):
            with contextlib.suppress(KDCacheError):
                action(fuzzed)
    finally:
        file.write_bytes(whole)


def test_a_manifest_without_its_head_is_refused(fuzzed) -> None:
    file = fuzzed / "zarr.json"
    whole = file.read_bytes()
    try:
        content = json.loads(whole)
        heads = content["attributes"]["kdcache"]["heads"]
        heads["depth"] = heads.pop("segmentation")
        file.write_text(json.dumps(content))
        refusal(CorruptError, lambda: inspect_store(fuzzed))
    finally:
        file.write_bytes(whole)


def test_a_relative_path_outlives_a_change_of_folder(store, plan, tmp_path, monkeypatch) -> None:
    """Also of a cache that was opened and not yet read, and in another process."""
    monkeypatch.chdir(store.parent)
    cache = open_cache(store.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    wanted = plan()
    for one in (cache, pickle.loads(pickle.dumps(cache))):
        one.check_files()
        assert one.ids == tuple(wanted.ids)
        assert np.array_equal(one.column("window"), wanted.arrays["records/window"])
        path = "pixels/image"
        assert np.array_equal(one.read(7, [path])[path], wanted.arrays[path][7])
    assert str(cache.place) == store.name, "as it was named"


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_store_that_is_gone_is_not_called_damaged(store, tmp_path, how) -> None:
    actions = [
        lambda cache: cache.ids,
        lambda cache: cache.check_files(),
        lambda cache: cache.column("window"),
        lambda cache: cache.read(0, ["pixels/image"]),
    ]
    caches = [open_cache(store) for _ in actions]
    shutil.move(store, tmp_path / "moved") if how == "moved" else shutil.rmtree(store)
    for cache, action in zip(caches, actions, strict=True):
        with pytest.raises(StoreError, match="moved or deleted since it was opened") as caught:
            action(cache)
        assert not isinstance(caught.value, CorruptError)


def test_ids_of_another_build_in_the_same_place_are_not_read(store, plan, tmp_path) -> None:
    """The other build has as many samples, so that its index of ids would be read as one of the first."""
    cache = open_cache(store)
    other = plan()
    other.ids[0] = "another"
    other.write(tmp_path / "other.zarr")
    shutil.rmtree(store)
    shutil.move(tmp_path / "other.zarr", store)
    assert open_cache(store).ids[0] == "another"
    with pytest.raises(CorruptError, match="changed after the cache was sealed"):
        list(cache.ids)
