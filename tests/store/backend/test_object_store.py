"""A store in an object store: written, continued and read like a local one, with few requests, through faults."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr
from s3 import BUCKET, CREDENTIALS, SECRET, TOKEN

from kdcache.errors import CorruptError, IncompleteError, KDCacheError, MismatchError, StoreError
from kdcache.store import copy_store, inspect_store, open_cache, open_writer, store_exists, verify_files
from kdcache.store.backend import object_store
from kdcache.store.backend.object_store import Bucket
from kdcache.store.backend.open import open_place
from kdcache.store.format.schema import shard_key

HERE = Path(__file__).parent
VALUES = "targets/segmentation/values"
SHARD_FILE = f"{VALUES}/c/1/0/0/0"
SHARDS = 2


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    """The same number of attempts in less time."""
    short = {
        "init_backoff": object_store.timedelta(milliseconds=1),
        "max_backoff": object_store.timedelta(milliseconds=10),
    }
    monkeypatch.setattr(
        object_store,
        "RETRIES",
        {
            "max_retries": 3,
            "retry_timeout": object_store.timedelta(seconds=1),
            "backoff": {**short, "base": 2},
        },
    )
    monkeypatch.setattr(object_store, "PAUSE_SECONDS", 0.001)


@pytest.fixture(scope="module")
def small(plan):
    """Top-k without features and pixels, in two shards: few files."""
    return plan(features=False, pixels="source", records=6)


@pytest.fixture(scope="module")
def clean(small, tree, tmp_path_factory):
    """Files of a local build of `small`."""
    return tree(small.write(tmp_path_factory.mktemp("clean") / "store.zarr"))


@pytest.fixture
def built(s3, small) -> str:
    """The address of a complete store; what its build asked is not counted."""
    address = s3.address()
    small.write(address)
    s3.reset()
    return address


@pytest.fixture(scope="module")
def shared(s3_server, small, tmp_path_factory) -> tuple[str, Path]:
    """The address of a store that is not changed, and a folder with copies of all of it."""
    with pytest.MonkeyPatch.context() as patch:
        s3_server.enter(patch, tmp_path_factory.mktemp("shared"))
        address = s3_server.address()
        small.write(address)
        read_everything(open_cache(address), small)
        return address, Path(os.environ["KDCACHE_CACHE_DIR"])


@pytest.fixture
def but_for(s3, shared) -> Callable[[str], str]:
    """but_for(key): Invalid cache address of which all but one file is there as a copy."""

    def leave_out(key: str) -> str:
        address, folder = shared
        here = Path(os.environ["KDCACHE_CACHE_DIR"])
        shutil.copytree(folder, here)
        for copy in here.glob(f"mirrors/*/{key}"):
            copy.unlink()
        return address

    return leave_out


def read_one(address: str, small) -> None:
    """A record of which everything is asked for that a store has."""
    row = open_cache(address).read(5, [VALUES])[VALUES]
    np.testing.assert_array_equal(row, small.arrays[VALUES][5])


def read_everything(cache, small) -> None:
    """Every row of every array is that of the plan."""
    for record in range(len(cache)):
        rows = cache.read(record, list(cache.specs))
        for path, row in rows.items():
            np.testing.assert_array_equal(row, small.arrays[path][record], err_msg=path)


def copies() -> dict[str, bytes]:
    """Files in the mirror, by their path in the store."""
    top = Path(os.environ["KDCACHE_CACHE_DIR"]) / "mirrors"
    found = [path for path in top.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {"/".join(path.relative_to(top).parts[1:]): path.read_bytes() for path in found}


def test_objects_are_the_files_of_a_local_build(s3, small, clean, tree, tmp_path) -> None:
    address = s3.address()
    assert not store_exists(address)
    small.write(address)
    assert s3.objects(address) == clean
    assert s3.counted("PUT") == len(clean)
    assert store_exists(address)
    assert copies() == {}
    small.write(address + "/")  # again: nothing to do, but for the seal
    assert s3.objects(address) == clean


def test_a_bucket_without_prefix(s3, small, clean, monkeypatch) -> None:
    s3.make_bucket("kdcache-whole")
    small.write("s3://kdcache-whole")
    cache = open_cache("s3://kdcache-whole/")
    np.testing.assert_array_equal(cache.column("sample"), small.arrays["records/sample"])
    assert str(cache.place) == "s3://kdcache-whole"


@pytest.mark.parametrize("at", [0, 12, -23, -22, -13, -12, -2, -1])
def test_a_build_goes_on_after_any_object(s3, small, clean, monkeypatch, tmp_path, at) -> None:
    """Metadata, the first shard and its record, the second and its record, ledger, seal."""
    address = s3.address()
    put, count, last = object_store.obstore.put, 0, range(len(clean))[at]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if count == last:
            raise KeyboardInterrupt
        count += 1
        return put(*args, **kwargs)

    monkeypatch.setattr(object_store.obstore, "put", stopping)
    with pytest.raises(KeyboardInterrupt):
        small.write(address)
    monkeypatch.undo()
    s3.enter(monkeypatch, tmp_path)
    begun = "zarr.json" in s3.objects(address)
    with pytest.raises(IncompleteError if begun else StoreError):
        open_cache(address)
    small.write(address)
    assert s3.objects(address) == clean


def test_numbered_workers_build_at_once(s3, small, clean, tmp_path) -> None:
    from test_writer import BUILD, save_plan

    address = s3.address()
    code = """
    from kdcache.store import Worker
    with open_writer(sys.argv[2], manifest, ids, Worker(int(sys.argv[3]), 2)) as writer:
        for shard in writer.claimed():
            first, last = manifest.shard_range(shard)
            writer.write_shard(shard, {path: array[first:last] for path, array in arrays.items()})
            print(shard)
        writer.seal()
    """
    folder = save_plan(small, tmp_path / "plan")
    script = [sys.executable, "-c", BUILD + textwrap.dedent(code), str(folder), address]
    workers = [
        subprocess.Popen([*script, str(index)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert [out.split() for out, _ in said] == [["0"], ["1"]]
    assert s3.objects(address) == clean


def test_two_workers_of_one_number_that_agree(s3, small, clean) -> None:
    """A waste, and no harm."""
    address = s3.address()
    with open_writer(address, small.manifest, small.ids) as one, open_writer(address, small.manifest, small.ids) as two:
        for shard in range(SHARDS):
            one.write_shard(shard, small.rows(shard))
            two.write_shard(shard, small.rows(shard))
        assert one.seal()
        assert two.seal()
    assert s3.objects(address) == clean


@pytest.mark.parametrize("sealed", [False, True])
def test_two_workers_of_one_number_that_differ(s3, plan, small, clean, sealed) -> None:
    """The second is refused, and its shard is nobody's."""
    address = s3.address()
    other = plan(features=False, pixels="source", records=6, seed=1)
    with open_writer(address, small.manifest, small.ids) as one, open_writer(address, small.manifest, small.ids) as two:
        one.write_shard(1, small.rows(1))
        if sealed:
            one.write_shard(0, small.rows(0))
            assert one.seal()
        with pytest.raises(StoreError, match="Two workers wrote") as caught:
            two.write_shard(1, other.rows(1))
        assert address in caught.value.problem
        assert "--worker I/N" in caught.value.fix
        if not sealed:
            one.write_shard(0, small.rows(0))
            assert not one.seal()
    with pytest.raises(IncompleteError):
        open_cache(address)
    small.write(address)
    assert s3.objects(address) == clean


