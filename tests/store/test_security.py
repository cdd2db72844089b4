"""A store is data from elsewhere: whatever it claims, an error, and never a hang, a crash, a file of ours or gigabytes.

Each forgery is consistent: ledger and seal are made to fit it, so that no digest stands in its way.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numcodecs import zstd

from kdcache.errors import CorruptError, KDCacheError
from kdcache.store import open_cache, verify_files
from kdcache.store.backend.durable import file_digest

LIMIT_S = 10  # of CPU time. A wait ends after 120 s
LIMIT_MIB = 300  # over what a process has that has read the store as it was

# Does with each store of a line all that a user may, in a fork that has read one as it was. Says how that ended and how
# much memory it took.
VISITS = """
import json, os, resource, signal, sys, time
from pathlib import Path
from kdcache.errors import KDCacheError
from kdcache.store import inspect_store, open_cache, open_writer, read_manifest, verify_files

def read_all(store):
    cache = open_cache(store)
    cache.check_files()
    cache.ids
    for name in ("sample", "window", "labelled"):
        cache.column(name)
    for record in (0, len(cache) // 2, len(cache) - 1):
        for path in cache.specs:
            cache.read(record, [path])

def read_lazily(store):
    cache = open_cache(store)
    for record in (len(cache) - 1, 0):
        for path in cache.specs:
            cache.read(record, [path])

def columns(store):
    cache = open_cache(store)
    cache.column("pixel_checksum")

def ids(store):
    open_cache(store).ids

def inspect(store):
    about = inspect_store(store)
    json.dumps([about.facts(), about.to_json()])

def visit(store):
    said = {}
    for action in (read_all, read_lazily, columns, ids, inspect, verify_files):
        try:
            action(store)
            said[action.__name__] = ""
        except KDCacheError as error:
            said[action.__name__] = f"{type(error).__name__} {error}"
    return said

visit(Path(sys.argv[1]))
for line in sys.stdin:
    if process := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
        continue
    signal.alarm(120)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
    said = visit(Path(line.rstrip()))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([said, (after - before) / 1024, time.process_time()]), flush=True)
    os._exit(0)
