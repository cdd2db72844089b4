"""Small stores made of synthetic arrays, through the writer alone: no teacher, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.store import Fidelity, Fingerprint, Manifest, open_writer
from kdcache.store.backend.durable import file_digest
from kdcache.store.format.eight_bits import FeatureFidelity
from kdcache.store.format.manifest_models import Build, Dataset, Drawn, Feature, Head, Statistic, View
from kdcache.store.format.schema import record_arrays
from kdcache.store.format.teacher_models import Augmented, Member, Training

MEMBER = Member(spec="kdcache:tiny", weights="2" * 64, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), share=0.5)
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Plan:
    """A manifest, the ids and every array whole; `write` makes a store of them."""

    manifest: Manifest
    ids: list[str]
    arrays: Arrays

    def rows(self, shard: int) -> Arrays:
        first, last = self.manifest.shard_range(shard)
        return {path: array[first:last] for path, array in self.arrays.items()}

    def write(self, path: Path, order: list[int] | None = None, *, seal: bool = True) -> Path:
        """Write the shards of `order` (default: what is missing); sealed when all are there."""
        with open_writer(path, self.manifest, self.ids) as writer:
            for shard in writer.missing if order is None else order:
                writer.write_shard(shard, self.rows(shard))
            if seal and not writer.missing:
                writer.seal()
        return path

    def changed(self, **parts: dict[str, Any]) -> Plan:
        """The same plan with other fields in parts of its manifest."""
        parts = {name: getattr(self.manifest, name).model_copy(update=part) for name, part in parts.items()}
        return Plan(self.manifest.model_copy(update=parts), self.ids, self.arrays)


def make_manifest(
    *,
    k: int,
    classes: int,
    records: int,
    views: int,
    shard_records: int,
    features: bool,
    pixels: str,
    codec: str,
    fidelity: bool,
    several: bool,
    eight_bits: bool,
) -> Manifest:
    names = tuple(f"class {index}" for index in range(classes))
    return Manifest(
        created="2026-01-01T00:00:00+00:00",
        created_by="kdcache test",
        records=records,
        dataset=Dataset(
            name="synthetic",
            split="train",
            samples=records // views,
            labelled=records // views - 1,
            ids_digest="0" * 64,
            class_names=names,
            class_colours=tuple((index % 256, 0, 0) for index in range(classes)),
        ),
        view=View(
            size=(24, 32),
            views_per_sample=views,
            drawn=Drawn(seed=3, scale=(0.5 if several else 1, 2), flip=True) if views > 1 else None,
            pixels=pixels,
            **({"kind": "crop", "image_size": (24, 36), "teacher_size": (48, 64)} if several else {}),
        ),
        heads={
            "segmentation": Head(classes=classes, k=k, size=(6, 8), align_corners=False, raw=several, resampled=several)
        },
        features={
            "head": Feature(channels=3, size=(6, 8)),
            "stage1": Feature(channels=40, size=(5, 7), dtype="uint8" if eight_bits else "float16"),
        }
        if features
        else {},
        statistics={
            "at.stage1": Statistic(kind="at", tap="stage1", size=(5, 7)),
            "entropy": Statistic(kind="entropy", size=(6, 8)),
        }
        if several
        else {"similarity.stage1": Statistic(kind="similarity", tap="stage1", size=(5, 7))}
        if eight_bits
        else {},
        teacher=Fingerprint(
            spec="kdcache:tiny",
            weights="1" * 64,
            precision="float32",
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
            members=(MEMBER, MEMBER) if several else (),
            tta=Augmented(flip=True, scales=(0.5, 1.0)) if several else None,
            folds=2 if several else None,
            trainings=(Training(ids_digest="0" * 64, fold=(0, 2)), None) if several else (),
            probe=(1.0, -2.0, 3.0),
        ),
        build=Build(batch_size=2, shard_records=shard_records, device="cpu", threads=1, libraries={"python": "3"}),
        codec=codec,
        fidelity=Fidelity(records=16, kl_t1=6e-9, kl_t1_max=3e-7, kl_t4=2e-8, argmax_agreement=1) if fidelity else None,
        feature_fidelity={
            "stage1": FeatureFidelity(records=16, cosine=0.99997, cosine_least=0.9993, gradient_error=0.007)
        }
        if eight_bits
        else {},
    )


def make_arrays(manifest: Manifest, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    records = manifest.records
    arrays: Arrays = {}
    for spec in record_arrays(manifest):
        shape = (records, *spec.shape)
        if spec.dtype.startswith("float"):
            arrays[spec.path] = rng.normal(size=shape).astype(spec.dtype)
        else:
            high = min(np.iinfo(spec.dtype).max, 2**63 - 1)
            arrays[spec.path] = rng.integers(0, high, shape, endpoint=True).astype(spec.dtype)
    # A record of zeros in every array: its chunk must be stored to be believed.
    for array in arrays.values():
        array[min(2, records - 1)] = 0
    views = manifest.view.views_per_sample
    arrays["records/sample"] = np.arange(records, dtype=np.int64) // views
    arrays["records/view"] = (np.arange(records) % views).astype(np.int32)
    return arrays


@pytest.fixture(scope="session")
def plan() -> Any:
    """plan(k=..., ...): what a small store shall hold. 10 records in shards of 4, so that the last is short."""

    def make(
        k: int = 3,
        classes: int = 5,
        records: int = 10,
        views: int = 1,
        shard_records: int = 4,
        features: bool = True,
        pixels: str = "stored",
        codec: str = "default",
        fidelity: bool = True,
        several: bool = False,
        eight_bits: bool = False,
        seed: int = 0,
    ) -> Plan:
        manifest = make_manifest(
            k=k,
            classes=classes,
            records=records,
            views=views,
            shard_records=shard_records,
            features=features,
            pixels=pixels,
            codec=codec,
            fidelity=fidelity,
            several=several,
            eight_bits=eight_bits,
        )
        ids = [f"folder/ä {index}" for index in range(manifest.dataset.samples)]
        return Plan(manifest, ids, make_arrays(manifest, seed))

    return make


VARIANTS = {
    "dense": {"k": 5},
    "top-k": {"k": 3},
    "wide ids": {"k": 4, "classes": 300},
    "source": {"k": 3, "features": False, "pixels": "source", "fidelity": False},
    "small": {"k": 3, "codec": "small"},
    "none": {"k": 5, "codec": "none"},
    "one record": {"k": 5, "records": 1},
    "views": {"k": 5, "views": 2},
    "several": {"k": 3, "views": 2, "several": True},
    "eight bits": {"k": 5, "eight_bits": True},
}


@pytest.fixture(scope="session", params=VARIANTS.values(), ids=list(VARIANTS))
def variant(request: pytest.FixtureRequest, plan: Any) -> Plan:
    """Each kind of store in turn."""
    return plan(**request.param)


@pytest.fixture(scope="session")
def variant_store(variant: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of `variant`; for reading only."""
    return variant.write(tmp_path_factory.mktemp("variant") / "store.zarr")