def test_many_begin_at_once(s3, small, clean) -> None:
    from concurrent.futures import ThreadPoolExecutor

    address = s3.address()
    with ThreadPoolExecutor(4) as pool:
        writers = list(pool.map(lambda _: open_writer(address, small.manifest, small.ids), range(4)))
    assert [writer.missing for writer in writers] == [[0, 1]] * 4
    small.write(address)
    assert s3.objects(address) == clean


@pytest.mark.parametrize("key", ["thesis.tex", "targets/thesis.tex", "records/zarr.json"])
def test_an_out_that_holds_something_else_is_untouched(s3, small, key) -> None:
    address = s3.address()
    s3.put(address, key, b"thesis")
    with pytest.raises(StoreError, match="is not part of it") as caught:
        small.write(address)
    assert f"{address}/{key}" in caught.value.problem
    assert s3.objects(address) == {key: b"thesis"}


def test_another_build_is_refused(s3, small, built) -> None:
    before = s3.objects(built)
    with pytest.raises(MismatchError, match=r"differs in teacher\.weights") as caught:
        small.changed(teacher={"weights": "2" * 64}).write(built)
    assert built in caught.value.problem
    assert s3.objects(built) == before


def test_everything_reads_as_from_a_disk(s3, small, built) -> None:
    cache = open_cache(built)
    assert cache.remote
    assert cache.place.room > 2**20
    assert cache.ids == tuple(small.ids)
    cache.check_files()
    read_everything(cache, small)
    np.testing.assert_array_equal(cache.column("labelled"), small.arrays["records/labelled"])
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again.read(5, [VALUES])[VALUES], small.arrays[VALUES][5])
    report = verify_files(built)
    assert report.damaged == []
    summary = inspect_store(built)
    assert (summary.complete, summary.path, summary.records_written) == (True, built, 6)


