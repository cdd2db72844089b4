"""How many steps a second, eager, compiled and as a CUDA graph; and what the loss takes of one.

    steps     one batch that is on the device already, learnt from again and again: forward, loss, backward, optimizer.
              The ways take turns within one run.
    profile   an eager step with impl="reference" and with impl="auto", part by part: time by torch.profiler (of the
              kernels on a GPU, of the operators on a CPU).

Without --cache, a store of procedural scenes and a random teacher is built first.

    python benchmarks/steps.py --device cpu --json benchmarks/results/steps-cpu.json
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import default_collate

from common import header, random_cache, run, spread, student_step, synchronise, write
from kdcache.bench.timing import check_repeats
from kdcache.data import open_split
from kdcache.distill import Batch, Streams, pixels_of
from kdcache.store import Cache, open_cache
from kdcache.teacher import BuildOptions
from kdcache.training import CacheDataset
from kdcache.training.input.loader import Draws
from kdcache.training.step.compiled import make_step
from kdcache.training.step.eager import EagerStep, Step

IMPLEMENTATIONS = ("reference", "auto")
PROFILED = 5
"""Repetitions of a part under the profiler."""


def first_batch(cache: Cache, batch_size: int) -> Streams:
    """Return the first batch that a training with seed 0 draws from a cache."""
    draws = Draws(CacheDataset(cache), 0)
    batch: Batch = default_collate([draws[number] for number in range(batch_size)])
    return (batch,)


def fresh_step(cache: Cache, arguments: argparse.Namespace, *, impl: str = "auto", graphed: bool = False) -> EagerStep:
    """Return a step of a new student whose loss runs with the family of kernels `impl`."""
    return student_step(cache, arguments.student, torch.device(arguments.device), impl=impl, capturable=graphed)


# --- steps -------------------------------------------------------------------------------------------------


def measure_steps(cache: Cache, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each kind of step: steps per second, and seconds until the first step was ready."""
    device = torch.device(arguments.device)
    rows: list[dict[str, Any]] = []
    steps: list[Step] = []
    for kind in kinds(device):
        eager = fresh_step(cache, arguments, graphed=kind == "graphed")
        batch = eager.to_device(first_batch(cache, arguments.batch_size))
        synchronise(device)
        notes: list[str] = []
        began = time.perf_counter()
        steps.append(make_step(kind, eager, batch, notes.append))
        synchronise(device)
        rows.append({"step": kind, "prepared_s": round(time.perf_counter() - began, 2), "notes": notes})
    counts = [max(3, round(arguments.seconds * rate(step, batch, device, 3))) for step in steps]
    rates: list[list[float]] = [[] for _ in steps]
    for _ in range(arguments.repeats):
        for values, step, count in zip(rates, steps, counts, strict=True):
            values.append(rate(step, batch, device, count))
    return [row | figures for row, figures in zip(rows, compare(rows, rates), strict=True)]


def compare(rows: list[dict[str, Any]], rates: list[list[float]]) -> list[dict[str, Any]]:
    """Return steps per second of each kind, and the median ratio to the first kind, which is eager."""
    found = []
    for row, values in zip(rows, rates, strict=True):
        rate_of = spread(values)
        over = round(rate_of["p50"] / spread(rates[0])["p50"], 3)
        print(f"{row['step']}: {rate_of['p50']:.1f} steps/s, {over:.2f} of eager", *row["notes"])
        found.append({"steps_per_s": rate_of, "over_eager": over})
    return found


def kinds(device: torch.device) -> tuple[str, ...]:
    """Return the kinds of steps that a device can run."""
    return ("eager", "compiled", "graphed") if device.type == "cuda" else ("eager", "compiled")


def rate(step: Step, batch: Streams, device: torch.device, count: int) -> float:
    """Return the steps per second over `count` steps after the first one."""
    step(batch)
    synchronise(device)
    began = time.perf_counter()
    for _ in range(count):
        step(batch)
    synchronise(device)
    return count / (time.perf_counter() - began)


# --- profile -----------------------------------------------------------------------------------------------


def measure_parts(cache: Cache, arguments: argparse.Namespace, impl: str) -> dict[str, Any]:
    """Return milliseconds of student, loss and optimizer in an eager step."""
    device = torch.device(arguments.device)
    eager = fresh_step(cache, arguments, impl=impl)
    batch = eager.to_device(first_batch(cache, arguments.batch_size))
    leaf = logits_of(eager, batch).detach().requires_grad_()

    def loss() -> torch.Tensor:
        return torch.autograd.grad(eager.criterion(leaf, batch).loss, leaf)[0]

    gradient = loss()

    def student() -> None:
        torch.autograd.backward(logits_of(eager, batch), gradient)

    parts = {"student": student, "loss": loss, "optimizer": eager.optimizer.step}
    return shares(impl, {name: busy_ms(part, device) for name, part in parts.items()})


def shares(impl: str, times: dict[str, float]) -> dict[str, Any]:
    """Return milliseconds by part of a step, and the loss's share of their sum."""
    share = times["loss"] / sum(times.values())
    listed = ", ".join(f"{name} {value:.2f} ms" for name, value in times.items())
    print(f"impl={impl}: {listed}; the loss is {100 * share:.1f} %")
    rounded = {name: round(value, 4) for name, value in times.items()}
    return {"impl": impl, "ms": rounded, "loss_share": round(share, 4)}


def logits_of(eager: EagerStep, batch: Streams) -> torch.Tensor:
    """Return the student's logits at native stride, under autocast as in `fresh_step`."""
    x_B3HW = eager.model.normalise(pixels_of(batch))
    with torch.autocast(eager.device.type, torch.bfloat16, enabled=eager.device.type == "cuda"):
        return eager.model(x_B3HW).logits


def busy_ms(part: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds of all kernels (on a CPU: operators) that a call runs."""
    part()
    synchronise(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])) as profiler:
        for _ in range(PROFILED):
            part()
        synchronise(device)
    events = profiler.key_averages()
    if cuda:
        total = sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA)
    else:
        total = sum(event.self_cpu_time_total for event in events)
    return float(total) / 1e3 / PROFILED


def main() -> None:
    """Measure steps and the loss's share of one, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cache", type=Path, help="default: a cache of scenes, built for this run")
    parser.add_argument("--size", default="144x192", help="of the scenes")
    parser.add_argument("--top-k", type=int, help="of the store of scenes; default dense")
    parser.add_argument("--student", default="kdcache:tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement of steps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    check_repeats(arguments.repeats)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        height, width = map(int, arguments.size.split("x"))
        scenes = open_split(f"scenes:{arguments.size},train=32", "train")
        options = BuildOptions(size=(height, width), views=1, top_k=arguments.top_k)
        store = Path(scratch) / "cache.zarr"
        cache = open_cache(arguments.cache or random_cache(scenes, "kdcache:base", store, options))
        settings = {
            "student": arguments.student,
            "batch_size": arguments.batch_size,
            "size": list(cache.view_size),
            "classes": cache.num_classes,
            "kept": cache.head.k,
            "threads": torch.get_num_threads(),
        }
        result = {
            "settings": settings,
            "steps": measure_steps(cache, arguments),
            "profile": [measure_parts(cache, arguments, impl) for impl in IMPLEMENTATIONS],
        }
    if arguments.json:
        write(arguments.json, {**header("steps"), **result})


if __name__ == "__main__":
    run(main)
