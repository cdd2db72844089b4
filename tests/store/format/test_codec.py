"""The three codecs: what they write is read by every reader, and what small rounds away."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from kdcache.errors import CorruptError, MismatchError
from kdcache.store import Manifest, inspect_store, open_cache, open_writer, round_targets
from kdcache.store.format.manifest import parse_manifest
from kdcache.store.format.schema import create_arrays, record_arrays
from kdcache.store.format.shard import ShardArray

CODECS = ["default", "small", "none"]
COMPRESSORS = {
    "default": {"features": ("zstd", None, 1), "targets": ("blosc", "lz4", 5)},
    "small": {"features": ("zstd", None, 3), "targets": ("blosc", "zstd", 3)},
    "none": {"features": None, "targets": None},
}
FLOAT16 = arrays_of.arrays(
    np.float16,
    arrays_of.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(width=16, allow_nan=False, allow_infinity=False),
)
VALUES = "targets/segmentation/values"


def rounded(values: np.ndarray) -> np.ndarray:
    return round_targets({VALUES: values}, "small")[VALUES]


def nearest(values: np.ndarray) -> np.ndarray:
    """Float64 numbers of 6 significant bits, 5 of them stored, nearest to float16 ones; ties to even."""
    _, exponent = np.frexp(values)
    step = 2.0 ** (np.maximum(exponent, -13) - 6)  # below 2^-14 float16 has fixed steps
    return np.round(values / step) * step


@pytest.fixture(scope="module", params=CODECS)
def written(request, plan, tmp_path_factory):
    """A codec, what was to be stored, and the store."""
    wanted = plan(codec=request.param)
    return request.param, wanted, wanted.write(tmp_path_factory.mktemp("codec") / "s.zarr")


def test_every_reader_gets_back_what_was_written(written) -> None:
    _, wanted, store = written
    cache = open_cache(store)
    for path, rows in wanted.arrays.items():
        assert np.asarray(zarr.open_array(store / path, mode="r")[...]).tobytes() == rows.tobytes(), path
        assert ShardArray(store / path).read_all().tobytes() == rows.tobytes(), path
        for record in range(len(rows)):
            assert cache.read(record, [path])[path].tobytes() == rows[record].tobytes(), (path, record)


def test_tensorstore_reads_it(written) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    _, wanted, store = written
    for path, rows in wanted.arrays.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store / path}/"}}
        assert np.asarray(tensorstore.open(spec, read=True).result().read().result()).tobytes() == rows.tobytes(), path


def test_chains(written) -> None:
    """bytes, the codec's compressor, crc32c; never a filter."""
    codec, wanted, store = written
    for path in wanted.arrays:
        (sharding,) = json.loads((store / path / "zarr.json").read_bytes())["codecs"]
        first, *between, last = sharding["configuration"]["codecs"]
        assert (first["name"], last["name"]) == ("bytes", "crc32c")
        kind = COMPRESSORS[codec]["features" if path.startswith("features/") else "targets"]
        if kind is None:
            assert between == []
            continue
        name, inner, level = kind
        settings = between[0]["configuration"]
        assert len(between) == 1
        assert between[0]["name"] == name
        assert settings.get("cname") == inner
        assert settings.get("clevel", settings.get("level")) == level
        assert settings.get("shuffle", "shuffle") == "shuffle"


@pytest.mark.parametrize("codec", CODECS)
def test_arrays_in_memory(plan, codec) -> None:
    """Any Zarr group will do."""
    wanted = plan(codec=codec)
    group = zarr.create_group(zarr.storage.MemoryStore())
    specs, manifest = record_arrays(wanted.manifest), wanted.manifest
    create_arrays(group, specs, manifest.records, manifest.build.shard_records, codec)
    for spec in specs:
        array = group[spec.path]
        array[0:4] = wanted.arrays[spec.path][0:4]
        assert np.asarray(array[0:4]).tobytes() == wanted.arrays[spec.path][0:4].tobytes()


def test_small_takes_fewer_bytes_and_none_takes_all(plan, tmp_path) -> None:
    sizes = {}
    for codec in CODECS:
        wanted = plan(codec=codec, k=5, features=False)
        wanted.arrays = round_targets(wanted.arrays, codec)
        report = inspect_store(wanted.write(tmp_path / codec))
        sizes[codec] = next(array for array in report.arrays if array.path == VALUES)
    assert sizes["small"].bytes_on_disk < 0.75 * sizes["default"].bytes_on_disk
    assert sizes["none"].bytes_plain < sizes["none"].bytes_on_disk  # checksums and index


# Rounding


def test_every_float16() -> None:
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    limited = np.clip(values.astype(np.float64), -59392, 59392)
    found = rounded(values)
    assert found.dtype == np.float16
    assert np.array_equal(found.astype(np.float64), nearest(limited))
    assert not (found.view(np.uint16) & 0b11111).any()
    assert np.array_equal(rounded(found), found)
    assert np.abs(found).max() < 6e4  # the bound of packed targets
    normal = (np.abs(limited) >= 2**-14) & (limited != 0)
    assert (np.abs(found.astype(np.float64)[normal] / limited[normal] - 1) <= 2**-6).all()