def test_few_requests(s3, small, clean, built) -> None:
    """A whole epoch costs one GET per file; opening again two."""
    metadata = [key for key in clean if key.endswith("zarr.json") or key.startswith("samples/")]
    cache = open_cache(built)
    # zarr.json is read to know what to ask for, and then by its digest.
    assert (s3.counted(), s3.counted("GET")) == (len(metadata) + 2, len(metadata) + 2)
    s3.reset()
    for _ in range(2):
        read_everything(cache, small)
    files = [shard_key(spec, shard) for spec in cache.specs.values() for shard in range(SHARDS)]
    asked = sorted(request.key.partition("store.zarr/")[2] for request in s3.requests)
    assert asked == sorted([*files, "ledger.jsonl"])
    s3.reset()
    cache = open_cache(built)
    read_everything(cache, small)
    assert [(request.method, request.key.rpartition("/")[2]) for request in s3.requests] == [
        ("GET", "zarr.json"),
        ("GET", "complete.json"),
    ]
    s3.reset()
    cache.check_files()
    assert [request for request in s3.requests if request.key] == []
    assert len(s3.requests) == 1  # a listing


@pytest.mark.parametrize("kind", ["500", "503", "429", "slow", "drip", "cut", "long"])
@pytest.mark.parametrize("key", ["zarr.json", SHARD_FILE])
def test_a_fault_that_passes_is_not_noticed(s3, small, but_for, kind, key) -> None:
    address = but_for(key)
    fault = s3.fail(kind, f"store.zarr/{key}", times=2)
    read_one(address, small)
    assert fault.times == 0 or kind in ("slow", "drip")


@pytest.mark.parametrize("kind", ["short", "flip"])
@pytest.mark.parametrize("key", ["ledger.jsonl", f"{VALUES}/zarr.json", SHARD_FILE])
def test_wrong_bytes_are_fetched_again(s3, small, but_for, kind, key) -> None:
    address = but_for(key)
    fault = s3.fail(kind, key, times=2)
    read_one(address, small)
    assert fault.times == 0
    assert s3.counted("GET", key) == 3


