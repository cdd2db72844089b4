"""Stores of regressions beside or in place of segmentation, and of features alone: format version 2."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from pydantic import ValidationError

from kdcache.errors import CorruptError, StoreError
from kdcache.store import CopyChanges, Manifest, Records, copy_store, inspect_store, open_cache, verify_files
from kdcache.store.format.manifest import FORMAT_VERSION
from kdcache.store.format.manifest_models import Head, Regression
from kdcache.store.format.schema import record_arrays

DOCUMENT = (Path(__file__).parents[3] / "docs" / "format.md").read_text(encoding="utf-8")
SEGMENTATION = Head(classes=5, k=5, size=(6, 8), align_corners=False)
DEPTH = Regression(
    kind="regression",
    channels=1,
    size=(3, 4),
    align_corners=False,
    unit="m",
    range=(0.0, 80.0),
    parameterisation="softplus",
)
WIDE = DEPTH.model_copy(update={"range": None, "channels": 2, "parameterisation": "identity"})
KINDS = {
    "both": {"segmentation": SEGMENTATION, "depth": DEPTH},
    "depth": {"depth": DEPTH, "relative": WIDE},
    "features": {},
}


def with_heads(plan: Any, heads: dict[str, Any], **options: Any) -> Any:
    """A plan of a store with these heads, whose regressions lie in their range."""
    made = plan(k=5, classes=5, **{name: value for name, value in options.items() if name != "version"})
    fields = made.manifest.model_dump(mode="python")
    fields |= {
        "version": options.get("version", FORMAT_VERSION),
        "heads": {name: head.model_dump() for name, head in heads.items()},
    }
    made.manifest = Manifest.model_validate(fields)
    rng = np.random.default_rng(1)
    for spec in record_arrays(made.manifest):
        if spec.path.startswith("targets/"):
            shape = (made.manifest.records, *spec.shape)
            made.arrays[spec.path] = rng.uniform(0, 80, shape).astype(spec.dtype)
    made.arrays = {spec.path: made.arrays[spec.path] for spec in record_arrays(made.manifest)}
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(plan, tmp_path, kind) -> None:
    made = with_heads(plan, KINDS[kind])
    path = made.write(tmp_path / "store.zarr")
    cache = open_cache(path)
    assert cache.manifest.version == 3
    assert list(cache.manifest.heads) == list(KINDS[kind])
    for record in (0, len(cache) - 1):
        for array, row in cache.read(record, list(cache.specs)).items():
            assert row.dtype == made.arrays[array].dtype
            assert np.array_equal(row, made.arrays[array][record]), array
    for name in KINDS[kind]:
        wanted = made.arrays[f"targets/{name}/values"][1]
        assert np.array_equal(Records(cache).target(1, name)["values"], wanted)
    with pytest.raises(StoreError, match="Unknown head 'normals'"):
        Records(cache).target(0, "normals")
    assert verify_files(path).damaged == []
    facts = dict(inspect_store(path).facts())
    assert ("depth from 0 to 80 m at 3x4" in facts["targets"]) == ("depth" in KINDS[kind])
    assert ("features alone: head, stage1" in facts["targets"]) == (kind == "features")


@pytest.mark.parametrize("kind", ["depth", "features"])
def test_targets_of_classes_are_refused_where_there_are_none(plan, tmp_path, kind) -> None:
    cache = open_cache(with_heads(plan, KINDS[kind]).write(tmp_path / "store.zarr"))
    assert cache.num_classes == 5
    assert cache.target_paths() == []
    with pytest.raises(StoreError, match="has no segmentation head, only "):
        _ = cache.head


def test_every_new_store_is_of_version_3_and_records_contents(plan) -> None:
    for manifest in (plan().manifest, with_heads(plan, KINDS["both"]).manifest):
        assert manifest.version == 3 == FORMAT_VERSION == manifest.to_json()["version"]
        paths = {spec.path for spec in record_arrays(manifest)}
        assert {"records/image_digest", "records/label_digest", "records/label_checksum"} <= paths


@pytest.mark.parametrize(("kind", "version"), [("classes", 1), ("both", 2)])
def test_stores_of_earlier_versions_are_written_and_read_as_they_were(plan, tmp_path, kind, version) -> None:
    heads = {"segmentation": SEGMENTATION} if kind == "classes" else KINDS[kind]
    earlier = with_heads(plan, heads, version=version)
    assert not any("digest" in path for path in earlier.arrays)
    content = earlier.manifest.to_json()
    del content["heads"]["segmentation"]["kind"]  # the default, as in the first stores
    assert Manifest.model_validate_json(json.dumps(content)) == earlier.manifest
    cache = open_cache(earlier.write(tmp_path / "earlier.zarr"))
    assert cache.manifest.version == version
    for path, rows in earlier.arrays.items():
        np.testing.assert_array_equal(cache.read(4, [path])[path], rows[4])


@pytest.mark.parametrize(
    ("bounds", "dtype"),
    [
        ((0, 80), "float16"),
        ((-60000, 5), "float16"),
        ((0, 60001), "float32"),
        ((0, 0.05), "float32"),
        (None, "float32"),
    ],
)
def test_values_are_float16_where_the_range_allows_it(bounds, dtype) -> None:
    assert DEPTH.model_copy(update={"range": bounds}).dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "in version 1"),
        ({"heads": {"segmentation": DEPTH.model_dump()}}, "heads.segmentation is regression"),
        ({"heads": {"depth": SEGMENTATION.model_dump()}}, "heads.depth is categorical"),
        ({"heads": {"depth": DEPTH.model_dump() | {"range": (80.0, 0.0)}}}, "range 80 to 0 is none"),
        ({"heads": {"depth": DEPTH.model_dump() | {"parameterisation": "relu"}}}, "softplus"),
        ({"heads": {"depth": DEPTH.model_dump() | {"classes": 3}}}, "classes"),
        ({"heads": {"depth": DEPTH.model_dump() | {"kind": "ordinal"}}}, "kind"),
        ({"heads": {"depth": DEPTH.model_dump() | {"channels": 65535, "size": (60000, 60000)}}}, "larger than"),
    ],
)
def test_a_manifest_whose_heads_do_not_fit_is_refused(plan, change, message) -> None:
    fields = with_heads(plan, KINDS["both"]).manifest.model_dump(mode="python") | change
    fields["version"] = change.get("version", FORMAT_VERSION)
    with pytest.raises(ValidationError, match=message):
        Manifest.model_validate(fields)


def test_a_fault_in_a_head_is_named_by_its_place(plan, tmp_path) -> None:
    path = with_heads(plan, KINDS["both"]).write(tmp_path / "store.zarr")
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["kdcache"]["heads"]["depth"]["channels"] = 0
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(CorruptError, match=r"heads\.depth\.channels"):
        open_cache(path)


def test_only_logits_are_rounded(plan, tmp_path) -> None:
    source = open_cache(with_heads(plan, KINDS["both"]).write(tmp_path / "store.zarr"))
    copy_store(source, tmp_path / "small.zarr", CopyChanges(codec="small"))
    small = open_cache(tmp_path / "small.zarr")
    for head, same in (("depth", True), ("segmentation", False)):
        (path,) = source.target_paths(head)
        rows = source.read(1, [path])[path], small.read(1, [path])[path]
        assert np.array_equal(*rows) == same


def test_other_libraries_read_depth(plan, tmp_path) -> None:
    """zarr-python and, where it is installed, tensorstore, by the names of the document's table alone."""
    made = with_heads(plan, KINDS["both"])
    path = made.write(tmp_path / "store.zarr")
    wanted = made.arrays["targets/depth/values"]
    plain = zarr.open_group(path, mode="r")["targets/depth/values"]
    assert np.array_equal(plain[:], wanted)
    if importlib.util.find_spec("tensorstore") is None:
        pytest.skip("tensorstore is not installed; zarr-python has read the values")
    import tensorstore

    array = path / "targets" / "depth" / "values"
    opened = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array}/"}}, read=True
    ).result()
    assert np.array_equal(opened.read().result(), wanted)


