"""Direct reads of shards: what every Zarr library reads, or a refusal that names the file; never another record."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import blosc, zstd
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec

from kdcache.errors import CorruptError, KDCacheError, StoreError, VersionError
from kdcache.store.format import shard
from kdcache.store.format.shard import ShardArray

COMPRESSORS = {
    "none": (),
    "lz4": (BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),),
    "blosc zstd": (BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),),
    "zstd": (ZstdCodec(level=1),),
}
DTYPES = ["bool", "uint8", "int8", "uint16", "float16", "int32", "float32", "uint64", "float64"]


@dataclass(frozen=True)
class Case:
    """A kind of array, filled with values that compress a little."""

    records: int = 11
    inner: tuple[int, ...] = (3, 4, 5)
    dtype: str = "float16"
    chunk_rows: int = 1
    shard_chunks: int = 4
    compressor: str = "lz4"
    crc: bool = True
    index: str = "end"

    def values(self) -> np.ndarray[Any, Any]:
        rng = np.random.default_rng(self.records)
        return rng.integers(0, 9, (self.records, *self.inner)).astype(self.dtype)

    def write(self, path: Path, **options: Any) -> Path:
        shards = (self.chunk_rows * self.shard_chunks, *self.inner)
        chosen = {
            "chunks": (self.chunk_rows, *self.inner),
            "shards": {"shape": shards, "index_location": self.index},
            "compressors": (*COMPRESSORS[self.compressor], *([Crc32cCodec()] if self.crc else [])),
            "filters": None,
            "fill_value": 0,
            "config": {"write_empty_chunks": True},
        } | options
        values = self.values()
        zarr.create_array(path, shape=values.shape, dtype=values.dtype, **chosen)[...] = values
        return path

    def file(self, path: Path, number: int = 0) -> Path:
        return path.joinpath("c", str(number), *["0"] * len(self.inner))


CASES = st.builds(
    Case,
    records=st.integers(1, 13),
    inner=st.lists(st.integers(1, 6), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    chunk_rows=st.integers(1, 4),
    shard_chunks=st.integers(1, 5),
    compressor=st.sampled_from(list(COMPRESSORS)),
    crc=st.booleans(),
    index=st.sampled_from(["start", "end"]),
)


def read(array: ShardArray, record: int) -> np.ndarray[Any, Any]:
    out = np.full(array.shape[1:], 77, array.dtype)
    array.read_into(record, out)
    return out


def refused(path: Path, action) -> None:
    """As damage, naming the file."""
    with pytest.raises(KDCacheError) as caught:
        action()
    assert type(caught.value) is CorruptError, caught.value
    assert str(path) in caught.value.problem
    assert caught.value.fix


def by_zarr(path: Path) -> Any:
    return zarr.open_array(path, mode="r")[...]


def by_zarrs(path: Path) -> Any:
    pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return zarr.open_array(path, mode="r")[...]


def by_tensorstore(path: Path) -> Any:
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return tensorstore.open(spec, read=True).result().read().result()


@pytest.mark.parametrize("reader", [by_zarr, by_zarrs, by_tensorstore])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=CASES, seed=st.integers(0, 2**16))
def test_every_library_reads_the_same_bits(reader, tmp_path_factory, case, seed) -> None:
    path = case.write(tmp_path_factory.mktemp("same") / "a")
    array, wanted = ShardArray(path), np.asarray(reader(path))
    assert (len(array), array.shape, array.dtype) == (case.records, wanted.shape, wanted.dtype)
    for record in random.Random(seed).choices(range(case.records), k=8):
        assert read(array, record).tobytes() == wanted[record].tobytes(), record
    assert array.read_all().tobytes() == wanted.tobytes() == case.values().tobytes()


@pytest.mark.parametrize("compressor", ["blosc", "zstd"])
@pytest.mark.parametrize("index", ["start", "end"])
def test_what_tensorstore_writes(tmp_path, compressor, index) -> None:
    """Read as it is, or refused (its zstd frames may not say how much they hold)."""
    tensorstore = pytest.importorskip("tensorstore")
    wanted = Case().values()
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [1, 3, 4, 5],
        "codecs": [little, {"name": compressor}, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": index,
    }
    metadata = {
        "shape": wanted.shape,
        "data_type": "float16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 3, 4, 5]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path / 'a'}/"}, "metadata": metadata}
    tensorstore.open(spec, create=True).result()[...] = wanted
    array = ShardArray(tmp_path / "a")
    for record in range(len(wanted)):
        try:
            assert np.array_equal(read(array, record), wanted[record])
        except VersionError:
            assert compressor == "zstd"


def test_a_buffer_that_does_not_fit_is_refused(tmp_path) -> None:
    array = ShardArray(Case().write(tmp_path / "a"))
    locked = np.empty((3, 4, 5), np.float16)
    locked.flags.writeable = False
    for out in (
        np.empty((3, 4, 6), np.float16),
        np.empty(60, np.float16),
        np.empty((3, 4, 5), np.int16),
        np.empty((3, 4, 5), ">f2"),
        np.empty((5, 4, 3), np.float16).T,
        np.empty((3, 4, 10), np.float16)[..., ::2],
        locked,
    ):
        with pytest.raises(StoreError, match="C-contiguous") as caught:
            array.read_into(0, out)
        assert type(caught.value) is StoreError
    for record in (-1, 11, 2**70):
        with pytest.raises(IndexError):
            read(array, record)


# Damage


@pytest.fixture(scope="module", params=[*COMPRESSORS, "rows"])
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """An array of each chain, to be damaged and mended."""
    case = Case(chunk_rows=2) if request.param == "rows" else Case(compressor=request.param)
    return case, case.write(tmp_path_factory.mktemp("damaged") / "a")


def never_wrong(case: Case, path: Path, file: Path) -> int:
    """Every record of the first shard is right or refused. Returns how many are refused, by the file's name."""
    wanted, count = case.values(), 0
    try:
        array = ShardArray(path)
        for record in range(case.chunk_rows * case.shard_chunks):
            try:
                assert read(array, record).tobytes() == wanted[record].tobytes()
            except CorruptError as error:
                count += str(file) in error.problem
    finally:
        assert np.array_equal(read(ShardArray(path), case.records - 1), wanted[-1])
    return count