@pytest.mark.parametrize("kind", ["flip", "noise", "short"])
def test_a_healthy_store_is_never_accused(s3, small, built, kind) -> None:
    """Three wrong answers for every file that is asked for, whatever way it is read."""
    keys = s3.objects(built)
    faults = [s3.fail(kind, f"store.zarr/{key}", times=3) for key in keys]
    cache = open_cache(built)
    read_everything(cache, small)
    assert verify_files(built).damaged == []
    assert [fault.key for fault in faults if fault.times] == []
    small.write(built)
    assert s3.objects(built) == keys


def test_a_store_is_sealed_with_the_digests_of_what_it_has(s3, small, clean) -> None:
    """Which are taken of files as they arrive."""
    address = s3.address()
    for key in clean:
        s3.fail("flip", f"store.zarr/{key}", times=2)
    small.write(address)
    assert s3.objects(address) == clean


@pytest.mark.parametrize("key", ["zarr.json", "complete.json", "ledger.jsonl", f"{VALUES}/zarr.json", SHARD_FILE])
def test_noise_that_stays_is_no_damage(s3, small, but_for, key) -> None:
    address = but_for(key)
    s3.fail("noise", f"store.zarr/{key}", times=10_000)
    with pytest.raises(StoreError, match="fetches gave different bytes") as caught:
        read_one(address, small)
    assert type(caught.value) is StoreError
    assert f"{address}/{key}" in str(caught.value)
    assert "elete" not in str(caught.value)


def test_one_answer_of_another_size_is_no_damage(s3, small, built, tmp_path) -> None:
    """The last of the fetches names more bytes than the file may have, and those before it were spoilt."""
    s3.fail("noise", f"store.zarr/{SHARD_FILE}", times=4)
    s3.fail("long", f"store.zarr/{SHARD_FILE}", times=10_000)
    with pytest.raises(StoreError, match="fetches gave different bytes") as caught:
        copy_store(open_cache(built), tmp_path / "copy")
    assert f"{built}/{SHARD_FILE}" in str(caught.value)
    assert "elete" not in str(caught.value)


def test_an_etag_may_be_no_digest(s3, small, clean) -> None:
    """Then bytes count that arrive twice, and damage is still found."""
    s3.fail("kms", times=100_000)
    address = s3.address()
    small.write(address)
    assert s3.objects(address) == clean
    read_everything(open_cache(address), small)
    assert verify_files(address).damaged == []
    s3.put(address, SHARD_FILE, clean[SHARD_FILE][::-1])
    assert verify_files(address).damaged == [SHARD_FILE]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_a_busy_server_is_asked_until_the_time_is_over(s3, small, clean, method, monkeypatch) -> None:
    """More often than obstore itself asks."""
    monkeypatch.setitem(object_store.RETRIES, "retry_timeout", object_store.timedelta(seconds=120))
    address = s3.address()
    fault = s3.fail("503", times=20, method=method)
    small.write(address)
    read_one(address, small)
    assert fault.times == 0
    assert s3.objects(address) == clean


@pytest.mark.parametrize("kind", ["500", "503"])
def test_a_build_lives_through_faults(s3, small, clean, kind) -> None:
    address = s3.address()
    faults = [s3.fail(kind, key, times=2, method="PUT") for key in ("zarr.json", SHARD_FILE, "00000001.json")]
    faults += [s3.fail(kind, "", times=2, method="GET"), s3.fail(kind, "", times=1, method="HEAD")]
    small.write(address)
    assert [fault.times for fault in faults] == [0] * 5
    assert s3.objects(address) == clean


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((kind, SHARD_FILE) for kind in ("500", "cut", "long", "short", "flip", "404", "403")),
        *((kind, "zarr.json") for kind in ("503", "cut", "short", "404")),
        *((kind, "complete.json") for kind in ("500", "cut", "short")),
        *((kind, "ledger.jsonl") for kind in ("404", "flip")),
        *((kind, f"{VALUES}/zarr.json") for kind in ("500", "short", "flip")),
    ],
)
def test_a_fault_that_stays_has_an_address_and_a_remedy(s3, small, but_for, kind, key) -> None:
    address = but_for(key)
    s3.fail(kind, f"store.zarr/{key}", times=10_000)
    with pytest.raises(KDCacheError) as caught:
        read_one(address, small)
    assert address in caught.value.problem
    assert caught.value.fix
    assert "mirrors" not in str(caught.value)
    assert not [name for name in copies() if name.endswith(".partial")]
    assert key not in copies() or key == "zarr.json"
    s3.reset()
    read_one(address, small)