"""


class Visits:
    """Visits stores, each in a process of its own."""

    def __init__(self, whole: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-c", VISITS, str(whole)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, forged: Path) -> dict[str, str]:
        """What each action said; empty when it ended well. Fails for a crash, a long wait or much memory."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(forged, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer.startswith("["), f"it ended with {answer}"
        said, mib, seconds = json.loads(answer)
        assert self._process.stdout.readline() == "0\n"
        assert mib < LIMIT_MIB, said
        assert seconds < LIMIT_S, said
        assert "root:" not in answer
        return said

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def refused(self, forged: Path, *actions: str) -> dict[str, str]:
        """All of it, or these actions, must end with an error."""
        said = self(forged)
        for action in actions or said:
            assert said[action], (action, said)
        return said


@pytest.fixture(scope="module")
def visit(plan, tmp_path_factory) -> Iterator[Visits]:
    visits = Visits(plan().write(tmp_path_factory.mktemp("whole") / "s.zarr"))
    yield visits
    visits.close()


def manifest_of(store: Path, forger: Any, change: Any) -> Path:
    """The store with a changed manifest, resealed."""

    def edit(about: Any) -> None:
        change(about["attributes"]["kdcache"])

    forger.edit(store / "zarr.json", edit)
    return forger.reseal(store)


NAMES = ["..", "../..", "/etc", "a/b", "a\0b", "x" * 201, "", ".", ".hidden", "a\nb", "a b", "ä", "C:\\x", "-rf"]


@pytest.mark.parametrize("part", ["heads", "features"])
def test_names_are_no_paths(store, forger, part) -> None:
    """Of heads and taps, which become folders."""
    content = (store / "zarr.json").read_bytes()
    for name in NAMES:

        def rename(manifest: Any, name: str = name) -> None:
            manifest[part][name] = next(iter(manifest[part].values()))

        with pytest.raises(KDCacheError, match="malformed"):
            open_cache(manifest_of(store, forger, rename))
        (store / "zarr.json").write_bytes(content)


UNTRUE = {
    "a NaN mean": lambda m: m["teacher"].update(mean=[0.5, float("nan"), 0.5]),
    "an infinite mean": lambda m: m["teacher"].update(mean=[0.5, float("inf"), 0.5]),
    "a NaN std": lambda m: m["teacher"].update(std=[0.5, 0.5, float("nan")]),
    "a std of 0": lambda m: m["teacher"].update(std=[0.5, 0.5, 0.0]),
    "a std below 0": lambda m: m["teacher"].update(std=[0.5, -0.5, 0.5]),
    "a NaN mean of a member": lambda m: m["teacher"].update(
        members=[{"spec": "a", "weights": "b", "mean": [float("nan")] * 3, "std": [1.0] * 3, "share": 1.0}]
    ),
    "a NaN of fidelity": lambda m: m["fidelity"].update(kl_t1=float("nan")),
    "a class twice": lambda m: m["dataset"]["class_names"].__setitem__(0, m["dataset"]["class_names"][1]),
    "a class without a name": lambda m: m["dataset"]["class_names"].__setitem__(0, " "),
    "a name too few": lambda m: (m["dataset"]["class_names"].pop(), m["dataset"]["class_colours"].pop()),
    "a name too many": lambda m: (
        m["dataset"]["class_names"].append("more"),
        m["dataset"]["class_colours"].append([1, 2, 3]),
    ),
    "a colour too few": lambda m: m["dataset"]["class_colours"].pop(),
    "a colour that is none": lambda m: m["dataset"]["class_colours"].__setitem__(0, [0, 0, 256]),
}


@pytest.mark.parametrize("what", UNTRUE)
def test_a_manifest_that_cannot_be_true(store, forger, what) -> None:
    with pytest.raises(CorruptError, match="malformed"):
        open_cache(manifest_of(store, forger, UNTRUE[what]))


def test_a_probe_of_a_class_that_is_ruled_out(store, forger) -> None:
    """Such a teacher has logits of -inf."""
    open_cache(manifest_of(store, forger, lambda m: m["teacher"].update(probe=[0.5, float("-inf")])))


SIDES = [65536, 65536]
MANIFESTS = {
    "records 10^12": lambda m: (m.update(records=10**12), m["dataset"].update(samples=10**12)),
    "records 2^31": lambda m: (m.update(records=2**31), m["dataset"].update(samples=2**31)),
    "a shard per record": lambda m: (
        m.update(records=2**31),
        m["dataset"].update(samples=2**31),
        m["build"].update(shard_records=1),
    ),
    "huge shards": lambda m: (
        m.update(records=2**31),
        m["dataset"].update(samples=2**31),
        m["build"].update(shard_records=65536),
    ),
    "many views": lambda m: (
        m.update(records=10 * 4096),
        m["view"].update(views_per_sample=4096, drawn={"seed": 0, "scale": [1, 2], "flip": True}),
    ),
    "view 65536x65536": lambda m: m["view"].update(size=SIDES),
    "head 65536x65536": lambda m: m["heads"]["segmentation"].update(size=SIDES),
    "classes 65535": lambda m: m["heads"]["segmentation"].update(classes=65535, k=65535, size=SIDES),
    "channels 10^6": lambda m: m["features"]["head"].update(channels=10**6, size=SIDES),
    "channels 10^6 of one cell": lambda m: m["features"]["head"].update(channels=10**6, size=[16, 16]),
    "negative": lambda m: m.update(records=-1),
    "many heads": lambda m: m["heads"].update({f"h{i}": m["heads"]["segmentation"] for i in range(50_000)}),
    "many taps": lambda m: m["features"].update({f"t{i}": m["features"]["head"] for i in range(50_000)}),
    "long strings": lambda m: m["dataset"].update(name="x" * 10**7),
    "many libraries": lambda m: m["build"].update(libraries={str(i): "" for i in range(200_000)}),
    "a long probe": lambda m: m["teacher"].update(probe=[0.5] * 10**6),
    "no class names": lambda m: m["dataset"].update(class_names=[]),
    "other types": lambda m: m.update(records="10", view=[], heads="segmentation"),
}


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "half built"])
@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_claims_too_much(store, forger, visit, what, sealed) -> None:
    if not sealed and "records" not in what and "shard" not in what:
        pytest.skip("the seal plays no part")
    manifest_of(store, forger, MANIFESTS[what])
    if not sealed:
        (store / "complete.json").unlink()
    said = visit(store)
    if what not in ("long strings", "many libraries", "a long probe"):
        assert said["read_all"]
        assert said["read_lazily"]