def test_a_flipped_byte_is_never_read(damaged) -> None:
    case, path = damaged
    file = case.file(path)
    whole, rng = file.read_bytes(), random.Random(0)
    for position in [*rng.sample(range(len(whole)), 120), *range(len(whole) - 68, len(whole), 3)]:
        content = bytearray(whole)
        content[position] ^= rng.randrange(1, 256)
        file.write_bytes(content)
        assert never_wrong(case, path, file) >= 1, position  # each byte is in a chunk or in the index
    file.write_bytes(whole)
    assert never_wrong(case, path, file) == 0


def test_a_truncated_shard_is_refused(damaged) -> None:
    case, path = damaged
    file = case.file(path)
    whole = file.read_bytes()
    for length in [0, 1, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 40)]:
        file.write_bytes(whole[:length])
        refused(file, lambda: read(ShardArray(path), 0))
    file.write_bytes(whole + b"\0")
    refused(file, lambda: read(ShardArray(path), 0))
    file.write_bytes(whole)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["nothing", "zeros", "ones", "a link", "a dead link", "a pipe", "a folder", "a file"])
def test_something_else_in_the_place_of_a_shard(tmp_path, what) -> None:
    case = Case()
    path = case.write(tmp_path / "a")
    file = case.file(path)
    size = file.stat().st_size
    file.rename(tmp_path / "moved")
    if what in ("zeros", "ones"):
        file.write_bytes((b"\0" if what == "zeros" else b"\xff") * size)
    elif what in ("a link", "a dead link"):
        file.symlink_to(tmp_path / ("moved" if what == "a link" else "nowhere"))
    elif what == "a pipe":
        os.mkfifo(file)
    elif what == "a folder":
        file.mkdir()
    elif what == "a file":  # where a folder was
        file.parent.rmdir()
        file.parent.touch()
    array = ShardArray(path)
    refused(file, lambda: read(array, 0))
    refused(file, array.read_all)
    assert np.array_equal(read(array, 4), case.values()[4]), "another shard is as it was"