def test_an_answer_that_never_comes(s3, shared, monkeypatch) -> None:
    monkeypatch.setattr(object_store, "CLIENT", {**object_store.CLIENT, "read_timeout": "100ms"})
    monkeypatch.setattr(object_store, "RETRIES", {**object_store.RETRIES, "max_retries": 1})
    s3.fail("slow", "zarr.json", times=10, seconds=0.5)
    with pytest.raises(StoreError, match="Cannot reach") as caught:
        open_cache(shared[0])
    assert shared[0] in caught.value.problem


@pytest.mark.parametrize("what", ["missing", "other bytes", "another length"])
def test_an_object_that_is_not_what_was_written(s3, small, built, what) -> None:
    content = s3.objects(built)[SHARD_FILE]
    changed = {"missing": None, "other bytes": bytes([content[0] ^ 1]) + content[1:], "another length": content[:-1]}
    s3.put(built, SHARD_FILE, changed[what])
    cache = open_cache(built)
    with pytest.raises(CorruptError) as caught:
        cache.read(5, [VALUES])
    assert f"{built}/{SHARD_FILE}" in caught.value.problem
    assert "Delete it" in caught.value.fix
    np.testing.assert_array_equal(cache.read(3, [VALUES])[VALUES], small.arrays[VALUES][3])
    assert verify_files(built).damaged == [SHARD_FILE]
    s3.put(built, SHARD_FILE, None)  # as the remedy says
    with pytest.raises(CorruptError, match="missing"):
        cache.check_files()
    small.write(built)
    assert verify_files(built).damaged == []
    read_everything(cache, small)


def test_changed_metadata_is_refused(s3, small, built) -> None:
    s3.put(built, f"{VALUES}/zarr.json", b"{}")
    with pytest.raises(CorruptError) as caught:
        open_cache(built)
    assert f"{built}/{VALUES}/zarr.json" in caught.value.problem
    small.write(built)
    read_everything(open_cache(built), small)


def test_verify_looks_at_the_files_and_not_at_copies(s3, small, built) -> None:
    read_everything(open_cache(built), small)
    s3.put(built, f"{VALUES}/zarr.json", b"{}")
    with pytest.raises(CorruptError):
        verify_files(built)


def test_nothing_stays_of_a_longer_body_that_was_refused(s3, monkeypatch) -> None:
    """The object is put right between two attempts."""
    address, content = s3.address(), b"what was written"
    s3.put(address, "key", content + b", and more")
    clock = SimpleNamespace(sleep=lambda _: s3.put(address, "key", content), monotonic=time.monotonic)
    monkeypatch.setattr(object_store, "time", clock)
    place = open_place(address)
    for size in (len(content), None):
        s3.put(address, "key", content + b", and more")
        handle = place.open("key", size, hashlib.sha256(content).hexdigest())
        assert os.pread(handle, 100, 0) == content
        os.close(handle)
        assert place.forget("key")


def test_a_digest_is_of_the_whole_object(s3, monkeypatch) -> None:
    """Which arrives in pieces."""
    monkeypatch.setattr(object_store, "CHUNK_BYTES", 2**14)
    address, content = s3.address(), np.random.default_rng(0).bytes(10 * 2**14 + 7)
    s3.put(address, "long", content)
    assert open_place(address).digest("long") == hashlib.sha256(content).hexdigest()
    assert open_place(address).digest("none") is None


