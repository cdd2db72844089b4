"""What does distilling cost a training step, from the store and with the teacher in the loop?

Contestants take turns in one run, each with data, forward, loss, backward and optimizer:

    none    labels alone: the fused operation, which reads no targets
    kl      the same pixels, and targets from the store
    two     the same as kl, half of the rows from each of two streams with a loss of its own
    live    the same pixels, and a forward pass of the teacher

Peak memory is that of a fresh process per contestant (on a GPU, of its allocator). The teacher's weights are random:
its predictions do not matter to the clock. `--streams-only` compares two streams with one, best against best, and
measures nothing else.

    python benchmarks/step.py --data camvid --json benchmarks/results/step-cpu.json
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import header, random_cache, run, student_step, synchronise, write
from kdcache.bench.kernels import memory
from kdcache.bench.timing import check_repeats
from kdcache.data import open_split
from kdcache.data.folds import subset
from kdcache.distill import Criterion, Streams, pixels_of
from kdcache.errors import RecipeError
from kdcache.models import SegmentationModel, build_model
from kdcache.store import Cache, open_cache
from kdcache.teacher import BuildOptions
from kdcache.training import CacheDataset
from kdcache.training.input.loader import Draws, next_batch
from kdcache.training.input.streams import StreamDraws, feed_streams, stream_seed
from kdcache.training.step.compiled import choose_step, make_step
from kdcache.training.step.eager import Step
from live_teacher import LiveStep
from turns import Contestant, Pace, in_turn

KINDS = ("none", "kl", "two", "live")
RECORDS = 32  # of the store: the clock does not care which
MANY = 10**6  # steps that a loader offers
WARM_UPS = 2
BOUNDS = {"cpu": 1.10, "cuda": 1.05}
STREAMS_BOUND = 1.05
"""The most that a step of two streams may cost, as a multiple of one stream's with as many rows."""


def teacher_of(spec: str, classes: int) -> SegmentationModel:
    """Return a model with random weights of a fixed seed as the teacher, in eval mode."""
    torch.manual_seed(0)
    return build_model(spec, classes).eval()


def make_store(arguments: argparse.Namespace, folder: Path) -> Path:
    """Build a cache of a part of the data, with a teacher of random weights. Return its path."""
    samples = open_split(arguments.data, "train")
    split = subset(samples, range(min(RECORDS, len(samples))))
    options = BuildOptions(size=arguments.size, views=1, device=torch.device(arguments.device), fidelity=False)
    return random_cache(split, arguments.teacher, folder, options)


def batches(cache: Cache, kind: str, arguments: argparse.Namespace) -> Iterator[Any]:
    """Yield batches for a kind of step. For "two", each of two streams gives half of a batch.

    Raises: RecipeError for an odd batch size.
    """
    device = torch.device(arguments.device)
    count = 2 if kind == "two" else 1
    if arguments.batch_size % count:
        problem = f"Cannot share a batch of {arguments.batch_size} rows equally between two streams"
        raise RecipeError(problem, fix="Use an even --batch-size.")
    streams = [
        StreamDraws(
            f"s{number}" if count > 1 else "",
            Draws(CacheDataset(cache, augment="warp", targets=kind in ("kl", "two")), stream_seed(0, number)),
            arguments.batch_size // count,
        )
        for number in range(count)
    ]
    return feed_streams(streams, device, first=0, last=MANY, workers=arguments.workers)


def make(cache: Cache, kind: str, batch: Streams, arguments: argparse.Namespace) -> Step:
    """Return the step of a kind: without a teacher, from the cache, from two streams, or with a live teacher."""
    device = torch.device(arguments.device)
    way = choose_step("auto", device)
    capturable = way == "graphed" and kind != "live"
    kl_weight = 0.0 if kind == "none" else 1.0
    eager = student_step(cache, arguments.student, device, kl_weight=kl_weight, capturable=capturable)
    if kind == "two":
        (loss,) = eager.criterion.losses
        eager.criterion = Criterion([loss, copy.deepcopy(loss)], ["s0", "s1"], [0.5, 0.5]).to(device)
    if kind == "live":
        return LiveStep(eager, teacher_of(arguments.teacher, cache.num_classes))
    return make_step(way, eager, batch, print)


@dataclass
class Learner:
    """Takes a number of steps when it is called. The first ones have already run.

    Attributes:
        step: the step.
        source: the batches.
        size: shape of a batch's pixels, (B, H, W, 3).
        device: the device.
    """

    step: Step
    source: Iterator[Any]
    size: tuple[int, ...]
    device: torch.device

    def __post_init__(self) -> None:
        self(WARM_UPS)

    def __call__(self, count: int) -> None:
        """Take steps, and wait until the device has done them."""
        for _ in range(count):
            self.step(next_batch(self.source))
        synchronise(self.device)

    def contestant(self, kind: str, steps: int) -> Contestant:
        """Return a contestant whose turn is `steps` steps. Its time is per step."""
        return Contestant(kind, partial(self, steps), steps, size=self.size)