@pytest.mark.parametrize("chunk_rows", [1, 2])
@pytest.mark.parametrize("record", [0, 10])
def test_an_empty_chunk_is_no_record_of_zeros(tmp_path, chunk_rows, record) -> None:
    """Nor is the last, which is cut short when it holds two."""
    case = Case(chunk_rows=chunk_rows)
    path = case.write(tmp_path / "a")
    zarr.open_array(path, mode="r+", config={"write_empty_chunks": False})[record : record + chunk_rows] = 0
    assert not by_zarr(path)[record].any(), "zarr-python gives zeros"
    number, chunk = divmod(record // chunk_rows, 4)
    with pytest.raises(CorruptError, match=f"chunk {chunk} was never written") as caught:
        read(ShardArray(path), record)
    assert str(case.file(path, number)) in caught.value.problem


def by_hand(path: Path, chunks: list[bytes], compressor: str, values: np.ndarray[Any, Any]) -> Path:
    """An array of one shard with these chunks, their checksums right."""
    case = Case(records=len(chunks), shard_chunks=len(chunks), compressor=compressor)
    case.write(path)
    content, index = b"", []
    for chunk in chunks:
        sealed = chunk + google_crc32c.value(chunk).to_bytes(4, "little")
        index += [len(content), len(sealed)]
        content += sealed
    tail = np.array(index, "<u8").tobytes()
    case.file(path).write_bytes(content + tail + google_crc32c.value(tail).to_bytes(4, "little"))
    return path


def frame(payload: bytes) -> bytes:
    """A zstd frame of one raw block that does not say how much it holds."""
    return b"\x28\xb5\x2f\xfd\0\0" + (len(payload) << 3 | 1).to_bytes(3, "little") + payload


def test_a_chunk_that_holds_something_else(tmp_path) -> None:
    """Its checksum is right; what it holds is too long, too short or no such thing."""
    values = Case(records=2).values()
    good = {"lz4": bytes(blosc.compress(values[0], b"lz4", 5, 1)), "zstd": bytes(zstd.compress(values[0], 1))}
    long = {"lz4": bytes(blosc.compress(values, b"lz4", 5, 1)), "zstd": bytes(zstd.compress(values, 1))}
    short = {"lz4": bytes(blosc.compress(values[0, 0], b"lz4", 5, 1)), "zstd": bytes(zstd.compress(values[0, 0], 1))}
    for name in ("lz4", "zstd"):
        lie = bytearray(short[name])
        lie[4:8] = (120).to_bytes(4, "little")  # blosc: bytes decoded
        for number, chunk in enumerate([long[name], short[name], bytes(lie), good[name][:-1], b"\0" * 20, b"x"]):
            path = by_hand(tmp_path / f"{name}{number}", [chunk, good[name]], name, values)
            array = ShardArray(path)
            refused(Case().file(path), lambda array=array: read(array, 0))
            assert np.array_equal(read(array, 1), values[0])


@pytest.mark.parametrize("entry", [(2**63, 100), (2**64 - 1, 100), (0, 2**40), (0, 2**64 - 1), (0, 0), (10**6, 100)])
def test_an_index_that_lies(tmp_path, entry) -> None:
    """Its checksum is right."""
    case = Case()
    file = case.file(case.write(tmp_path / "a"))
    whole = file.read_bytes()
    index = np.array(entry, "<u8").tobytes() + whole[-52:-4]
    file.write_bytes(whole[:-68] + index + google_crc32c.value(index).to_bytes(4, "little"))
    refused(file, lambda: read(ShardArray(tmp_path / "a"), 0))


def test_a_frame_of_unknown_size_is_left_to_zarr(tmp_path) -> None:
    values = Case(records=2).values()
    path = by_hand(tmp_path / "a", [frame(row.tobytes()) for row in values], "zstd", values)
    assert np.array_equal(by_zarr(path), values)
    with pytest.raises(VersionError, match=r"chunk 1 of .*does not give its size"):
        read(ShardArray(path), 1)


def test_decoders_survive_what_no_checksum_guards(tmp_path) -> None:
    for name in ("lz4", "blosc zstd", "zstd"):
        case = Case(compressor=name, crc=False, inner=(40, 40))
        path = case.write(tmp_path / name)
        file, rng = case.file(path), random.Random(1)
        whole = file.read_bytes()
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                content[rng.randrange(len(whole) - 68 if rng.random() < 0.5 else 40)] ^= rng.randrange(1, 256)
            file.write_bytes(content)
            with contextlib.suppress(CorruptError, VersionError):
                assert read(ShardArray(path), 0).shape == (40, 40)


@pytest.mark.parametrize("compressor", ["none", "lz4", "zstd"])
def test_every_read_is_checked(tmp_path, compressor) -> None:
    """A bit that flips in a chunk that was read before, through the open file, and back again."""
    case = Case(compressor=compressor)
    path = case.write(tmp_path / "a")
    file, wanted, array = case.file(path), case.values(), ShardArray(path)
    assert np.array_equal(read(array, 0), wanted[0])
    offset, size = struct.unpack_from("<QQ", array.shards[0].index)
    for at in (0, size // 2, size - 1):
        for _ in range(2):
            flip(file, offset + at)
            refused(file, lambda: read(array, 0))
            flip(file, offset + at)
            assert np.array_equal(read(array, 0), wanted[0])


def flip(file: Path, at: int) -> None:
    """One bit, in place: who has the file open sees it."""
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 4]))


