"""How long does a large store take to open, and does an epoch of random reads take more and more memory?

The store has 120,000 small records, made of synthetic arrays through the writer. Every measurement is that of a fresh
process, files in the page cache, torch imported before the clock starts: opening (manifest, seal, all metadata), the
check for every file (what a training does once), the ids, the first record, the order of an epoch. Memory is this
process's own, sampled over an epoch of the training's loader: flat means that the highest of the last quarter is that
of the first.

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
import psutil

from common import header, spread, write
from kdcache.data import Augmentation
from kdcache.store import Manifest, open_cache, open_writer
from kdcache.store.format.manifest_models import Build, Dataset, Fingerprint, Head, View
from kdcache.store.format.schema import record_arrays
from kdcache.training import CacheDataset
from kdcache.training.input.loader import Draws, make_loader, next_batch
from kdcache.training.input.sampler import Order

CLASSES, SIZE, VIEW = 4, (8, 8), (16, 16)


def make_store(path: Path, records: int, shard_records: int) -> float:
    """Write the store; its rows are random, the same in every shard but for their numbers. Returns seconds."""
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
        build=Build(batch_size=8, shard_records=shard_records, device="cpu", threads=1, libraries={}),
    )
    rng = np.random.default_rng(0)
    rows: dict[str, Any] = {}
    for spec in record_arrays(manifest):
        shape = (shard_records, *spec.shape)
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
    """Milliseconds of each step, in this process, the first time."""
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


def measure_memory(store: Path, batch_size: int, threads: int) -> dict[str, Any]:
    """Resident set over an epoch of batches in random order."""
    process = psutil.Process()
    before = process.memory_info().rss / 2**20
    cache = open_cache(store)
    cache.check_files()
    draws = Draws(CacheDataset(cache, augmentation=Augmentation.off()), 0)
    steps = len(cache) // batch_size
    loader = make_loader(draws, first=0, last=steps, batch_size=batch_size, workers=threads, pin_memory=False)
    batches, samples = iter(loader), []
    began = time.perf_counter()
    for step in range(steps):
        next_batch(batches)
        if step % 10 == 0:
            samples.append(process.memory_info().rss / 2**20)
    seconds = time.perf_counter() - began
    quarter = len(samples) // 4
    first, last = max(samples[:quarter]), max(samples[-quarter:])
    return {
        "imports_mib": round(before, 1),
        "first_batch_mib": round(samples[0], 1),
        "first_quarter_max_mib": round(first, 1),
        "last_quarter_max_mib": round(last, 1),
        "growth": round(last / first, 4),
        "open_files": process.num_fds(),
        "samples_per_s": round(steps * batch_size / seconds),
    }


def fresh(arguments: argparse.Namespace, what: str, store: Path) -> Any:
    """The result of `--measure what` in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, "--store", str(store)]
    command += ["--batch-size", str(arguments.batch_size), "--threads", str(arguments.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=120_000)
    parser.add_argument("--shard-records", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of the loader")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--keep", type=Path, help="where to make the store, or where it is; default a temporary folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=["opening", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measured = (
            measure_opening(arguments.store)
            if arguments.measure == "opening"
            else measure_memory(arguments.store, arguments.batch_size, arguments.threads)
        )
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as scratch:
        store = arguments.keep or Path(scratch) / "store.zarr"
        seconds = make_store(store, arguments.records, arguments.shard_records)
        files = sum(path.is_file() for path in store.rglob("*"))
        print(f"{arguments.records} records in {files} files, written in {seconds:.1f} s")
        repeats = [fresh(arguments, "opening", store) for _ in range(arguments.repeats)]
        opening = {
            name: {share: round(value, 2) for share, value in spread([row[name] for row in repeats]).items()}
            for name in repeats[0]
        }
        for name, value in opening.items():
            print(f"{name}: {value['p50']} (p20 {value['p20']}, p80 {value['p80']})")
        memory = fresh(arguments, "memory", store)
        print("memory:", memory)
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    if arguments.json:
        settings = {
            "records": arguments.records,
            "shard_records": arguments.shard_records,
            "files": files,
            "bytes": size,
        }
        write(
            arguments.json, {**header("opening"), "store": settings, "opening": opening, "memory_of_an_epoch": memory}
        )


if __name__ == "__main__":
    main()