def learner(cache: Cache, kind: str, arguments: argparse.Namespace) -> Learner:
    """Return a learner that takes steps of a kind."""
    source = batches(cache, kind, arguments)
    batch = next_batch(source)
    size, step = tuple(pixels_of(batch).shape), make(cache, kind, batch, arguments)
    return Learner(step, source, size, torch.device(arguments.device))


def peak_mib(cache: Cache, kind: str, arguments: argparse.Namespace) -> float:
    """Return the peak memory in MiB of this process, which only takes steps."""

    def work() -> None:
        learner(cache, kind, arguments)(4)

    peak = memory.peak_on_device if arguments.device == "cuda" else memory.peak_in_process
    return round(peak(work), 1)


def peak_elsewhere(store: Path, kind: str) -> float:
    """Return the peak memory of a kind of step in MiB, measured in a new process."""
    command = [sys.executable, *sys.argv, "--store", str(store), "--weigh", kind]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(answer.splitlines()[-1]))


def race(store: Path, kinds: Sequence[str], arguments: argparse.Namespace) -> dict[str, Pace]:
    """Let the contestants take turns. Return the pace of each."""
    learners = {kind: learner(open_cache(store), kind, arguments) for kind in kinds}
    return in_turn([of.contestant(kind, arguments.steps) for kind, of in learners.items()], arguments.repeats)


def compare_streams(paces: dict[str, Pace]) -> dict[str, Any]:
    """Return the ratio of a step of two streams to a step of one stream with as many rows."""
    single, double = paces["kl"].time, paces["two"].time
    ratio = double.best / single.best
    print(f"two streams over one: best {ratio:.4f}, medians {double.p50 / single.p50:.4f}")
    return {
        "two_streams_over_one": round(ratio, 4),
        "two_streams_over_one_by_medians": round(double.p50 / single.p50, 4),
        "streams_bound": STREAMS_BOUND,
        "streams_met": ratio <= STREAMS_BOUND,
    }


def measure(store: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds and peak memory of a step of each kind, and whether the bound is met."""
    paces = race(store, KINDS, arguments)
    peaks = {kind: peak_elsewhere(store, kind) for kind in KINDS}
    return result(paces, peaks, BOUNDS[arguments.device])


def result(paces: dict[str, Pace], peaks: dict[str, float], bound: float) -> dict[str, Any]:
    """Return milliseconds per step, peaks in MiB, and ratios. Ratios are of medians, for two streams of best times.

    `bound` is the most that a step from the cache may cost, as a multiple of a step without targets.
    """
    ms = {kind: pace.time.p50 for kind, pace in paces.items()}
    for kind, peak in peaks.items():
        print(f"{kind}: {ms[kind]:.1f} ms a step, {ms[kind] / ms['none']:.3f} of none, peak {peak} MiB")
    return {
        "ms_per_step": {kind: vars(pace.time) for kind, pace in paces.items()},
        "kl_over_none": round(ms["kl"] / ms["none"], 4),
        "bound": bound,
        "met": ms["kl"] <= bound * ms["none"],
        **compare_streams(paces),
        "live_over_none": round(ms["live"] / ms["none"], 3),
        "live_over_kl": round(ms["live"] / ms["kl"], 3),
        "peak_mib": peaks,
    }


def main() -> None:
    """Measure all kinds of steps, write the result file, and exit with 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", default="torchvision:fcn_resnet50")
    parser.add_argument("--student", default="torchvision:lraspp_mobilenet_v3_large")
    parser.add_argument("--size", type=lambda text: tuple(map(int, text.split("x"))), default=(288, 384))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--store", type=Path, help="built already")
    parser.add_argument("--weigh", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--streams-only", action="store_true", help="two streams beside one, and nothing else")
    parser.add_argument("--no-bounds", action="store_true", help="exit with 0 whatever was measured, for dry runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_repeats(arguments.repeats)
    if arguments.weigh:
        print(peak_mib(open_cache(arguments.store), arguments.weigh, arguments))
        return
    with tempfile.TemporaryDirectory() as work:
        store = arguments.store or make_store(arguments, Path(work, "store.zarr"))
        if arguments.streams_only:
            paces = race(store, ("kl", "two"), arguments)
            results = {"ms_per_step": {kind: vars(pace.time) for kind, pace in paces.items()}, **compare_streams(paces)}
        else:
            results = measure(store, arguments)
    if arguments.json is not None:
        settings = {"teacher": arguments.teacher, "student": arguments.student, "size": list(arguments.size)}
        write(arguments.json, {**header("step"), **settings, "batch_size": arguments.batch_size, **results})
    sys.exit(0 if arguments.no_bounds or is_met(results) else 1)


def is_met(results: dict[str, Any]) -> bool:
    """Return whether all bounds that were measured are met."""
    return bool(results.get("met", True) and results["streams_met"])


if __name__ == "__main__":
    run(main)