def test_a_place_where_nothing_is(s3) -> None:
    address = s3.address()
    with pytest.raises(StoreError, match=r"Cache not found: \S+zarr\.json") as caught:
        open_cache(address)
    assert address in caught.value.problem


@pytest.mark.parametrize("how", ["read", "write"])
def test_a_bucket_that_is_not_there(s3, small, how) -> None:
    with pytest.raises(StoreError, match="NoSuchBucket") as caught:
        open_cache("s3://kdcache-nowhere/x") if how == "read" else small.write("s3://kdcache-nowhere/x")
    assert "s3://kdcache-nowhere/x" in caught.value.problem
    assert "name of the bucket" in caught.value.fix


def test_nobody_listens(s3, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="Cannot reach") as caught:
        open_cache("s3://kdcache-test/x")
    assert "127.0.0.1:9" in caught.value.problem
    assert "network" in caught.value.fix


def test_no_credentials(s3, monkeypatch) -> None:
    """Without any in the environment the machine's own role is asked for, and there is none."""
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError) as caught:
        open_cache("s3://kdcache-test/x")
    assert "AWS_ACCESS_KEY_ID" in caught.value.fix


def test_azure_without_an_account(monkeypatch) -> None:
    with pytest.raises(StoreError, match="Account must be specified"):
        open_cache("az://container/x")


@pytest.mark.parametrize(
    "address",
    [
        "s3://",
        "s3:///x",
        "ftp://host/x",
        "s3://key:secret@bucket/x",
        "s3://bucket/x?versionId=secret",
        "http://host/x#a",
    ],
)
def test_addresses_that_are_none(address) -> None:
    with pytest.raises(StoreError, match="Invalid cache address") as caught:
        open_cache(address)
    assert "secret" not in str(caught.value)
    assert "environment" in caught.value.fix


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
def test_no_secret_in_a_message(s3, small, method) -> None:
    """A server that refuses a signature may repeat what was signed: the token, too."""
    s3.fail("echo", method=method, times=100)
    with pytest.raises(StoreError) as caught:
        small.write(s3.address())
    told, error = [], caught.value
    while error is not None:
        told.append(repr(error) + str(error))
        error = None if error.__suppress_context__ else error.__context__
    assert not [text for text in told if SECRET in text or TOKEN in text or "Credential" in text]
    assert method == "HEAD" or "SignatureDoesNotMatch" in told[0]
    assert not [text for text in map(repr, (caught.value, Bucket)) if SECRET in text]


def test_a_forked_process_says_so(s3, shared) -> None:
    """It would wait for threads that it does not have."""
    cache = open_cache(shared[0])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            cache.read(0, [VALUES])
        except StoreError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    assert b"forkserver or spawn" in os.read(reading, 4096)
    os.close(reading)


def test_other_libraries_read_the_bucket(s3, small, shared) -> None:
    address = shared[0]
    import tensorstore
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    store = ObjectStore(from_url(address, client_options={"allow_http": True}), read_only=True)
    group = zarr.open_group(store, mode="r")
    for path, expected in small.arrays.items():
        np.testing.assert_array_equal(group[path][:], expected)
    spec = {
        "driver": "zarr3",
        "kvstore": {
            "driver": "s3",
            "bucket": BUCKET,
            "path": f"{address.removeprefix(f's3://{BUCKET}/')}/{VALUES}/",
            "endpoint": os.environ["AWS_ENDPOINT_URL"],
            "aws_region": "us-east-1",
            "aws_credentials": {"type": "environment"},
        },
    }
    array = tensorstore.open(spec, read=True).result()
    np.testing.assert_array_equal(array[...].read().result(), small.arrays[VALUES])


def test_without_obstore_there_is_a_remedy(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "kdcache.store.backend.object_store")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match="Cannot import obstore") as caught:
        open_cache("s3://bucket/x")
    assert "pip install '.[remote]'" in caught.value.fix
