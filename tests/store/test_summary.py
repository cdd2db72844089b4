"""What inspect and verify say, against the files and against direct computation."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest

from kdcache.errors import MismatchError, StoreError
from kdcache.store import inspect_store, open_cache, summarise, verify_files


def on_disk(store, array: str) -> int:
    return sum(file.stat().st_size for file in (store / array / "c").rglob("*") if file.is_file())


def test_sizes_are_those_of_the_files(variant, variant_store) -> None:
    report = inspect_store(variant_store)
    assert report == summarise(open_cache(variant_store))
    assert [a.path for a in report.arrays] == list(variant.arrays)
    for array in report.arrays:
        assert array.bytes_on_disk == on_disk(variant_store, array.path)
        assert array.bytes_plain == variant.arrays[array.path].nbytes
        assert array.ratio == pytest.approx(array.bytes_plain / array.bytes_on_disk)
    total = sum(on_disk(variant_store, path) for path in variant.arrays)
    targets = sum(on_disk(variant_store, path) for path in variant.arrays if path.startswith("targets/"))
    records, classes = variant.manifest.records, variant.manifest.heads["segmentation"].classes
    assert report.bytes_on_disk == total
    assert report.bytes_per_record == pytest.approx(total / records)
    assert report.target_bytes_per_record == pytest.approx(targets / records)
    assert report.full_resolution_bytes == classes * 24 * 32 * 2
    assert report.saving == pytest.approx(classes * 24 * 32 * 2 * records / targets)
    assert (report.shards_written, report.records_written, report.complete) == (variant.manifest.shards, records, True)


def test_a_half_built_store_counts_what_is_there(plan, tmp_path) -> None:
    path = plan().write(tmp_path / "s.zarr", [2])
    report = inspect_store(path)
    assert (report.shards_written, report.records_written, report.complete) == (1, 2, False)
    assert report.bytes_on_disk == sum(on_disk(path, array.path) for array in report.arrays)
    assert report.bytes_per_record == pytest.approx(report.bytes_on_disk / 2)
    assert report.topk_mass is None
    empty = inspect_store(plan().write(tmp_path / "e.zarr", []))
    assert (empty.records_written, empty.bytes_on_disk, empty.saving) == (0, 0, 0)
    assert "0 of 3 shards" in dict(empty.facts())["state"]


def test_the_mass_inside_the_top_k(plan, tmp_path) -> None:
    """Against the logits themselves, and for tails at both ends of float16."""
    wanted = plan(k=3, classes=7)
    rng = np.random.default_rng(1)
    logits = np.sort(rng.normal(0, 3, (10, 7, 6, 8)), axis=1)[:, ::-1]
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    inside = probability[:, :3].sum(1)
    wanted.arrays["targets/segmentation/tail"] = np.log((1 - inside) / inside).astype(np.float16)
    mass = inspect_store(wanted.write(tmp_path / "s.zarr")).topk_mass
    assert mass == pytest.approx(inside.mean(), abs=1e-4)
    for tail, expected in ((6e4, 0), (-6e4, 1), (0, 0.5)):
        wanted.arrays["targets/segmentation/tail"][:] = tail
        store = wanted.write(tmp_path / f"{tail}.zarr")
        assert inspect_store(store).topk_mass == pytest.approx(expected, abs=1e-6)


def test_the_mass_is_of_records_all_over_the_store(plan, tmp_path) -> None:
    """A few stand for all: not the first ones, which may be of one scene."""
    wanted = plan(records=40, features=False, pixels="source")
    tails = wanted.arrays["targets/segmentation/tail"]
    tails[:20], tails[20:] = -6e4, 6e4
    assert inspect_store(wanted.write(tmp_path / "s.zarr")).topk_mass == pytest.approx(0.5)


def test_a_dense_store_has_no_mass_to_lose(plan, tmp_path) -> None:
    assert inspect_store(plan(k=5).write(tmp_path / "s.zarr")).topk_mass is None


def test_facts_and_json(variant, variant_store) -> None:
    report = inspect_store(variant_store)
    facts = dict(report.facts())
    assert all(isinstance(value, str) and value for value in facts.values())
    assert f"{variant.manifest.dataset.samples} samples" in facts["data"]
    assert ("features" in facts) == bool(variant.manifest.features)
    back = json.loads(json.dumps(report.to_json()))
    assert back["bytes_on_disk"] == report.bytes_on_disk
    assert back["manifest"]["created"] == variant.manifest.created
    assert not any(isinstance(v, float) and math.isnan(v) for v in back.values())


def test_verify_counts_every_file(variant, variant_store, tree) -> None:
    seen = []
    report = verify_files(variant_store, lambda done, total: seen.append((done, total)))
    assert report.damaged == []
    assert report.files == len(tree(variant_store)) - 1  # the seal
    assert report.bytes == inspect_store(variant_store).bytes_on_disk
    shards = variant.manifest.shards
    assert seen == [(done, shards) for done in range(1, shards + 1)]


def test_verify_names_every_damaged_file(store) -> None:
    names = ["pixels/image/c/2/0/0/0", "records/flip/c/0", "targets/segmentation/tail/c/1/0/0"]
    for name in names:
        content = bytearray((store / name).read_bytes())
        content[7] ^= 0x20
        (store / name).write_bytes(content)
    assert sorted(verify_files(store).damaged) == sorted(names)


def test_the_seal_stands_for_every_byte(plan, forger, tmp_path) -> None:
    """Whoever changes the digests with the files changes the seal's, which was published elsewhere."""
    store = plan().write(tmp_path / "s.zarr")
    about, published = inspect_store(store), verify_files(store).seal
    assert published == hashlib.sha256((store / "complete.json").read_bytes()).hexdigest()
    assert about.seal == about.to_json()["seal"] == published
    assert ("seal", published) in about.facts()
    assert verify_files(store, seal=published).damaged == []
    assert not verify_files(store, seal=f"sha256:{published.upper()}").damaged
    for wrong in ("0" * 64, published[:-1] + ("0" if published[-1] != "0" else "1")):
        with pytest.raises(MismatchError, match=published):
            verify_files(store, seal=wrong)
    for malformed in ("", published[:12], "x" * 64, published + "0"):
        with pytest.raises(StoreError, match="64 hexadecimal"):
            verify_files(store, seal=malformed)
    shard = store / "records/view/c/0"
    content = shard.read_bytes()
    shard.write_bytes(bytes(reversed(content)))
    forger.reseal(store)
    assert verify_files(store).damaged == [], "all fits"
    with pytest.raises(MismatchError):
        verify_files(store, seal=published)


def test_a_store_that_is_half_built_has_no_seal(plan, tmp_path) -> None:
    about = inspect_store(plan().write(tmp_path / "s.zarr", order=[0], seal=False))
    assert about.seal is about.to_json()["seal"] is None
