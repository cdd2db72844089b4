"""Copies: into every codec, other shards, in part; interrupted, and from what is damaged."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import CorruptError, IncompleteError, MismatchError, StoreError
from kdcache.store import (
    CopyChanges,
    Manifest,
    Worker,
    copy_store,
    inspect_store,
    open_cache,
    round_targets,
    spread_samples,
    verify_files,
)

CODECS = ("default", "small", "none")


def rows_of(path: Path) -> dict[str, np.ndarray]:
    """Every array of a store, whole."""
    cache = open_cache(path)
    records = [cache.read(record, list(cache.specs)) for record in range(len(cache))]
    return {name: np.stack([row[name] for row in records]) for name in cache.specs}


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Paths of the arrays whose shards were encoded, one for each shard."""
    import kdcache.store.writer as writer

    paths: list[str] = []
    encode = writer.Encoder.encode
    monkeypatch.setattr(
        writer.Encoder, "encode", lambda self, spec, *rest: paths.append(spec.path) or encode(self, spec, *rest)
    )
    return paths


def test_an_equal_copy_is_equal_in_every_byte(variant_store, tree, tmp_path, encoded) -> None:
    """Nothing is decoded, and who trained on the source trains on the same store."""
    seen = []
    result = copy_store(open_cache(variant_store), tmp_path / "c", progress=lambda *at: seen.append(at))
    records = result.manifest.records
    assert (result.records, result.skipped, result.complete) == (records, 0, True)
    assert seen[-1] == (records, records)
    assert tree(tmp_path / "c") == tree(variant_store)
    assert encoded == []


def test_a_copy_names_the_teacher_s_code_without_its_folder(plan, tmp_path) -> None:
    """Caches of earlier versions name the folder. They stay what they are, for they are sealed."""
    own = plan(several=True, views=2)
    before = own.manifest.model_dump_json().replace('"spec":"', '"spec":"/home/ann/nets/')
    older = replace(own, manifest=Manifest.model_validate_json(before))
    source = older.write(tmp_path / "older.zarr")
    copy_store(open_cache(source), tmp_path / "copy.zarr")
    verify_files(tmp_path / "copy.zarr")
    named = {path.name for path in source.rglob("*") if path.is_file() and b"/ann/" in path.read_bytes()}
    assert {"zarr.json", "manifest.json"} <= named
    assert not [path for path in (tmp_path / "copy.zarr").rglob("*") if path.is_file() and b"home" in path.read_bytes()]
    same(rows_of(tmp_path / "copy.zarr"), rows_of(source))


def test_a_finished_copy_is_kept(store, tree, tmp_path) -> None:
    source = open_cache(store)
    copy_store(source, tmp_path / "c", CopyChanges(codec="small"))
    before = tree(tmp_path / "c")
    result = copy_store(source, tmp_path / "c", CopyChanges(codec="small"))
    assert (result.records, result.skipped) == (0, 10)
    assert tree(tmp_path / "c") == before


def test_not_onto_itself(store, tree) -> None:
    """Which would unseal a store that is damaged."""
    before = tree(store)
    for destination in (store, f"{store}/", store.parent / "." / store.name):
        with pytest.raises(StoreError, match="same cache"):
            copy_store(open_cache(store), destination)
    assert tree(store) == before


@pytest.mark.parametrize("codec", CODECS)
def test_into_another_codec(variant, variant_store, tmp_path, codec) -> None:
    source = open_cache(variant_store)
    copy_store(source, tmp_path / "c", CopyChanges(codec=codec))
    rounded = codec == "small" != variant.manifest.codec
    wanted = rows_of(variant_store)
    same(rows_of(tmp_path / "c"), round_targets(wanted, codec) if rounded else wanted)
    copied = open_cache(tmp_path / "c").manifest
    assert copied == variant.manifest.model_copy(
        update={"codec": codec, "fidelity": None if rounded else variant.manifest.fidelity}
    )
    assert verify_files(tmp_path / "c").damaged == []


def test_figures_of_a_copy_that_rounds_are_the_callers(store, tmp_path) -> None:
    source = open_cache(store)
    figures = source.manifest.fidelity.model_copy(update={"kl_t1": 1e-5})
    for codec, wanted in (("small", figures), ("none", source.manifest.fidelity)):
        result = copy_store(source, tmp_path / codec, CopyChanges(codec=codec), fidelity=figures)
        assert open_cache(tmp_path / codec).manifest.fidelity == result.manifest.fidelity == wanted


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory) -> Path:
    """A complete top-k store; for reading only."""
    return plan().write(tmp_path_factory.mktemp("whole") / "store.zarr")