QUICK = ("records 10^12", "view 65536x65536", "a shard per record", "channels 10^6", "many heads")


@pytest.mark.parametrize("what", QUICK)
def test_a_manifest_is_limited(store, forger, what) -> None:
    with pytest.raises(KDCacheError, match="malformed"):
        open_cache(manifest_of(store, forger, MANIFESTS[what]))


@pytest.mark.parametrize("name", ["samples/id_bytes", "samples/id_ends"])
@pytest.mark.parametrize("how", ["terabytes", "bomb", "unsized"])
def test_ids_that_claim_to_be_huge(store, forger, name, how) -> None:
    frame = bytes(zstd.compress(bytes(2**26)))  # zeros, in a few KB
    if how == "terabytes":
        frame = b"\x28\xb5\x2f\xfd\xe0" + (2**42).to_bytes(8, "little") + b"\x01\0\0"
    elif how == "unsized":
        frame = b"\x28\xb5\x2f\xfd\0\x18\x01\0\0"
    (store / name / "c/0").write_bytes(frame + google_crc32c.value(frame).to_bytes(4, "little"))
    cache = open_cache(forger.reseal(store))
    with pytest.raises(KDCacheError, match="samples/"):
        cache.ids  # noqa: B018


SECRET = "/etc/passwd"
KEYS = [
    "../../../../../../../etc/passwd",
    SECRET,
    "targets/../../../etc/passwd",
    "a\0b",
    "",
    ".",
    "x" * 5000,
    "/dev/zero",
]


def test_a_ledger_in_another_order(store, forger) -> None:
    """Every record is right, and stands in the place of another."""
    first, second, *rest = (json.loads(path.read_bytes()) for path in sorted((store / "ledger").iterdir()))
    forger.write_ledger(store, [second, first, *rest])
    with pytest.raises(CorruptError, match="line 0 is of shard 1"):
        open_cache(store).check_files()


def test_a_ledger_leads_nowhere_else(store, forger) -> None:
    records = [json.loads((store / f"ledger/0000000{n}.json").read_bytes()) for n in range(3)]
    for key in KEYS:
        one = {**records[0], "files": {**records[0]["files"], key: {"bytes": 1, "sha256": "0" * 64, "crc32c": ""}}}
        forger.write_ledger(store, [one, *records[1:]])
        for action in (lambda: open_cache(store).check_files(), lambda: verify_files(store)):
            with pytest.raises(KDCacheError, match="ledger"):
                action()


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
@pytest.mark.parametrize("instead", [True, False])
def test_a_ledger_lists_files_of_the_store_alone(store, forger, visit, key, instead) -> None:
    """Not even to look how large others are."""
    record = json.loads((store / "ledger/00000000.json").read_bytes())
    known = record["files"].pop("records/view/c/0") if instead else record["files"]["records/view/c/0"]
    size = Path(SECRET).stat().st_size
    record["files"][key] = {**known, "bytes": size}
    records = [record, *(json.loads((store / f"ledger/0000000{n}.json").read_bytes()) for n in (1, 2))]
    forger.write_ledger(store, records)
    said = visit.refused(store, "read_all", "verify_files", "inspect")
    assert str(store) in said["read_all"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"shard": 2**40},
        {"shard": -1},
        {"records": [0, 10**12]},
        {"records": [5, 1]},
        {"files": {}},
        {"files": []},
        {"more": 1},
    ],
    ids=str,
)
def test_a_ledger_record_that_lies(store, forger, visit, change) -> None:
    records = [json.loads((store / f"ledger/0000000{n}.json").read_bytes()) for n in range(3)]
    records[0] |= change
    forger.write_ledger(store, records)
    visit.refused(store, *(("verify_files",) if "records" in change else ("read_all", "verify_files")))


