"""Building a store: any order, any interruption, one builder, nothing of the user's touched."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec, GzipCodec

from kdcache.errors import IncompleteError, MismatchError, StoreError, VersionError
from kdcache.store import Worker, inspect_store, open_cache, open_writer, verify_files
from kdcache.store.format import schema
from kdcache.store.format.manifest_models import Feature, Head, Statistic
from kdcache.store.format.teacher_models import Augmented, Member

MEMBER = Member(spec="kdcache:tiny", weights="2" * 64, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), share=0.5)

# Reads a plan (manifest.json, arrays.npz) and writes what is missing of a store.
BUILD = """
import json, os, signal, sys
import numpy as np
from pathlib import Path
from kdcache.store import Manifest, open_cache, open_writer

plan, store = Path(sys.argv[1]), Path(sys.argv[2])
manifest = Manifest.model_validate_json((plan / "manifest.json").read_bytes())
ids = json.loads((plan / "ids.json").read_text())
arrays = dict(np.load(plan / "arrays.npz"))

def build(store):
    with open_writer(store, manifest, ids) as writer:
        for shard in writer.missing:
            first, last = manifest.shard_range(shard)
            writer.write_shard(shard, {path: array[first:last] for path, array in arrays.items()})
        writer.seal()
"""


def save_plan(plan, folder: Path) -> Path:
    import numpy as np

    folder.mkdir()
    (folder / "manifest.json").write_text(plan.manifest.model_dump_json())
    (folder / "ids.json").write_text(json.dumps(plan.ids))
    np.savez(folder / "arrays.npz", **plan.arrays)
    return folder


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = BUILD + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def small(plan):
    """Top-k with pixels and without features: fewer files, every kind of array."""
    return plan(features=False)


@pytest.fixture(scope="module")
def clean(small, tree, tmp_path_factory):
    """Files of an uninterrupted build of `small`."""
    return tree(small.write(tmp_path_factory.mktemp("clean") / "store.zarr"))


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0]])
def test_the_order_of_shards_does_not_show(small, clean, tree, tmp_path, order) -> None:
    assert tree(small.write(tmp_path / "s.zarr", order)) == clean


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_a_build_goes_on_after_any_shard(small, clean, tree, tmp_path, finished) -> None:
    path = small.write(tmp_path / "s.zarr", list(range(finished)), seal=False)
    report = inspect_store(path)
    assert not report.complete
    assert report.shards_written == finished
    with open_writer(path, small.manifest, small.ids) as writer:
        assert writer.missing == list(range(finished, 3))
    assert tree(small.write(path)) == clean
    assert verify_files(path).damaged == []


def test_created_is_that_of_the_first_start(small, clean, tree, tmp_path) -> None:
    path = small.write(tmp_path / "s.zarr", [0])
    later = small.manifest.model_copy(update={"created": "2027-01-01T00:00:00+00:00"})
    with open_writer(path, later, small.ids) as writer:
        assert writer.manifest.created == small.manifest.created
        for shard in writer.missing:
            writer.write_shard(shard, small.rows(shard))
        writer.seal()
    assert tree(path) == clean


def test_killed_anywhere_it_resumes_to_the_same_bytes(small, clean, tree, tmp_path) -> None:
    """SIGKILL before the n-th fsync or the n-th rename of a build, for n over the whole build.

    Each kill is that of a forked process; another one then builds on without help.
    """
    plan = save_plan(small, tmp_path / "plan")
    code = """
    import pathlib, zarr

    def kill_before(name, owner, count):
        original, calls = getattr(owner, name), 0
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(owner, name, counted)

    def in_child(action):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                action()
                code = 0
            finally:
                os._exit(code)
        return os.waitpid(child, 0)[1]

    def doomed(name, owner, count, path):
        kill_before(name, owner, count)
        build(path)

    for name, owner, step in (("fsync", os, 17), ("replace", pathlib.Path, 6), ("rename", pathlib.Path, 1)):
        count = 1
        while True:
            path = store / f"{name}-{count:03d}.zarr"
            killed = in_child(lambda: doomed(name, owner, count, path))
            assert os.WIFSIGNALED(killed) or killed == 0, killed
            ledger = len(list(path.glob("ledger/*.json")))
            partial = len([*path.rglob("*.partial")])
            assert in_child(lambda: build(path)) == 0
            print(name, count, os.WIFSIGNALED(killed), ledger, partial)
            if not os.WIFSIGNALED(killed):
                break
            count += step
    """
    stores = tmp_path / "stores"
    stores.mkdir()
    done = run(code, plan, stores)
    assert done.returncode == 0, done.stderr
    # The kills were spread over the build, and some left an unfinished file behind.
    shards = {int(line.split()[3]) for line in done.stdout.splitlines() if line.split()[2] == "True"}
    assert shards >= {0, 1, 2}
    assert any(int(line.split()[4]) for line in done.stdout.splitlines()), done.stdout
    built = sorted(stores.iterdir())
    assert len(built) == len(done.stdout.splitlines()) >= 15
    for path in built:
        assert tree(path) == clean, path.name


def test_left_over_partial_files_are_removed(small, clean, tree, tmp_path) -> None:
    path = small.write(tmp_path / "s.zarr", [0])
    for folder in (path, path / "records" / "view" / "c", path / "ledger"):
        (folder / "0.0123456789abcdef.partial").write_bytes(b"half")
    assert tree(small.write(path)) == clean


def test_what_a_killed_builder_left_of_a_shard_goes_when_it_is_taken(small, tmp_path) -> None:
    """Then it takes no room for the rest of the build. What another builder is writing just now stays."""
    path = small.write(tmp_path / "s.zarr", [0])
    left = [path / f"records/view/c/{shard}.0123456789abcdef.partial" for shard in (1, 2)]
    with open_writer(path, small.manifest, small.ids) as one, open_writer(path, small.manifest, small.ids) as other:
        for file in left:
            file.write_bytes(b"half")
        mine, theirs = one.claimed(), other.claimed()
        assert next(mine) == 1
        assert [file.exists() for file in left] == [False, True]
        left[0].write_bytes(b"half")
        assert next(theirs) == 2
        assert [file.exists() for file in left] == [True, False]
    assert not list(path.glob("ledger/*.lock"))


def test_two_builders_at_once_share_the_shards(small, clean, tree, tmp_path) -> None:
    path = tmp_path / "s.zarr"
    with open_writer(path, small.manifest, small.ids) as one, open_writer(path, small.manifest, small.ids) as other:
        mine, theirs = one.claimed(), other.claimed()
        first, second, third = next(mine), next(theirs), next(mine)
        assert (first, second, third) == (0, 1, 2)
        assert list(theirs) == []
        assert other.missing == [0, 1, 2]
        for shard in (first, third):
            one.write_shard(shard, small.rows(shard))
        assert list(mine) == []
        assert one.missing == [1]
        assert list(other.claimed()) == []  # 1 is claimed already, 0 and 2 are seen to be finished
        other.write_shard(second, small.rows(second))
        assert list(one.claimed()) == []
        assert one.missing == other.missing == []
        assert one.seal()
        assert other.seal()
    assert tree(path) == clean


def test_what_another_builder_sealed_just_before_stays_sealed(small, clean, tree, tmp_path, monkeypatch) -> None:
    """A store that one builder reports as finished opens at every moment, whoever seals it after."""
    path = tmp_path / "s.zarr"
    with open_writer(path, small.manifest, small.ids) as one, open_writer(path, small.manifest, small.ids) as other:
        for shard in one.claimed():
            one.write_shard(shard, small.rows(shard))
        assert list(other.claimed()) == []
        wait, removed = one.place.alone, []

        def wait_for_the_other():
            assert other.seal()
            return wait()

        monkeypatch.setattr(one.place, "alone", wait_for_the_other)
        monkeypatch.setattr(one.place, "remove", removed.append)
        assert one.seal()
    assert removed == []
    assert tree(path) == clean


def test_a_builder_that_dies_leaves_its_shards(small, clean, tree, tmp_path) -> None:
    path = tmp_path / "s.zarr"
    plan = save_plan(small, tmp_path / "plan")
    code = """
    with open_writer(store, manifest, ids) as writer:
        print(next(writer.claimed()), flush=True)
        sys.stdin.read()
    """
    script = [sys.executable, "-c", BUILD + textwrap.dedent(code), plan, path]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as doomed:
        assert doomed.stdout.readline() == "0\n"
        with open_writer(path, small.manifest, small.ids) as writer:
            for shard in writer.claimed():
                writer.write_shard(shard, small.rows(shard))
            assert writer.missing == [0]
            doomed.kill()
            doomed.wait()
            for shard in writer.claimed():
                writer.write_shard(shard, small.rows(shard))
            assert writer.seal()
    assert tree(path) == clean


def test_many_builders_start_at_once(small, clean, tree, tmp_path) -> None:
    """Whatever each is doing just then, every shard is written once and the store is whole."""
    plan = save_plan(small, tmp_path / "plan")
    code = """
    import time
    while not Path(sys.argv[3]).exists():
        time.sleep(0.001)
    with open_writer(store, manifest, ids) as writer:
        for shards in writer.passes():
            for shard in shards:
                first, last = manifest.shard_range(shard)
                writer.write_shard(shard, {path: array[first:last] for path, array in arrays.items()})
                print(shard, flush=True)
                time.sleep(0.2)
        assert writer.seal()
    open_cache(store)
    """
    script = [sys.executable, "-c", BUILD + textwrap.dedent(code), plan, tmp_path / "s.zarr", tmp_path / "go"]
    builders = [subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    (tmp_path / "go").touch()
    said = [builder.communicate(timeout=120) for builder in builders]
    assert [builder.returncode for builder in builders] == [0] * 4, said
    assert sorted("".join(out for out, _ in said).split()) == ["0", "1", "2"]
    assert tree(tmp_path / "s.zarr") == clean
    assert sorted(p.name for p in tmp_path.iterdir()) == ["go", "plan", "s.zarr"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_workers_with_numbers(small, clean, tree, tmp_path, count) -> None:
    """In any order, and with another number of them after an interruption; the last one seals."""
    path = tmp_path / "s.zarr"
    sealed = []
    small.write(path, [1])
    for index in reversed(range(count)):
        with open_writer(path, small.manifest, small.ids, Worker(index, count)) as writer:
            assert writer.missing == [shard for shard in (0, 2) if shard % count == index]
            for shard in writer.claimed():
                writer.write_shard(shard, small.rows(shard))
            sealed.append(writer.seal())
    assert sealed[-1]
    assert tree(path) == clean


def test_a_worker_takes_over_the_shards_of_those_that_died(small, clean, tree, tmp_path) -> None:
    path = tmp_path / "s.zarr"
    with open_writer(path, small.manifest, small.ids, Worker(1, 3)) as writer:
        assert writer.missing == [1]
    with open_writer(path, small.manifest, small.ids, Worker(1, 3, take_over=True)) as writer:
        assert writer.missing == [1, 0, 2]  # its own first
        for shard in writer.claimed():
            writer.write_shard(shard, small.rows(shard))
        assert writer.seal()
    assert tree(path) == clean


def test_a_half_built_store_lists_what_is_missing(small, tmp_path) -> None:
    small.write(tmp_path / "s.zarr", [1])
    summary = inspect_store(tmp_path / "s.zarr")
    assert summary.missing == (0, 2)
    assert "shards 0, 2;" in dict(summary.facts())["missing"]
    assert summary.to_json()["missing"] == (0, 2)


@pytest.mark.parametrize("what", ["a file", "a folder with a file", "a folder with a hidden file", "another store"])
def test_an_out_that_holds_something_else_is_untouched(small, tree, tmp_path, what) -> None:
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("thesis")
    elif what == "another store":
        zarr.create_group(out, attributes={"mine": 1}).create_array("x", shape=(3,), dtype="i4")
    else:
        out.mkdir()
        (out / (".git" if "hidden" in what else "thesis.tex")).write_text("thesis")
    before = tree(tmp_path) if out.is_dir() else out.read_bytes()
    with pytest.raises(StoreError) as caught:
        open_writer(out, small.manifest, small.ids)
    assert str(out) in caught.value.problem
    assert (tree(tmp_path) if out.is_dir() else out.read_bytes()) == before


def test_an_empty_out_is_used(small, clean, tree, tmp_path) -> None:
    (tmp_path / "s.zarr").mkdir()
    assert tree(small.write(tmp_path / "s.zarr")) == clean
    assert tree(small.write(tmp_path / "new" / "deep" / "s.zarr")) == clean


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("teacher.weights", {"teacher": {"weights": "2" * 64}}),
        ("teacher.spec", {"teacher": {"spec": "kdcache:base"}}),
        ("teacher.precision", {"teacher": {"precision": "bf16"}}),
        ("teacher.mean", {"teacher": {"mean": (0.4, 0.5, 0.5)}}),
        ("teacher.std", {"teacher": {"std": (0.2, 0.2, 0.3)}}),
        ("teacher.class_map", {"teacher": {"class_map": (0, 1, 2)}}),
        ("teacher.members", {"teacher": {"members": (MEMBER, MEMBER)}}),
        ("teacher.tta", {"teacher": {"tta": Augmented(flip=True, scales=(1.0,))}}),
        ("teacher.folds", {"teacher": {"folds": 2}}),
        ("teacher.probe", {"teacher": {"probe": (1.0, -2.0, 3.5)}}),
        ("teacher.probe", {"teacher": {"probe": (1.0, -2.0, 3.1)}}),
        ("teacher.probe", {"teacher": {"probe": (1.0, -2.0)}}),
        ("dataset.ids_digest", {"dataset": {"ids_digest": "5" * 64}}),
        ("dataset.class_names", {"dataset": {"class_names": ("a", "b", "c", "d", "e")}}),
        ("view.pixels", {"view": {"pixels": "source"}}),
        ("view.size", {"view": {"size": (24, 33)}}),
        ("build.batch_size", {"build": {"batch_size": 3}}),
        ("build.shard_records", {"build": {"shard_records": 5}}),
        ("build.threads", {"build": {"threads": 2}}),
        ("heads", {"heads": {"segmentation": Head(classes=5, k=2, size=(6, 8), align_corners=False)}}),
        ("features", {"features": {"head": Feature(channels=1, size=(1, 1))}}),
        ("statistics", {"statistics": {"entropy": Statistic(kind="entropy", size=(6, 8))}}),
        ("codec", {"codec": "none"}),
    ],
)
@pytest.mark.parametrize("finished", [[0], None], ids=["half built", "complete"])
def test_another_manifest_is_refused_by_the_field(small, tree, tmp_path, field, change, finished) -> None:
    path = small.write(tmp_path / "s.zarr", finished)
    if field in ("heads", "features", "statistics", "codec"):
        other = small.manifest.model_copy(update=change)
    else:
        other = small.changed(**change).manifest
    before = tree(path)
    with pytest.raises(MismatchError) as caught:
        open_writer(path, other, small.ids)
    assert re.search(rf"differs in (.*, )?{re.escape(field)}: ", caught.value.problem)
    assert "--out" in caught.value.fix
    assert tree(path) == before


def test_a_half_built_store_with_a_statistic_of_earlier_versions_names_a_fix_that_works(small, tree, tmp_path) -> None:
    path = tmp_path / "s.zarr"
    entropy = {"entropy": Statistic(kind="entropy", size=(6, 8))}
    open_writer(path, small.manifest.model_copy(update={"statistics": entropy}), small.ids).close()
    before = tree(path)
    with pytest.raises(MismatchError, match="Cannot continue") as caught:
        open_writer(path, small.manifest.model_copy(update={"statistics": {}}), small.ids)
    assert "without --statistics entropy and with another --out" in caught.value.fix
    assert "--from" not in caught.value.fix, "nothing can be taken from a store that does not open"
    with pytest.raises(IncompleteError) as unread:
        open_cache(path)
    assert "build a new cache without --statistics entropy" in unread.value.fix
    assert tree(path) == before


def test_a_probe_within_rounding_continues(small, tmp_path) -> None:
    """Other hardware rounds differently; that is the same teacher."""
    path = small.write(tmp_path / "s.zarr", [0])
    open_writer(path, small.changed(teacher={"probe": (1.001, -2.002, 3.01)}).manifest, small.ids).close()


SHARD_FILE = "targets/segmentation/values/c/1/0/0/0"


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-3])
    elif how == "extended":
        path.write_bytes(content + b"\0")
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        raise ValueError(how)


@pytest.mark.parametrize("how", ["missing", "truncated", "extended", "flipped", "empty"])
@pytest.mark.parametrize("name", [SHARD_FILE, "records/labelled/c/1"])
def test_a_damaged_shard_is_unsealed_and_redone(small, clean, tree, tmp_path, name, how) -> None:
    path = small.write(tmp_path / "s.zarr")
    damage(path / name, how)
    with open_writer(path, small.manifest, small.ids) as writer:
        assert writer.missing == [1]
        assert not (path / "complete.json").exists()
    assert tree(small.write(path)) == clean
    assert len(open_cache(path)) == 10


@pytest.mark.parametrize("key", ["bytes", "records", "shard", "files"])
def test_a_ledger_record_that_lies_is_redone(small, clean, tree, tmp_path, key) -> None:
    """Well formed, yet not what a build of this store publishes."""
    path = small.write(tmp_path / "s.zarr")
    record = json.loads((path / "ledger/00000001.json").read_bytes())
    if key == "bytes":
        record["files"][SHARD_FILE]["bytes"] += 1
    elif key == "files":
        del record["files"][SHARD_FILE]
    else:
        record[key] = {"records": [4, 7], "shard": 2}[key]
    (path / "ledger/00000001.json").write_text(json.dumps(record))
    assert verify_files(path).damaged == ["ledger/00000001.json"]
    assert tree(small.write(path)) == clean
    open_cache(path).check_files()


@pytest.mark.parametrize("how", ["truncated", "empty", "missing"])
def test_a_damaged_seal_is_made_again(small, clean, tree, tmp_path, how) -> None:
    path = small.write(tmp_path / "s.zarr")
    damage(path / "complete.json", how)
    with pytest.raises(StoreError, match="build-teacher-cache or copy"):
        open_cache(path)
    assert tree(small.write(path)) == clean


@pytest.mark.parametrize("name", ["records/view/zarr.json", "targets/zarr.json", "zarr.json", "samples/id_ends/c/0"])
@pytest.mark.parametrize("how", ["missing", "truncated", "empty"])
@pytest.mark.parametrize("finished", [[0], None], ids=["half built", "complete"])
def test_damaged_metadata_is_written_again(small, clean, tree, tmp_path, name, how, finished) -> None:
    """By a build that was begun at another time too."""
    path = small.write(tmp_path / "s.zarr", finished)
    damage(path / name, how)
    later = small.manifest.model_copy(update={"created": "2027-01-01T00:00:00+00:00"})
    assert tree(type(small)(later, small.ids, small.arrays).write(path)) == clean


def test_a_full_disk_loses_nothing(small, clean, tree, small_disk) -> None:
    """The message says space; with more of it the same call completes."""
    needed = sum(-(-len(content) // 4096) * 4 for content in clean.values())  # KiB of whole blocks
    disk = small_disk(needed - 32)
    path = disk.path / "s.zarr"
    with pytest.raises(StoreError, match="No space left") as caught:
        small.write(path)
    assert "space" in caught.value.fix
    finished = len(list(path.glob("ledger/*.json")))
    disk.grow(100 * needed)
    with open_writer(path, small.manifest, small.ids) as writer:
        assert len(writer.finished) == finished >= 1
    assert tree(small.write(path)) == clean
    assert verify_files(path).damaged == []


def test_a_disk_that_is_full_from_the_start(small, clean, tree, small_disk) -> None:
    disk = small_disk(4)
    with pytest.raises(StoreError, match="No space left"):
        small.write(disk.path / "s.zarr")
    assert list(disk.path.iterdir()) == []
    disk.grow(8192)
    assert tree(small.write(disk.path / "s.zarr")) == clean


def test_writers_in_threads_leave_the_settings_of_zarr_alone(plan, tmp_path) -> None:
    names = ("array.write_empty_chunks", "codec_pipeline.batch_size")
    before = [zarr.config.get(name) for name in names]
    wanted = [plan(seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda number: wanted[number].write(tmp_path / f"{number}.zarr"), range(8)))
    assert [zarr.config.get(name) for name in names] == before
    for number, store in enumerate(stores):
        cache = open_cache(store)
        for path, rows in wanted[number].arrays.items():
            assert np.array_equal(cache.read(1, [path])[path], rows[1])


@pytest.mark.parametrize("name", ["s" * 252, "s" * 255, "ä" * 127])
def test_a_store_with_a_long_name(plan, tmp_path, name) -> None:
    plan().write(tmp_path / name)
    assert len(open_cache(tmp_path / name)) == 10
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_store_whose_name_is_too_long_or_whose_disk_cannot_be_written(plan, tmp_path, monkeypatch) -> None:
    with pytest.raises(StoreError, match="255 bytes"):
        plan().write(tmp_path / ("s" * 256))
    assert list(tmp_path.iterdir()) == []
    begun = plan().write(tmp_path / "s", order=[0], seal=False)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "some file")

    monkeypatch.setattr("kdcache.store.backend.local.write_durably", refuse)
    with pytest.raises(StoreError, match="read-only file system"):
        plan().write(begun)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="read-only file system"):
        plan().write(tmp_path / "other")


def test_a_zarr_that_writes_another_kind_of_array_is_refused_first(plan, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(schema, "compressors", lambda *_: (GzipCodec(), Crc32cCodec()))
    with pytest.raises(VersionError, match=r"targets/segmentation/values/zarr\.json.*gzip") as caught:
        plan(records=13).write(tmp_path / "s.zarr")  # a layout that no other test has: zarr writes each once
    assert f"zarr-python {zarr.__version__}" in caught.value.problem
    assert not (tmp_path / "s.zarr").exists()