@given(values=FLOAT16)
def test_order_and_the_largest_class_are_kept(values) -> None:
    relative = values.astype(np.float32) - values.max(1, keepdims=True)
    values = relative.clip(-6e4).astype(np.float16)  # as the teacher's pass packs logits
    before = values.copy()
    found = rounded(values)
    assert np.array_equal(values, before)
    assert np.isfinite(found).all()
    assert (found <= 0).all()
    assert (found.max(1) == 0).all()
    assert (np.take_along_axis(found, values.argmax(1)[:, None], 1) == 0).all()
    down = -np.sort(-values, axis=1)
    assert (np.diff(rounded(down).astype(np.float32), axis=1) <= 0).all()


@given(values=FLOAT16, codec=st.sampled_from(CODECS))
def test_only_targets_of_small_change(values, codec) -> None:
    others = {
        "features/targets": values,
        "targets/segmentation/indices": np.arange(9, dtype=np.uint8),
        "targets/segmentation/max": values.astype(np.float32),
        "pixels/image": np.arange(9, dtype=np.uint8),
    }
    both = {VALUES: values, "targets/segmentation/tail": values}
    found = round_targets(others | both, codec)
    assert list(found) == [*others, *both]
    assert all(found[path] is array for path, array in others.items())
    for path in both:
        if codec == "small":
            assert np.array_equal(found[path], rounded(values))
        else:
            assert found[path] is values


# The manifest


def parsed(manifest: Manifest, **changes: object) -> Manifest:
    content = {**manifest.model_dump(mode="json"), **changes}
    return parse_manifest({"kdcache": json.loads(json.dumps(content))}, "here")


def test_a_manifest_from_before_codecs(plan) -> None:
    content = plan().manifest.model_dump(mode="json")
    del content["codec"], content["fidelity"]
    older = parse_manifest({"kdcache": content}, "here")
    assert (older.codec, older.fidelity) == ("default", None)


def test_what_a_teacher_has_seen_may_be_missing_and_must_be_possible(plan) -> None:
    content = plan().manifest.model_dump(mode="json")
    assert content["teacher"].pop("trainings") == []
    assert parse_manifest({"kdcache": content}, "here").teacher.trainings == ()
    for fold in ([2, 2], [0, 1], [-1, 3], [0.5, 3], [0]):
        content["teacher"]["trainings"] = [{"ids_digest": "", "fold": fold}]
        with pytest.raises(CorruptError, match="trainings"):
            parse_manifest({"kdcache": content}, "here")
    content["teacher"]["trainings"] = [None, {"ids_digest": "a"}]
    assert len(parse_manifest({"kdcache": content}, "here").teacher.trainings) == 2, "one of each of its data sets"
    member = {"spec": "a", "weights": "b", "mean": [0, 0, 0], "std": [1, 1, 1], "share": 0.5}
    content["teacher"] |= {"members": [member, member], "trainings": [None]}
    with pytest.raises(CorruptError, match="1 trainings of 2 teachers"):
        parse_manifest({"kdcache": content}, "here")


def test_a_manifest_goes_through_json(plan) -> None:
    for codec in CODECS:
        manifest = plan(codec=codec).manifest
        assert parsed(manifest) == manifest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codec", "tiny"),
        ("codec", None),
        ("fidelity", {}),
        ("fidelity", {"records": 0, "kl_t1": 0, "kl_t1_max": 0, "kl_t4": 0, "argmax_agreement": 1}),
        ("fidelity", {"records": 1, "kl_t1": -1, "kl_t1_max": 0, "kl_t4": 0, "argmax_agreement": 1}),
        ("fidelity", {"records": 1, "kl_t1": float("nan"), "kl_t1_max": 0, "kl_t4": 0, "argmax_agreement": 1}),
        ("fidelity", {"records": 1, "kl_t1": 0, "kl_t1_max": 0, "kl_t4": 0, "argmax_agreement": 2}),
    ],
)
def test_malformed(plan, field, value) -> None:
    with pytest.raises(CorruptError) as caught:
        parsed(plan().manifest, **{field: value})
    assert field in caught.value.problem


def test_a_build_goes_on_with_its_codec_whatever_the_fidelity(plan, tmp_path) -> None:
    begun = plan(codec="small", fidelity=True)
    begun.write(tmp_path / "s.zarr", [0])
    with pytest.raises(MismatchError) as caught:
        plan(codec="default").write(tmp_path / "s.zarr")
    assert "codec: small against default" in caught.value.problem
    with open_writer(tmp_path / "s.zarr", plan(codec="small", fidelity=False).manifest, begun.ids) as writer:
        assert writer.missing == [1, 2]
        assert writer.manifest.fidelity == begun.manifest.fidelity


def test_inspect_names_codec_and_fidelity(variant, variant_store) -> None:
    report = inspect_store(variant_store)
    facts = dict(report.facts())
    assert facts["codec"] == variant.manifest.codec
    assert ("fidelity" in facts) == (variant.manifest.fidelity is not None)
    if variant.manifest.fidelity is not None:
        assert "KL 6.0e-09 nats at T = 1" in facts["fidelity"]
        assert "100.000 %" in facts["fidelity"]
        assert report.to_json()["manifest"]["fidelity"]["kl_t4"] == 2e-8