@pytest.mark.slow
@pytest.mark.parametrize("lines", [0, 2, 4, 10**6])
@pytest.mark.parametrize("claimed", [3, 2**31, 10**12])
def test_a_ledger_of_another_length(store, forger, visit, lines, claimed) -> None:
    record = json.loads((store / "ledger/00000000.json").read_bytes())
    forger.write_ledger(store, [record] * min(lines, 5), shards=claimed)
    if lines > 5:
        (store / "ledger.jsonl").write_bytes(b"\n" * lines * 30)
        forger.edit(
            store / "complete.json", lambda seal: seal.update(ledger_sha256=file_digest(store / "ledger.jsonl"))
        )
    visit.refused(store, "read_all", "verify_files")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ledger.jsonl", "zarr.json", "records/view/zarr.json", "samples/id_ends/c/0", "records/view/c/0"]
)
@pytest.mark.parametrize("size", [100 * 2**20, 3 * 2**30])
def test_a_file_that_is_much_too_large(store, forger, visit, name, size) -> None:
    """Most of it a hole, which costs whoever made it nothing."""
    os.truncate(store / name, size)
    if size < 2**30:
        forger.reseal(store)
        if name == "ledger.jsonl":
            os.truncate(store / name, size)
            forger.edit(store / "complete.json", lambda seal: seal.update(ledger_sha256=file_digest(store / name)))
    visit.refused(store, "read_all")  # a seal that was made for it is no proof against `verify`


OTHERS = ["link", "link to a folder", "pipe", "folder", "device", "nothing", "loop"]
PLACES = [
    "zarr.json",
    "complete.json",
    "ledger.jsonl",
    "samples/id_ends/c/0",
    "records/view/zarr.json",
    "records/view/c/0",
]
PLACES += ["pixels/image/c/0/0/0/0", "ledger/00000000.json", "records", "samples", "pixels/image/c", "ledger"]


@pytest.mark.slow
@pytest.mark.parametrize("what", OTHERS)
def test_no_link_is_followed_and_no_pipe_waited_for(store, tmp_path, visit, what) -> None:
    """In the place of any file, and of any folder above one. What links point to is right: to follow them would do."""
    for name in PLACES:
        path, kept = store / name, tmp_path / "kept"
        path.rename(kept)
        if what.startswith("link"):
            path.symlink_to(kept if what == "link" else "/etc")
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        elif what == "loop":
            path.symlink_to(path)
        elif what == "device":
            path.symlink_to("/dev/zero")
        action = "verify_files" if name.startswith("ledger") and name != "ledger.jsonl" else "read_all"
        said = visit(store)
        damaged = said[action] or action == "verify_files"  # which then lists it
        assert damaged, (name, said)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        kept.rename(path)
    assert not any(visit(store).values())


def values(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything below a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, child in children for path in ((*at, key), *values(child, (*at, key)))]


STRANGE = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    float("nan"),
    "",
    "..",
    "/etc/passwd",
    [],
    {},
    [[]],
    "x" * 999,
]
FUZZED = ["zarr.json", "records/view/zarr.json", "pixels/image/zarr.json", "features/stage1/zarr.json"]


@pytest.mark.filterwarnings("ignore")  # of zarr-python, at what it is given to read
@pytest.mark.parametrize("name", [*FUZZED, "complete.json", "ledger.jsonl"])
def test_fuzzed_json_is_refused_or_read_right(store, plan, forger, name) -> None:
    """Resealed after each change, so that no digest helps. Nothing but errors of ours, and no row of another shape."""
    rng, wanted, whole = random.Random(name), plan(), (store / name).read_bytes()
    for _ in range(60):
        first, _, rest = whole.partition(b"\n") if name == "ledger.jsonl" else (whole, b"", b"")
        content = json.loads(first)
        for _ in range(rng.randint(1, 2)):
            *way, last = rng.choice(values(content))
            parent = content
            for step in way:
                parent = parent[step]
            if rng.random() < 0.2:
                parent.pop(last)
            else:
                parent[last] = copy.deepcopy(rng.choice(STRANGE))
        (store / name).write_bytes(json.dumps(content).encode() + (b"\n" + rest if rest else b""))
        if name == "ledger.jsonl":
            digest = file_digest(store / name)
            forger.edit(store / "complete.json", lambda seal, digest=digest: seal.update(ledger_sha256=digest))
        elif name != "complete.json":
            forger.reseal(store)
        with contextlib.suppress(KDCacheError):
            verify_files(store)
        with contextlib.suppress(KDCacheError):
            cache = open_cache(store)
            cache.check_files()
            for path, spec in cache.specs.items():
                with contextlib.suppress(KDCacheError):
                    row = cache.read(0, [path])[path]
                    assert (row.shape, row.dtype) == (spec.shape, spec.dtype)
                    assert name.endswith("zarr.json") or np.array_equal(row, wanted.arrays[path][0])
