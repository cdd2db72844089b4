"""Does the build keep the teacher busy, and is its memory flat?

For each teacher, in one run and taking turns: bare inference on tensors in memory at the build's batch size, decoding
and rendering alone, the writer alone (packed arrays from memory to synced shards), and the whole build. The ratio is
the build's images/s over the smaller of bare inference and the writer. On a CPU all of them share the cores, so their
CPU time per image is printed too: its sum over the number of cores is the least time a build can take. The build's own
CPU time includes its plan (a fingerprint and a few forward passes).

Two heads: a teacher with a depth head beside segmentation, whose build is compared with the time of its bare inference
and of writing what it stores, one after the other, best against best; `--heads-only` measures nothing else.

Features: a backbone whose taps are all that is stored; `--features-only TAP...` measures the first of `--teachers` with
them, best against best, and compares the bytes that `kdcache plan` predicts with those that are written.

Memory: peak resident set of builds of N and 4N records, each in a fresh process.

    python benchmarks/build.py --data camvid --json benchmarks/results/build.json
"""

import argparse
import itertools
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common import header, run, spread, synchronise, write
from kdcache.bench.timing import check_repeats
from kdcache.data import Split, open_split, prefetch
from kdcache.models import build_model
from kdcache.store import open_cache, open_writer, summarise
from kdcache.store.format.manifest_models import DepthLabels, View
from kdcache.tasks import in_metres
from kdcache.teacher import BuildOptions, Teacher, TeacherProbe, build_cache, plan_manifest
from kdcache.teacher.build.build import pack_batch
from kdcache.teacher.build.cost_estimate import estimate
from kdcache.teacher.build.render import Rendered, batches_of, render_records
from kdcache.teacher.build.shard_queue import ShardQueue
from kdcache.teacher.load.forward import place, teach

HEADS_BOUND = 1.05
"""The most that a build of two heads may take, as a multiple of bare inference and writing one after the other."""
FEATURES_BOUND, BYTES_BOUND = 0.9, 0.01
"""The least speed of a build of features over bare inference, and the most that its planned bytes may be off."""


def cycled(split: Split, count: int) -> Split:
    """Return a split with `count` samples: the first ones, repeated if there are fewer."""
    samples = itertools.islice(itertools.cycle(split.samples), count)
    named = tuple(replace(sample, id=f"{number:06d}") for number, sample in enumerate(samples))
    return Split(split.data, split.split, split.classes, named)


class Measured(NamedTuple):
    """The speed of one part over some images: images per second, and CPU milliseconds per image."""

    images_per_s: float
    cpu_ms: float  # of the whole process, per image