@pytest.fixture
def store(plan: Any, tmp_path: Path) -> Path:
    """A complete top-k store of its own, to be damaged."""
    return plan().write(tmp_path / "store.zarr")


def reseal(store: Path) -> Path:
    """Make ledger and seal fit whatever the files are now, as one may who hands out a forged store."""
    files = {path.relative_to(store).as_posix(): path for path in sorted(store.rglob("*")) if path.is_file()}
    records = {name: path for name, path in files.items() if name.startswith("ledger/")}
    known = {json.loads(path.read_bytes())["shard"]: json.loads(path.read_bytes()) for path in records.values()}
    for record in known.values():
        for key in record["files"]:
            if key in files:
                size, sha256 = files[key].stat().st_size, file_digest(files[key])
                record["files"][key] = {"bytes": size, "sha256": sha256, "crc32c": ""}
    write_ledger(store, [known[shard] for shard in sorted(known)])
    return store


def write_ledger(store: Path, records: list[dict[str, Any]], **seal: Any) -> None:
    """Ledger records, given as JSON, and a seal over them and all metadata; `seal` has its fields replaced."""
    lines = [json.dumps(record, sort_keys=True) + "\n" for record in records]
    for index, line in enumerate(lines):
        (store / f"ledger/{index:08d}.json").write_text(line)
    (store / "ledger.jsonl").write_text("".join(lines))
    metadata = [*store.rglob("zarr.json"), *store.glob("samples/*/c/0")]
    completion = {
        "shards": len(lines),
        "ledger_sha256": file_digest(store / "ledger.jsonl"),
        "metadata": {path.relative_to(store).as_posix(): file_digest(path) for path in metadata if path.is_file()},
    }
    (store / "complete.json").write_text(json.dumps(completion | seal))


@dataclass(frozen=True)
class Forger:
    """What changes a store and makes it consistent again."""

    reseal = staticmethod(reseal)
    write_ledger = staticmethod(write_ledger)

    @staticmethod
    def edit(file: Path, change: Callable[[Any], Any]) -> None:
        """Change a JSON file in place, or replace it by what `change` returns."""
        content = json.loads(file.read_bytes())
        returned = change(content)
        file.write_text(json.dumps(content if returned is None else returned))


@pytest.fixture(scope="session")
def forger() -> Forger:
    """Forges stores."""
    return Forger()