def test_a_shard_that_changes_under_an_open_array(tmp_path) -> None:
    """What is open stays what it was; another file is looked at anew, and so is one that was shortened."""
    case = Case(compressor="none")  # nothing but the checksum would notice
    path = case.write(tmp_path / "a")
    file, wanted, array = case.file(path), case.values(), ShardArray(path)
    assert np.array_equal(read(array, 0), wanted[0])
    whole = file.read_bytes()
    (tmp_path / "new").write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    (tmp_path / "new").rename(file)
    assert np.array_equal(read(array, 0), wanted[0]), "what is open stays what it was"
    array.shards[0].file = None
    refused(file, lambda: read(array, 0))
    file.write_bytes(whole)
    for length in (100, 1, 0):  # of the first chunk's 120 bytes
        array.shards[0].file = None
        file.write_bytes(whole)
        assert np.array_equal(read(array, 0), wanted[0])
        os.truncate(file, length)
        refused(file, lambda: read(array, 0))


@pytest.mark.parametrize("how", ["in place", "in its place, of the same age"])
def test_a_shard_whose_chunks_lie_elsewhere_now(tmp_path, how) -> None:
    """As long as before, and whole in itself: where its chunks lie is looked up anew, or record 0 would be record 1."""
    case = Case(compressor="none")
    path = case.write(tmp_path / "a")
    file, wanted, array = case.file(path), case.values(), ShardArray(path)
    assert np.array_equal(read(array, 0), wanted[0])
    content, size = bytearray(file.read_bytes()), wanted[0].nbytes + 4
    at = len(content) - 16 * case.shard_chunks - 4
    content[: 2 * size] = content[size : 2 * size] + content[:size]
    content[at : at + 32] = content[at + 16 : at + 32] + content[at : at + 16]
    content[-4:] = google_crc32c.value(bytes(content[at:-4])).to_bytes(4, "little")
    array.shards[0].file = None  # as when many others were opened since
    status = file.stat()
    if how == "in place":
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        (tmp_path / "new").write_bytes(content)
        os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        (tmp_path / "new").rename(file)
    for record in (0, 1, 2):
        assert np.array_equal(read(array, record), wanted[record]), record


# Metadata


def change(path: Path, *way: Any, value: Any) -> None:
    about = part = json.loads((path / "zarr.json").read_bytes())
    for step in way[:-1]:
        part = part[step]
    part[way[-1]] = value
    (path / "zarr.json").write_text(json.dumps(about))


INNER = ("codecs", 0, "configuration")
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
BIG = {"name": "bytes", "configuration": {"endian": "big"}}
CRC = {"name": "crc32c"}


