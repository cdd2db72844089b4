"""The store is plain Zarr v3: other readers see the same bits, and nothing in it is of our own making."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from kdcache.store import open_cache
from kdcache.store.format.schema import record_arrays

STANDARD = {"bytes", "blosc", "zstd", "crc32c", "sharding_indexed"}


def codecs(chain: list[dict]) -> list[str]:
    """Names of every codec of a chain, those inside shards included."""
    found = []
    for codec in chain:
        found.append(codec["name"])
        for inner in ("codecs", "index_codecs"):
            found += codecs(codec.get("configuration", {}).get(inner, []))
    return found


def test_our_reader_gives_what_was_written(variant, variant_store) -> None:
    cache = open_cache(variant_store)
    assert len(cache) == variant.manifest.records
    assert cache.ids == tuple(variant.ids)
    assert set(cache.specs) == set(variant.arrays)
    for record in range(len(cache)):
        for path, row in cache.read(record, list(cache.specs)).items():
            wanted = variant.arrays[path][record]
            assert row.dtype == wanted.dtype
            assert np.array_equal(row, wanted), (path, record)
    for name in ("window", "flip", "pixel_checksum", "labelled"):
        assert np.array_equal(cache.column(name), variant.arrays[f"records/{name}"])


def test_plain_zarr_reads_the_same_bits(variant, variant_store, tmp_path) -> None:
    """In a process that never imports kdcache."""
    code = """
import sys, numpy, zarr
group = zarr.open_group(sys.argv[1], mode="r")
found = {name: array[...] for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}
assert not any(name.startswith("kdcache") for name in sys.modules)
numpy.savez(sys.argv[2], **found)
"""
    subprocess.run([sys.executable, "-c", code, variant_store, tmp_path / "read.npz"], check=True, cwd=tmp_path)
    with np.load(tmp_path / "read.npz") as read:
        assert set(read) == {*variant.arrays, "samples/id_bytes", "samples/id_ends"}
        for path, wanted in variant.arrays.items():
            assert read[path].dtype == wanted.dtype
            assert read[path].tobytes() == wanted.tobytes(), path
        ends = [0, *read["samples/id_ends"]]
        text = read["samples/id_bytes"].tobytes()
        assert [text[a:b].decode() for a, b in pairwise(ends)] == variant.ids


def test_tensorstore_reads_the_same_bits(variant, variant_store) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    for path, wanted in variant.arrays.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{variant_store / path}/"}}
        array = tensorstore.open(spec, read=True).result().read().result()
        assert array.dtype == wanted.dtype
        assert array.tobytes() == wanted.tobytes(), path


def test_only_standard_codecs_and_one_kind_of_shard(variant, variant_store) -> None:
    metadata = {path: json.loads((variant_store / path / "zarr.json").read_bytes()) for path in variant.arrays}
    for path, about in metadata.items():
        assert about["zarr_format"] == 3
        assert set(codecs(about["codecs"])) <= STANDARD, path
        assert about["codecs"][0]["name"] == "sharding_indexed"
        assert about["codecs"][0]["configuration"]["codecs"][-1]["name"] == "crc32c", "every chunk is checked"
        assert not about.get("storage_transformers")
    # Shards share their boundaries over all arrays; image-sized arrays have a chunk per record.
    shard = variant.manifest.build.shard_records
    for spec in record_arrays(variant.manifest):
        about = metadata[spec.path]
        assert about["chunk_grid"]["configuration"]["chunk_shape"] == [shard, *spec.shape]
        rows = about["codecs"][0]["configuration"]["chunk_shape"][0]
        assert rows == (shard if spec.record_bytes <= 1024 else 1), spec.path


def test_every_file_is_accounted_for(variant, variant_store, tree) -> None:
    """Nothing lies in a store that neither the seal nor the ledger lists."""
    seal = json.loads((variant_store / "complete.json").read_bytes())
    listed = set(seal["metadata"]) | {"complete.json", "ledger.jsonl"}
    for shard in range(variant.manifest.shards):
        record = f"ledger/{shard:08d}.json"
        listed |= {record, *json.loads((variant_store / record).read_bytes())["files"]}
    assert set(tree(variant_store)) == listed


def test_zeros_are_stored(plan, tmp_path) -> None:
    """A missing chunk reads as zeros too: a chunk that was written must be there."""
    wanted = plan(k=5, records=4)
    for array in wanted.arrays.values():
        array[:] = 0
    path = wanted.write(tmp_path / "zeros.zarr")
    for spec in record_arrays(wanted.manifest):
        shard = path.joinpath(spec.path, "c", *["0"] * (1 + len(spec.shape)))
        chunks = 1 if spec.record_bytes <= 1024 else 4
        # The index is at the end: offset and length per chunk, then its checksum. All ones say "empty".
        index = np.frombuffer(shard.read_bytes()[-(16 * chunks + 4) : -4], "<u8").reshape(chunks, 2)
        assert (index != np.iinfo(np.uint64).max).all(), spec.path
        assert (index[:, 1] > 0).all(), spec.path


def test_a_cache_travels_to_another_process(variant, variant_store: Path, tmp_path) -> None:
    cache = open_cache(variant_store)
    cache.read(0, list(cache.specs))  # arrays are open when it is pickled
    code = """
import pickle, sys
cache = pickle.load(open(sys.argv[1], "rb"))
rows = {path: row.tobytes() for path, row in cache.read(0, list(cache.specs)).items()}
pickle.dump((cache.manifest, cache.ids, rows), open(sys.argv[2], "wb"))
"""
    (tmp_path / "there").write_bytes(pickle.dumps(cache))
    subprocess.run([sys.executable, "-c", code, tmp_path / "there", tmp_path / "back"], check=True)
    manifest, ids, rows = pickle.loads((tmp_path / "back").read_bytes())
    assert (manifest, ids) == (cache.manifest, cache.ids)
    assert rows == {path: array[0].tobytes() for path, array in variant.arrays.items()}


def test_a_record_that_is_none_is_an_index_error(variant_store) -> None:
    cache = open_cache(variant_store)
    for record in (-1, len(cache)):
        with pytest.raises(IndexError):
            cache.read(record, ["records/sample"])