@settings(max_examples=12, deadline=None)
@given(
    samples=st.one_of(st.none(), st.sets(st.integers(0, 9), min_size=1).map(sorted)),
    shard_records=st.integers(1, 12),
    codec=st.sampled_from(CODECS),
    features=st.sampled_from([None, (), ("head",)]),
    pixels=st.sampled_from([None, "stored", "source"]),
)
def test_any_part_of_a_store(whole, tmp_path_factory, samples, shard_records, codec, features, pixels) -> None:
    if pixels == "source":
        samples = None
    folder = tmp_path_factory.mktemp("copy")
    changes = CopyChanges(codec, shard_records, samples, features, pixels)
    copy_store(open_cache(whole), folder / "c", changes)
    found, kept = open_cache(folder / "c"), list(range(10)) if samples is None else samples
    wanted = {path: array[kept] for path, array in round_targets(rows_of(whole), codec).items() if path in found.specs}
    wanted["records/sample"] = np.arange(len(kept))
    same(rows_of(folder / "c"), wanted)
    assert found.ids == tuple(open_cache(whole).ids[number] for number in kept)
    assert set(found.manifest.features) == ({"head", "stage1"} if features is None else set(features))
    assert ("pixels/image" in found.specs) == (pixels != "source")
    assert found.manifest.build.shard_records == shard_records
    assert Manifest.model_validate_json(found.manifest.model_dump_json()) == found.manifest


def test_several_views_of_a_sample_stay_together(plan, tmp_path) -> None:
    wanted = plan(records=12, views=3, k=5)
    wanted.arrays["records/labelled"] = np.repeat(np.uint8([1, 0, 1, 1]), 3)
    wanted.write(tmp_path / "s")
    copy_store(open_cache(tmp_path / "s"), tmp_path / "c", CopyChanges(samples=[1, 3], shard_records=5))
    cache = open_cache(tmp_path / "c")
    assert (len(cache), cache.manifest.dataset.samples, cache.manifest.dataset.labelled) == (6, 2, 1)
    assert cache.column("sample").tolist() == [0, 0, 0, 1, 1, 1]
    assert cache.column("view").tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(rows_of(tmp_path / "c")["pixels/image"], wanted.arrays["pixels/image"][[3, 4, 5, 9, 10, 11]])


def test_what_stays_is_not_encoded_again(plan, tmp_path, encoded) -> None:
    plan().write(tmp_path / "s")
    source = open_cache(tmp_path / "s")
    encoded.clear()
    copy_store(source, tmp_path / "less", CopyChanges(features=("head",), pixels="source"))
    assert encoded == []
    same(
        rows_of(tmp_path / "less"),
        {p: a for p, a in rows_of(tmp_path / "s").items() if p in open_cache(tmp_path / "less").specs},
    )
    copy_store(source, tmp_path / "part", CopyChanges(samples=range(9)))
    assert set(encoded) == set(source.specs)


def test_workers_share_a_copy(store, tree, tmp_path) -> None:
    source, changes = open_cache(store), CopyChanges(codec="none", shard_records=3)
    copy_store(source, tmp_path / "one", changes)
    first = copy_store(source, tmp_path / "two", changes, worker=Worker(0, 2))
    assert (first.records, first.complete) == (6, False)
    with pytest.raises(IncompleteError, match="2 of 4"):
        open_cache(tmp_path / "two")
    assert copy_store(source, tmp_path / "two", changes, worker=Worker(1, 2)).complete
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.mark.parametrize("codec", [None, "none"])
@pytest.mark.parametrize("damage", ["flipped", "shortened", "missing"])
def test_a_damaged_source(store, tree, tmp_path, codec, damage) -> None:
    """The file is named, and its shard does not count; repaired, the copy goes on."""
    file = store / "targets/segmentation/values/c/1/0/0/0"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(
            content[:90] + bytes([content[90] ^ 1]) + content[91:] if damage == "flipped" else content[:-9]
        )
    changes = CopyChanges(codec=codec)
    with pytest.raises(CorruptError) as caught:
        copy_store(open_cache(store), tmp_path / "c", changes)
    assert str(file) in caught.value.problem
    assert (inspect_store(tmp_path / "c").shards_written, inspect_store(tmp_path / "c").complete) == (1, False)
    file.write_bytes(content)
    result = copy_store(open_cache(store), tmp_path / "c", changes)
    assert (result.records, result.skipped) == (6, 4)
    copy_store(open_cache(store), tmp_path / "clean", changes)
    assert tree(tmp_path / "c") == tree(tmp_path / "clean")


KILLED = """
import os, signal, sys
from kdcache.store import CopyChanges, copy_store, open_cache
from kdcache.store.backend import local
names, publish = iter(range(10**6)), local.Folder.publish
def dying(self, key, content):
    if next(names) == int(sys.argv[4]):
        half = self.folder / (key + ".begun.partial")
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    publish(self, key, content)
local.Folder.publish = dying
copy_store(open_cache(sys.argv[1]), sys.argv[2], CopyChanges(codec=sys.argv[3] or None))
"""


