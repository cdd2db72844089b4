"""How long does a large cache take to open?

The cache has 120,000 small records, made of synthetic arrays through the writer. Every measurement is that of a fresh
process, files in the page cache, torch imported before the clock starts: opening (manifest, seal, all metadata), the
check for every file (what a training does once), the ids, the first record, the order of an epoch.

    python benchmarks/opening.py --json benchmarks/results/opening-cpu.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common import header, run, spread, write
from kdcache.bench.timing import check_repeats
from kdcache.store import Manifest, open_cache, open_writer
from kdcache.store.format.manifest_models import Build, Dataset, Head, View
from kdcache.store.format.schema import record_arrays
from kdcache.store.format.teacher_models import Fingerprint
from kdcache.training.input.sampler import Order

CLASSES, SIZE, VIEW, SHARD_RECORDS = 4, (8, 8), (16, 16), 128


def make_store(path: Path, records: int) -> float:
    """Write a large cache with random records, and return the seconds. Shards differ only in their numbers."""
    names = tuple(f"class {index}" for index in range(CLASSES))
    manifest = Manifest(
        created="2026-01-01T00:00:00+00:00",
        created_by="benchmarks/opening.py",
        records=records,
        dataset=Dataset(
            name="synthetic",
            split="train",
            samples=records,
            labelled=records,
            ids_digest="0" * 64,
            class_names=names,
            class_colours=((0, 0, 0),) * CLASSES,
        ),
        view=View(size=VIEW, pixels="stored"),
        heads={"segmentation": Head(classes=CLASSES, k=CLASSES, size=SIZE, align_corners=False)},
        teacher=Fingerprint(
            spec="none", weights="0" * 64, precision="float32", mean=(0, 0, 0), std=(1, 1, 1), probe=(0.0,)
        ),
        build=Build(batch_size=8, shard_records=SHARD_RECORDS, device="cpu", threads=1, libraries={}),
    )
    rng = np.random.default_rng(0)
    rows: dict[str, Any] = {}
    for spec in record_arrays(manifest):
        shape = (SHARD_RECORDS, *spec.shape)
        random = rng.normal(size=shape) if spec.dtype.startswith("float") else rng.integers(0, CLASSES, shape)
        rows[spec.path] = random.astype(spec.dtype)
    rows["records/window"][:] = (0, 0, *VIEW)
    ids = [f"folder-{index // 1000:04d}/image-{index:07d}" for index in range(records)]
    began = time.perf_counter()
    with open_writer(path, manifest, ids) as writer:
        for shard in writer.missing:
            first, last = manifest.shard_range(shard)
            numbered = rows | {"records/sample": np.arange(first, last), "records/view": rows["records/view"] * 0}
            writer.write_shard(shard, {name: array[: last - first] for name, array in numbered.items()})
        writer.seal()
    return time.perf_counter() - began


def measure_opening(store: Path) -> dict[str, float]:
    """Return the milliseconds of each step of opening a cache, when a process does it for the first time."""
    taken = {}

    def clock(name: str, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = action()
        taken[name] = 1e3 * (time.perf_counter() - began)
        return result

    cache = clock("open_ms", lambda: open_cache(store))
    clock("check_files_ms", cache.check_files)
    clock("ids_ms", lambda: cache.ids)
    clock("first_record_ms", lambda: cache.read(len(cache) // 2, list(cache.specs)))
    clock("column_ms", lambda: cache.column("sample"))
    order = Order(len(cache), 0, None)
    clock("order_of_an_epoch_ms", lambda: [order.visit(draw) for draw in range(len(cache))])
    return taken


def main() -> None:
    """Make a large cache, measure in new processes how long it takes to open, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=120_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check_repeats(arguments.repeats)
    if arguments.store:
        print(json.dumps(measure_opening(arguments.store)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store.zarr"
        seconds = make_store(store, arguments.records)
        files = [path for path in store.rglob("*") if path.is_file()]
        print(f"{arguments.records} records in {len(files)} files, written in {seconds:.1f} s")
        command = [sys.executable, __file__, "--store", str(store)]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(arguments.repeats)]
        rows = [json.loads(run.stdout.strip().splitlines()[-1]) for run in runs]
        settings = {"records": arguments.records, "shard_records": SHARD_RECORDS, "files": len(files)}
        settings["bytes"] = sum(path.stat().st_size for path in files)
    opening = {name: spread([row[name] for row in rows]) for name in rows[0]}
    for name, value in opening.items():
        print(f"{name}: {value['p50']:.2f} (p20 {value['p20']:.2f}, p80 {value['p80']:.2f})")
    if arguments.json:
        write(arguments.json, {**header("opening"), "store": settings, "opening": opening})


if __name__ == "__main__":
    run(main)