ALONE = """
import runpy, sys
sys.modules |= {"kdcache": None, "kdcache_kernels": None, "zarr": None, "torch": None}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_documents_reader_reads_depth(plan, tmp_path) -> None:
    made = with_heads(plan, KINDS["depth"])
    path = made.write(tmp_path / "store.zarr")
    block = re.search(r"<!-- reader -->\n```\w+\n(.*?)```", DOCUMENT, re.DOTALL)
    assert block is not None
    script = tmp_path / "reader.py"
    script.write_text(block[1], encoding="utf-8")
    for head in ("depth", "relative"):
        ran = subprocess.run(
            [sys.executable, "-c", ALONE, str(script), str(path), "9", head],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert np.array_equal(np.array(json.loads(ran.stdout)), made.arrays[f"targets/{head}/values"][9])
    read = runpy.run_path(str(script))["read"]
    assert np.array_equal(read(path / "targets/depth/values", 0), made.arrays["targets/depth/values"][0])


def test_the_documents_table_has_the_fields_of_a_regression() -> None:
    rows = re.search(r"^\| field of a regression \|.*\n\|[ |-]*\n((?:\|.*\n)*)", DOCUMENT, re.MULTILINE)
    assert rows is not None
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in rows[1].splitlines()]
    content = json.loads(DEPTH.model_dump_json())
    assert [name for name, *_ in cells] == [name for name in content if name in {c[0] for c in cells}]
    assert {name for name, *_ in cells} == set(content)
    example = {name: json.loads(text) for name, _, text, _ in cells}
    assert Regression.model_validate_json(json.dumps(example)) == DEPTH.model_copy(update={"size": (36, 48)})


def test_the_documents_parameterisations_are_those_of_the_code() -> None:
    import torch

    from kdcache.heads import raw_of, values_of

    rows = re.search(r"^\| `parameterisation` \|.*\n\|[ |-]*\n((?:\|.*\n)*)", DOCUMENT, re.MULTILINE)
    assert rows is not None
    names = {"exp": np.exp, "log": np.log}
    for line in rows[1].splitlines():
        name, forward, reverse = [cell.strip() for cell in line.strip("|").split(" | ")]
        r = np.array([-2.0, 0.3, 5.0])
        v = eval(forward, {**names, "r": r})
        np.testing.assert_allclose(values_of(torch.tensor(r), name.strip("`"), None).numpy(), v, rtol=1e-12)
        np.testing.assert_allclose(eval(reverse, {**names, "v": v}), r, rtol=1e-9)
        np.testing.assert_allclose(raw_of(torch.tensor(v), name.strip("`")).numpy(), r, rtol=1e-9)