@pytest.mark.parametrize("codec", ["", "small"])
@pytest.mark.parametrize("file", [0, 3, 20, 35, 52])
def test_killed_at_any_file_it_goes_on(store, tree, tmp_path, codec, file) -> None:
    """52 files are published: 16 arrays and a ledger record in each of 3 shards, then the ledger."""
    source, changes = open_cache(store), CopyChanges(codec=codec or None)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(store), str(tmp_path / "c"), codec, str(file)], timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(IncompleteError):
        open_cache(tmp_path / "c")
    result = copy_store(source, tmp_path / "c", changes)
    assert result.skipped == min(10, 4 * (file // 17))
    copy_store(source, tmp_path / "clean", changes)
    assert tree(tmp_path / "c") == tree(tmp_path / "clean")


def test_the_copy_of_another_store_is_not_continued(store, plan, tree, tmp_path) -> None:
    copy_store(open_cache(store), tmp_path / "c")
    before = tree(tmp_path / "c")
    other = plan(seed=5)
    other.manifest = other.manifest.model_copy(update={"created": "2026-02-02T00:00:00+00:00"})
    with pytest.raises(MismatchError, match="built 2026-02-02") as caught:
        copy_store(open_cache(other.write(tmp_path / "other")), tmp_path / "c")
    assert "a new or empty place" in caught.value.fix
    with pytest.raises(MismatchError, match="codec: default against none"):
        copy_store(open_cache(store), tmp_path / "c", CopyChanges(codec="none"))
    assert tree(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (CopyChanges(features=("haed",)), "haed"),
        (CopyChanges(samples=[1], pixels="source"), "without pixels"),
    ],
)
def test_changes_that_cannot_be(store, tmp_path, changes, named) -> None:
    with pytest.raises(StoreError) as caught:
        copy_store(open_cache(store), tmp_path / "c", changes)
    assert named in caught.value.problem
    assert not (tmp_path / "c").exists()


def test_a_store_without_pixels_gets_none(plan, tmp_path) -> None:
    source = open_cache(plan(pixels="source").write(tmp_path / "s"))
    for changes in (CopyChanges(pixels="stored"), CopyChanges(samples=[0])):
        with pytest.raises(StoreError, match="pixels"):
            copy_store(source, tmp_path / "c", changes)
    copy_store(source, tmp_path / "c", CopyChanges(codec="none"))


def test_something_else_in_the_place(store, tmp_path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c/thesis.tex").write_text("thesis")
    with pytest.raises(StoreError, match="something else"):
        copy_store(open_cache(store), tmp_path / "c")


def test_choosing_samples(store) -> None:
    cache = open_cache(store)
    assert spread_samples(cache, 1) == [0]
    assert spread_samples(cache, 4) == [0, 3, 6, 9]
    assert all(len(set(spread_samples(cache, n))) == n for n in range(1, 11))
    for count in (0, 11):
        with pytest.raises(StoreError, match=f"{count} of 10"):
            spread_samples(cache, count)


def test_to_an_object_store_and_back(s3, store, tree, tmp_path) -> None:
    """Whole objects, each asked for once, past the folder of copies; what was spoiled on its way is asked for again."""
    address, changes = s3.address(), CopyChanges()
    copy_store(open_cache(store), address, changes)
    assert s3.objects(address) == tree(store)
    remote = open_cache(address)
    s3.reset()
    s3.fail("flip", "values/c/1/0/0/0")
    s3.fail("cut", "pixels/image/c/2/0/0/0")
    copy_store(remote, tmp_path / "back", changes)
    assert tree(tmp_path / "back") == tree(store)
    assert s3.counted("GET", "/c/") == 3 * 16 + 2  # shards, the two that failed; the ids are on this machine
    assert not list((tmp_path / "copies").glob("mirrors/*/pixels/image/c"))


def test_in_an_object_store_a_copy_goes_on(s3, store, tmp_path) -> None:
    address, changes = s3.address(), CopyChanges(codec="small", shard_records=3)
    copy_store(open_cache(store), address, changes, worker=Worker(1, 2))
    copied = copy_store(open_cache(store), address, changes)
    assert (copied.records, copied.skipped, copied.complete) == (6, 4, True)
    copy_store(open_cache(store), tmp_path / "c", changes)
    same(rows_of(tmp_path / "c"), round_targets(rows_of(store), "small"))
    s3.put(address, "targets/segmentation/values/c/1/0/0/0", None)
    assert copy_store(open_cache(store), address, changes).records == 3
    far = s3.address()
    copy_store(open_cache(address), far, CopyChanges(codec="none", samples=[2, 7]))
    assert open_cache(far).ids == tuple(open_cache(store).ids[number] for number in (2, 7))