class Stopwatch:
    """Wall and CPU time since its creation."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def over(self, images: int) -> Measured:
        """Return the speed since the start, for a number of images."""
        cpu = time.process_time() - self._cpu
        return Measured(images / (time.perf_counter() - self._wall), 1e3 * cpu / images)


def _rendered(split: Split, index: int, options: BuildOptions) -> Rendered:
    """Return the whole image of a sample and its labels, of depth where the split has any, as a build renders them."""
    depth = DepthLabels(labelled=len(split), zoom="none") if in_metres(split.tasks) else None
    return render_records(split, View(size=options.size, pixels="stored"), [index], depth)[0]


def bare_inference(split: Split, teacher: Teacher, options: BuildOptions, count: int) -> Measured:
    """Measure the forward pass alone: uint8 pixels in memory to native logits."""
    records = [_rendered(split, index, options) for index in range(options.batch_size)]
    pixels = torch.from_numpy(np.stack([record.pixels for record in records])).to(options.device)
    batches = max(1, count // options.batch_size)
    synchronise(options.device)
    watch = Stopwatch()
    for _ in range(batches):
        teach(teacher.model, pixels, options.features, options.precision, options.device)
    synchronise(options.device)
    return watch.over(batches * options.batch_size)


def writer_alone(split: Split, teacher: Teacher, options: BuildOptions, folder: Path) -> Measured:
    """Measure the writer alone: packed arrays of one real batch in memory to synced shards."""
    manifest = plan_manifest(TeacherProbe(split, teacher, options))
    first = [_rendered(split, index, options) for index in range(options.batch_size)]
    pixels = torch.from_numpy(np.stack([record.pixels for record in first]))
    outputs = teach(teacher.model, pixels, options.features, options.precision, options.device)
    packed = {path: t.cpu().numpy() for path, t in pack_batch(outputs, manifest.heads, manifest.features).items()}
    shutil.rmtree(folder, ignore_errors=True)
    with open_writer(folder, manifest, split.ids) as writer:
        watch = Stopwatch()
        with ShardQueue(writer.manifest, writer.write_shard) as queue:
            for batch in itertools.chain.from_iterable(batches_of(manifest, shard) for shard in writer.missing):
                inputs = [replace(item, record=record) for record, item in zip(batch, first, strict=False)]
                queue.add(inputs, {path: rows[: len(inputs)] for path, rows in packed.items()})
        return watch.over(len(split))


def render_alone(split: Split, options: BuildOptions) -> Measured:
    """Measure decoding and rendering alone, with the threads of a build."""
    watch = Stopwatch()
    work = lambda index: _rendered(split, index, options)  # noqa: E731
    for _ in prefetch(work, range(len(split)), threads=options.render_threads, ahead=4 * options.batch_size):
        pass
    return watch.over(len(split))


def measure(spec: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of a build with one teacher: speed of teacher and build, and their ratio."""
    height, width = map(int, arguments.size.split("x"))
    device = torch.device("cuda" if arguments.device == "cuda" else "cpu")
    inner = open_split(arguments.data, arguments.split)
    count = arguments.records if spec.startswith("kdcache:") else max(arguments.batch_size, arguments.records // 8)
    split = cycled(inner, count)
    torch.manual_seed(0)
    taps = tuple(arguments.features_only or ())
    teacher = Teacher(build_model(spec, len(split.classes)).eval(), spec)
    place(teacher.model, device)
    options = BuildOptions(
        size=(height, width),
        views=1,
        batch_size=arguments.batch_size,
        device=device,
        render_threads=arguments.render_threads,
        features=taps,
        features_only=bool(taps),
    )

    def whole() -> Measured:
        shutil.rmtree(folder, ignore_errors=True)
        watch = Stopwatch()
        result = build_cache(split, teacher, folder, options)
        return Measured(result.images_per_second, watch.over(count).cpu_ms)

    parts: dict[str, Callable[[], Measured]] = {
        "bare_inference": lambda: bare_inference(split, teacher, options, count),
        "render_alone": lambda: render_alone(split, options),
        "writer_alone": lambda: writer_alone(split, teacher, options, folder),
        "build": whole,
    }
    turns = take_turns(parts, arguments.repeats)
    summary = summarise(open_cache(folder))
    planned = estimate(split, teacher, options).chosen.bytes if taps else None
    shutil.rmtree(folder)
    row = {
        "teacher": spec,
        "records": count,
        "threads": torch.get_num_threads(),
        **figures(turns),
        "heads": sorted(teacher.model.head_kinds),
        "planned_over_built_bytes": planned and round(planned / summary.bytes_on_disk, 5),
        "bytes_per_record": round(summary.bytes_per_record),
    }
    medians = {name: value["p50"] for name, value in row.items() if isinstance(value, dict) and "p50" in value}
    print(spec, ", ".join(f"{name} {median:.2f}" for name, median in medians.items()))
    print("  CPU ms per image:", row["cpu_ms_per_image"])
    return row


def take_turns(parts: dict[str, Callable[[], Measured]], repeats: int) -> dict[str, list[Measured]]:
    """Measure the parts in turns, after a forward pass as warm-up. Return the measurements by part."""
    parts["bare_inference"]()
    turns: dict[str, list[Measured]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, run_part in parts.items():
            turns[name].append(run_part())
    return turns


def figures(turns: dict[str, list[Measured]]) -> dict[str, Any]:
    """Return speeds, CPU milliseconds and ratios. `ratio` is turn by turn, both `build_over` take each part's best."""
    speed = {name: [of.images_per_s for of in measured] for name, measured in turns.items()}
    pairs = zip(speed["build"], speed["bare_inference"], speed["writer_alone"], strict=True)
    best = {name: max(values) for name, values in speed.items()}
    seconds = 1 / best["bare_inference"] + 1 / best["writer_alone"]
    return {
        **{f"{name}_images_per_s": spread(values) for name, values in speed.items()},
        "ratio": spread([build / min(bare, alone) for build, bare, alone in pairs]),
        "build_over_inference_and_writing": round(1 / best["build"] / seconds, 4),
        "build_over_bare_inference": round(best["build"] / best["bare_inference"], 4),
        "cpu_ms_per_image": {name: round(spread([of.cpu_ms for of in turns[name]])["p50"], 3) for name in turns},
    }


def heads_met(row: dict[str, Any]) -> bool:
    """Return whether a build of two heads takes little longer than inference and writing one after the other."""
    return bool(row["build_over_inference_and_writing"] <= HEADS_BOUND)


def features_met(row: dict[str, Any]) -> bool:
    """Return whether a build of features is about as fast as inference, and as large as planned."""
    off = abs(row["planned_over_built_bytes"] - 1)
    return bool(row["build_over_bare_inference"] >= FEATURES_BOUND and off <= BYTES_BOUND)


def peak_memory_mib(arguments: argparse.Namespace, records: int, folder: Path) -> float:
    """Return the peak memory in MiB of a build of `records` records by kdcache:tiny, in a new process."""
    command = [sys.executable, __file__, "--peak-memory", str(records), "--out", str(folder), "--data", arguments.data]
    command += ["--split", arguments.split, "--size", arguments.size, "--device", arguments.device]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(folder)
    return float(done.stdout.strip().splitlines()[-1])


def memory_counts(records: int) -> list[int]:
    """Return the two numbers of records, N and 4N, for which memory is measured."""
    return [records // 2, 2 * records]


def build_and_report_memory(arguments: argparse.Namespace) -> None:
    """Build a cache of `--peak-memory` images and print the process's peak memory in MiB."""
    height, width = map(int, arguments.size.split("x"))
    device = torch.device("cuda" if arguments.device == "cuda" else "cpu")
    split = cycled(open_split(arguments.data, arguments.split), arguments.peak_memory)
    teacher = Teacher(build_model("kdcache:tiny", len(split.classes)).eval().to(device), "kdcache:tiny")
    options = BuildOptions(size=(height, width), views=1, shard_records=32, device=device)
    build_cache(split, teacher, arguments.out, options)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Measure the build with each teacher, then its memory in fresh processes, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes:360x480,train=64,val=4")
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", default="288x384")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--records", type=int, default=256, help="for kdcache models; an eighth for the others")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--render-threads", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--teachers", nargs="+", default=["torchvision:fcn_resnet50", "kdcache:tiny"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--heads-only", metavar="TEACHER", help="only this teacher of two heads, and no memory")
    parser.add_argument("--features-only", metavar="TAP", nargs="+", help="only these taps of the first teacher")
    parser.add_argument("--peak-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check_repeats(arguments.repeats)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak_memory:
        build_and_report_memory(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "store"
        if arguments.heads_only:
            row = measure(arguments.heads_only, arguments, folder)
            met = heads_met(row)
            if arguments.json:
                write(arguments.json, {**header("build-heads"), "builds": [row], "bound": HEADS_BOUND, "met": met})
            sys.exit(0 if met else 1)
        if arguments.features_only:
            row = measure(arguments.teachers[0], arguments, folder)
            met = features_met(row)
            bounds = {"build_over_bare_inference": FEATURES_BOUND, "planned_bytes_off": BYTES_BOUND}
            if arguments.json:
                content = {"features": arguments.features_only, "builds": [row], "bounds": bounds, "met": met}
                write(arguments.json, {**header("build-features"), **content})
            sys.exit(0 if met else 1)
        rows = [measure(spec, arguments, folder) for spec in arguments.teachers]
        counts = memory_counts(arguments.records)
        memory = {str(count): peak_memory_mib(arguments, count, folder) for count in counts}
    print("peak memory, MiB over records:", memory)
    if arguments.json:
        write(arguments.json, {**header("build"), "builds": rows, "peak_memory_mib_over_records": memory})


if __name__ == "__main__":
    run(main)
