"""docs/format.md against built stores: its tables say what is there; its reader needs neither kdcache nor zarr."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.store import open_cache
from kdcache_kernels import densify, pack

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
ALLOWED = {"json", "sys", "pathlib", "google_crc32c", "numcodecs", "numpy"}
# The document's script as a process that has no kdcache and no zarr.
ALONE = """
import runpy, sys
sys.modules |= {"kdcache": None, "kdcache_kernels": None, "zarr": None, "torch": None}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
IS_TYPE = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int,
    "number": lambda value: type(value) in (int, float),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "member": lambda value: (
        value.keys() == fields("field of a member").keys()
        and all(has_type(value[name], kind) for name, (kind, _) in fields("field of a member").items())
    ),
    "training": lambda value: (
        value is None
        or (
            value.keys() == fields("field of a training").keys()
            and all(has_type(value[name], kind) for name, (kind, _) in fields("field of a training").items())
        )
    ),
}


def fenced(mark: str) -> str:
    """The code block that follows `<!-- mark -->`."""
    found = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None, mark
    return found[1]


def table(first: str) -> list[list[str]]:
    """Rows of the table whose first column is headed so."""
    found = re.search(rf"^\| {re.escape(first)} \|.*\n\|[ |-]*\n((?:\|.*\n)*)", DOCUMENT, re.MULTILINE)
    assert found is not None, first
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()]


def fields(first: str) -> dict[str, tuple[str, Any]]:
    """Field -> (type, example) of a table of fields."""
    rows = table(first)
    return {
        name: (kind, json.loads(example.strip("`")))
        for cell, kind, example, _ in rows
        for name in re.findall("`([^`]+)`", cell)
    }


def has_type(value: Any, kind: str) -> bool:
    """`string`, `2 integers`, `list of KIND`, `object of KIND`, `KIND or KIND`."""
    if " or " in kind:
        return any(has_type(value, one) for one in kind.split(" or "))
    if kind.startswith("list of "):
        return isinstance(value, list) and all(has_type(item, kind.removeprefix("list of ")) for item in value)
    if kind.startswith("object of "):
        return isinstance(value, dict) and all(has_type(v, kind.removeprefix("object of ")) for v in value.values())
    several = re.fullmatch(r"(\d) integers", kind)
    if several is not None:
        return has_type(value, "list of integer") and len(value) == int(several[1])
    return IS_TYPE[kind](value)


def leaves(value: Any, known: set[str], path: str = "") -> dict[str, Any]:
    """Every field of some JSON by its dotted path; what `known` names is a leaf though it may be an object."""
    if path in known or not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for name, part in value.items():
        found |= leaves(part, known, f"{path}.{name}".removeprefix("."))
    return found


def check_fields(first: str, content: Any, named: dict[str, str]) -> None:
    """The table and the JSON have the same fields, of the types that it says. `named`: a name -> its placeholder."""
    written = fields(first)
    found: dict[str, Any] = {}
    # A tap or a path may have dots of its own: placeholders first, then names are joined by dots.
    for path, value in leaves(renamed(content, named), set(written)).items():
        assert path in written, f"{path} is not in the table of {first}"
        assert has_type(value, written[path][0]), (path, value)
        found[path] = value
    absent = {path for path in written if path not in found}
    may_be_absent = ("depth.", "features.<tap>.", "fidelity.", "statistics.<name>.", "view.drawn.")
    may_be_absent += ("teacher.parents", "teacher.probe_size", "teacher.processor.", "teacher.tta.", "view.fit")
    may_be_absent += ("feature_fidelity.",)
    assert all(path.startswith(may_be_absent) for path in absent), absent
    for path, (kind, example) in written.items():
        assert has_type(example, kind), (path, kind, example)


def renamed(content: Any, named: dict[str, str]) -> Any:
    if not isinstance(content, dict):
        return content
    return {named.get(name, name): renamed(part, named) for name, part in content.items()}