@pytest.mark.parametrize(
    ("way", "value"),
    [
        ((*INNER, "codecs"), [LITTLE, {"name": "gzip", "configuration": {"level": 1}}, CRC]),
        ((*INNER, "codecs"), [LITTLE, CRC, {"name": "zstd", "configuration": {"level": 1}}]),
        ((*INNER, "codecs"), [{"name": "transpose", "configuration": {"order": [0, 2, 1, 3]}}, LITTLE]),
        ((*INNER, "codecs"), [BIG, CRC]),
        ((*INNER, "codecs"), [{"name": "bytes"}, CRC]),
        ((*INNER, "codecs"), [CRC]),
        ((*INNER, "codecs"), []),
        ((*INNER, "codecs", 1, "configuration", "new"), 1),
        ((*INNER, "index_codecs"), [LITTLE]),
        ((*INNER, "index_codecs"), [BIG, CRC]),
        ((*INNER, "index_location"), "middle"),
        ((*INNER, "chunk_shape"), [1, 3, 4, 1]),
        ((*INNER, "chunk_shape"), [3, 3, 4, 5]),
        (("codecs",), [LITTLE]),
        (("codecs", 0, "must_understand"), False),
        (("data_type",), "complex64"),
        (("data_type",), {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}}),
        (("chunk_grid", "name"), "rectangular"),
        (("chunk_key_encoding", "name"), "v2"),
        (("storage_transformers",), [{"name": "other"}]),
        (("zarr_format",), 2),
        (("node_type",), "group"),
        (("unknown",), 1),
        (("shape",), [2**40, 3, 4, 5]),
        (("chunk_grid", "configuration", "chunk_shape"), [2**17, 3, 4, 5]),
    ],
)
def test_another_kind_of_array_is_refused(tmp_path, way, value) -> None:
    path = Case().write(tmp_path / "a")
    change(path, *way, value=value)
    with pytest.raises(VersionError, match="Cannot read the array") as caught:
        ShardArray(path)
    assert str(path / "zarr.json") in caught.value.problem


def test_arrays_that_zarr_makes_otherwise(tmp_path) -> None:
    for number, options in enumerate(
        [
            {"compressors": GzipCodec()},
            {"filters": TransposeCodec(order=(0, 3, 2, 1))},
            {"shards": None},
            {"chunks": (1, 3, 2, 5), "shards": (4, 3, 4, 5)},
            {"chunks": (1, 3, 2, 5), "shards": (4, 3, 2, 5)},
            {"zarr_format": 2, "shards": None, "compressors": None},
        ]
    ):
        path = Case().write(tmp_path / str(number), **options)
        with pytest.raises(CorruptError if "zarr_format" in options else VersionError):
            ShardArray(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b" " * 2**21, b"1" * 5000, "link", "pipe"])
def test_metadata_that_is_none(tmp_path, content) -> None:
    file = Case().write(tmp_path / "a") / "zarr.json"
    file.rename(tmp_path / "moved")
    refused(file, lambda: ShardArray(tmp_path / "a"))
    if content == "link":
        file.symlink_to(tmp_path / "moved")
    elif content == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(content)
    refused(file, lambda: ShardArray(tmp_path / "a"))


def test_metadata_that_is_nested_deeply(tmp_path) -> None:
    """What json still reads may be too deep to be printed."""
    path = Case().write(tmp_path / "a")
    whole = (path / "zarr.json").read_text().replace('"codecs": [', '"codecs": %s, "attributes": [', 1)
    for depth in range(700, 1000, 3):
        (path / "zarr.json").write_text(whole.replace("%s", "[" * depth + "]" * depth))
        with pytest.raises((CorruptError, VersionError)):
            ShardArray(path)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([2**31, 2**63, 10**30, "start", ".", "float32", "crc32c", "bytes", "zstd", "../..", "/etc"]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 5), max_size=5),
    st.dictionaries(st.sampled_from(["name", "configuration", "a"]), st.sampled_from(["bytes", 1, {}]), max_size=2),
)