def metadata(array: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((array / "zarr.json").read_bytes())
    return content


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("document") / "reader.py"
    path.write_text(fenced("reader"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reader(script: Path) -> ModuleType:
    """The document's functions."""
    spec = importlib.util.spec_from_file_location("document_reader", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def taught(plan: Any) -> Any:
    """taught(path, ...): a store whose targets are packed logits, not rounded."""

    def write(path: Path, k: int, classes: int, codec: str = "default") -> Path:
        wanted = plan(k=k, classes=classes, features=False, codec=codec)
        generator = torch.Generator().manual_seed(5)
        logits = 6 * torch.randn(wanted.manifest.records, classes, 6, 8, generator=generator)
        for name, part in zip(("values", "indices", "tail"), pack(logits, k, impl="reference"), strict=True):
            if part is not None:
                wanted.arrays[f"targets/segmentation/{name}"] = part.numpy()
        return wanted.write(path)

    return write


def run(script: Path, store: Path, record: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE, str(script), str(store), str(record)]
    return subprocess.run(command, capture_output=True, text=True, cwd=script.parent)


def test_the_reader_uses_what_the_document_allows() -> None:
    imported = set()
    for node in ast.walk(ast.parse(fenced("reader"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == ALLOWED


@pytest.mark.parametrize(
    ("k", "classes", "codec"),
    [(5, 5, "default"), (3, 5, "default"), (4, 300, "default"), (3, 5, "small"), (5, 5, "none")],
    ids=["dense", "top-k", "wide ids", "small", "none"],
)
def test_the_reader_prints_dense_logits(script, taught, tmp_path, k, classes, codec) -> None:
    store = taught(tmp_path / "store.zarr", k, classes, codec)
    cache = open_cache(store)
    record = len(cache) - 1  # in the short shard
    ran = run(script, store, record)
    assert ran.returncode == 0, ran.stderr
    rows = cache.read(record, cache.target_paths())
    parts = [rows.get(f"targets/segmentation/{name}") for name in ("values", "indices", "tail")]
    packed = [None if part is None else torch.from_numpy(part)[None] for part in parts]
    wanted = densify(*packed, classes, torch.float64)[0].numpy()
    printed = np.array(json.loads(ran.stdout))
    assert printed.shape == wanted.shape == (classes, 6, 8)
    assert np.abs(printed - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_the_reader_reads_every_row(reader, variant_store) -> None:
    cache = open_cache(variant_store)
    for record in range(len(cache)):
        for path, wanted in cache.read(record, list(cache.specs)).items():
            row = reader.read(variant_store / path, record)
            assert row.dtype == wanted.dtype
            assert row.tobytes() == wanted.tobytes(), (path, record)


def test_the_reader_restores_features(script, plan, tmp_path) -> None:
    wanted = plan(k=5, eight_bits=True)
    store = wanted.write(tmp_path / "store.zarr")
    low, step = wanted.arrays["scales/stage1"][9].astype(np.float64)[..., None, None]
    features = {
        "features/stage1": low + step * wanted.arrays["features/stage1"][9],
        "features/head": wanted.arrays["features/head"][9],
    }
    for path, values in features.items():
        ran = subprocess.run(
            [sys.executable, "-c", ALONE, str(script), str(store), "9", path], capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        assert np.abs(np.array(json.loads(ran.stdout)) - values).max() <= 1e-4
    assert np.abs(open_cache(store).feature(9, "stage1") - features["features/stage1"]).max() <= 1e-4


def test_the_reader_refuses(script, reader, store) -> None:
    """Damage in a chunk and in an index, an empty chunk, another version, a store without its seal."""
    array = store / "targets" / "segmentation" / "values"
    shard = array.joinpath("c", "0", "0", "0", "0")
    whole = shard.read_bytes()
    for at in (10, len(whole) - 10):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            reader.read(array, 0)
    empty = b"\xff" * 16
    shard.write_bytes(empty + reader.google_crc32c.value(empty).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="never written"):
        reader.read(array, 0)
    group = store / "zarr.json"
    about = group.read_text()
    group.write_text(about.replace('"version": 3', '"version": 4'))
    assert "no complete store" in run(script, store, 0).stderr
    group.write_text(about)
    (store / "complete.json").unlink()
    assert "no complete store" in run(script, store, 0).stderr


def test_the_table_of_arrays_is_what_a_store_has(variant, variant_store) -> None:
    manifest = variant.manifest
    head = manifest.heads["segmentation"]
    size = {"R": manifest.records, "N": manifest.dataset.samples, "k": head.k, "h": head.size[0], "w": head.size[1]}
    size |= {"H": manifest.view.size[0], "W": manifest.view.size[1], "2": 2, "3": 3, "4": 4, "16": 16}
    size["U"] = sum(len(sample.encode()) for sample in variant.ids)
    present = {
        "always": True,
        "k < C": not head.dense,
        "per tap": True,
        "per map": True,
        "per similarity": True,
        "8 bits": True,
        "raw logits": head.raw,
        "version 3": True,
        "depth digests": False,
        "regression": False,
        "depth labels": False,
        "pixels stored": manifest.view.pixels == "stored",
        "views beyond": manifest.view.drawn is not None and manifest.view.drawn.scale[0] < 1,
        "folds": manifest.teacher.folds is not None,
    }
    described = {}
    for cell, shape, dtype, when, _ in table("array"):
        path = cell.strip("`").replace("<head>", "segmentation")
        if not present[when]:
            continue
        plain, _, wide = dtype.partition(", ")
        if wide:
            assert wide == "uint16 above 256 classes"
            plain = "uint16" if head.classes > 256 else plain
        several: Any = manifest.features if "<tap>" in path else manifest.statistics if "<name>" in path else [""]
        if when in ("per map", "per similarity"):
            several = {n: s for n, s in several.items() if (s.kind == "similarity") == (when == "per similarity")}
        if when == "8 bits":
            several = {tap: feature for tap, feature in several.items() if feature.dtype == "uint8"}
        for name in several:
            if dtype == "float16 or uint8":
                plain = several[name].dtype
            if name in manifest.features:
                size["c"] = manifest.features[name].channels
            if name:
                size |= dict(zip(("h'", "w'"), several[name].size, strict=True))
                cells = several[name].size[0] * several[name].size[1]
                size["p"] = cells * (cells - 1) // 2
            whole = path.replace("<tap>", name).replace("<name>", name)
            described[whole] = ([size[s] for s in shape.strip("()").split(", ")], plain)
    found = {
        path.parent.relative_to(variant_store).as_posix(): (about["shape"], about["data_type"])
        for path in variant_store.rglob("zarr.json")
        if (about := metadata(path.parent))["node_type"] == "array"
    }
    assert described == found


def described_compressor(cell: str) -> dict[str, Any] | None:
    """What `blosc` (lz4, level 5) means; None for no compressor."""
    if cell == "no compressor":
        return None
    found = re.fullmatch(r"`(\w+)` \((?:(\w+), )?level (\d)\)", cell)
    assert found is not None, cell
    name, inner, level = found[1], found[2], int(found[3])
    if name == "blosc":
        return {"name": name, "cname": inner, "clevel": level, "shuffle": "shuffle", "blocksize": 0}
    return {"name": name, "level": level, "checksum": False}


def test_the_codecs_are_those_of_a_store(variant, variant_store) -> None:
    header = re.search(r"^\| arrays \|(.*)\|$", DOCUMENT, re.MULTILINE)
    assert header is not None
    column = re.findall(r"`(\w+)`", header[1]).index(variant.manifest.codec) + 1
    rows = {row[0]: described_compressor(row[column]) for row in table("arrays")}
    of_features = "`features/*`, `scales/*`, `statistics/similarity.*`"
    assert list(rows) == [of_features, "`samples/*`", "all others"]
    for path in (path.parent for path in variant_store.rglob("zarr.json")):
        about = metadata(path)
        if about["node_type"] == "array":
            folder = path.relative_to(variant_store).parts[0]
            chain = about["codecs"] if folder == "samples" else about["codecs"][0]["configuration"]["codecs"]
            assert (chain[0]["name"], chain[-1]["name"]) == ("bytes", "crc32c")
            found = [{"name": codec["name"], **codec["configuration"]} for codec in chain[1:-1]]
            like_features = folder in ("features", "scales") or path.name.startswith("similarity.")
            wanted = rows[of_features] if like_features else rows.get(f"`{folder}/*`", rows["all others"])
            if wanted is not None and wanted["name"] == "blosc":
                wanted = {**wanted, "typesize": np.dtype(about["data_type"]).itemsize}
            assert found == ([] if wanted is None else [wanted]), path
    if variant.manifest.codec == "default":
        shown = json.loads(fenced("codecs"))
        real = metadata(variant_store / "targets" / "segmentation" / "values")["codecs"]
        for chain in (shown, real):
            del chain[0]["configuration"]["chunk_shape"]
        assert shown == real


def test_the_fields_are_those_of_a_store(variant, variant_store) -> None:
    manifest = metadata(variant_store)["attributes"]["kdcache"]
    for part in ("features", "statistics"):
        if not manifest[part]:
            del manifest[part]  # {}, as the table says
    if manifest["fidelity"] is None:
        del manifest["fidelity"]  # as the text says
    for part, field in (("view", "drawn"), ("teacher", "tta")):
        if manifest[part][field] is None:
            del manifest[part][field]  # likewise
    taps = dict.fromkeys(variant.manifest.features, "<tap>")
    maps = dict.fromkeys(variant.manifest.statistics, "<name>")
    # A tap may be called like a field: these names stand below `heads`, `features` and `statistics` only.
    parts = {"heads": {"segmentation": "<head>"}, "features": taps, "feature_fidelity": taps, "statistics": maps}
    for part, named in parts.items():
        if part in manifest:
            manifest[part] = renamed(manifest[part], named)
    check_fields("field", manifest, {})
    for path in (variant_store / "ledger").iterdir():
        record = json.loads(path.read_bytes())
        check_fields("field of a ledger record", record, dict.fromkeys(record["files"], "<path>"))
    seal = json.loads((variant_store / "complete.json").read_bytes())
    check_fields("field of `complete.json`", seal, dict.fromkeys(seal["metadata"], "<path>"))