def places(value: Any, at: tuple[Any, ...] = ()):
    """Paths of everything below a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Case().write(tmp_path_factory.mktemp("fuzz") / "a")


@settings(max_examples=400, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_metadata_is_refused_or_means_the_same(fuzzed, data) -> None:
    file = fuzzed / "zarr.json"
    whole = file.read_bytes()
    about = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(sorted(places(about), key=repr)))
        parent = about
        for step in way:
            parent = parent[step]
        what = data.draw(st.sampled_from(["replace", "delete", "copy"]))
        if what == "replace":
            parent[last] = data.draw(VALUES)
        elif what == "delete":
            parent.pop(last)
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        else:
            parent[data.draw(st.text(max_size=3))] = copy.deepcopy(parent[last])
    file.write_text(json.dumps(about))
    try:
        array = ShardArray(fuzzed)
        for record in range(min(4, len(array))):
            assert read(array, record).tobytes() == Case().values()[record].tobytes()
    except (VersionError, CorruptError) as error:
        named = str(fuzzed) in error.problem
        assert named
    finally:
        file.write_bytes(whole)


# Many readers


@pytest.mark.parametrize("chunk_rows", [1, 3])
def test_many_threads(tmp_path, monkeypatch, chunk_rows) -> None:
    """Six shards, two of which may be open at a time."""
    monkeypatch.setattr(shard, "MOST_OPEN", 2)
    case = Case(records=71, inner=(8, 30, 30), chunk_rows=chunk_rows, shard_chunks=12 // chunk_rows)
    path = case.write(tmp_path / "a")
    array, wanted = ShardArray(path), by_zarr(path)
    start, wrong = threading.Barrier(8), []

    def work(seed: int) -> None:
        rng, out = random.Random(seed), np.empty(array.shape[1:], array.dtype)
        start.wait()
        try:
            for record in rng.choices(range(len(array)), k=125):
                array.read_into(record, out)
                if not np.array_equal(out, wanted[record]):
                    wrong.append(record)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(known.file is not None for known in array.shards.values()) <= 2 + 8


def run(code: str, *arguments: Any) -> None:
    """In a process of its own, which knows ShardArray and `check(array, records)`."""
    before = """
    import errno, os, random, resource, sys
    import numpy as np
    if len(sys.argv) > 3: resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]),) * 2)
    from kdcache.errors import StoreError
    from kdcache.store.format.shard import ShardArray
    wanted = np.load(sys.argv[2])
    def check(array, records):
        out = np.empty(array.shape[1:], array.dtype)
        for record in records:
            array.read_into(record, out)
            assert np.array_equal(out, wanted[record]), record
    """
    code = textwrap.dedent(before) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_forked_children(tmp_path) -> None:
    case = Case(records=60, inner=(8, 30, 30))
    np.save(tmp_path / "wanted.npy", case.values())
    code = """
    array = ShardArray(sys.argv[1])
    check(array, range(0, 60, 7))
    children = []
    for seed in range(4):
        child = os.fork()
        if not child:
            try:
                check(array, random.Random(seed).choices(range(60), k=200))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    check(array, random.Random(9).choices(range(60), k=200))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    """
    run(code, case.write(tmp_path / "a"), tmp_path / "wanted.npy")


def test_more_shards_than_descriptors(tmp_path) -> None:
    case = Case(records=300, inner=(4,), shard_chunks=1)
    np.save(tmp_path / "wanted.npy", case.values())
    code = """
    arrays = [ShardArray(sys.argv[1]) for _ in range(3)]
    for array in arrays:
        check(array, random.Random(0).choices(range(300), k=400))
    assert len(os.listdir("/proc/self/fd")) < 32
    del array, arrays
    assert len(os.listdir("/proc/self/fd")) < 8
    # When others take all of them, that is no damage.
    array, taken = ShardArray(sys.argv[1]), []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError as error:
        assert error.errno == errno.EMFILE
    try:
        check(array, [0])
        raise AssertionError("it was read")
    except StoreError as error:
        assert type(error) is StoreError and "ulimit" in error.fix, error
    for handle in taken:
        os.close(handle)
    check(array, [0])
    """
    run(code, case.write(tmp_path / "a"), tmp_path / "wanted.npy", 64)


def test_it_travels_by_pickle(tmp_path) -> None:
    case = Case(chunk_rows=2)
    array = ShardArray(case.write(tmp_path / "a"))
    read(array, 3)
    content = pickle.dumps(array)
    assert len(content) < 500
    other = pickle.loads(content)
    assert np.array_equal(other.read_all(), case.values())
    assert other.shards[0].file.handle != array.shards[0].file.handle
