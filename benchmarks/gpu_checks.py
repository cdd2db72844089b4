"""Check the kernels on a GPU first: whether they are right, how fast the GPU is, and which tiling of cells suits it.

    once       launch every Triton kernel, with NaN in outputs and scratch, and compare it with float64
    ceilings   copied bytes and exponentials per second
    rows       time the loss by rows of cells per program and by limits of registers
    launch     take one step of each case, for ncu
    ncu        turn the CSV of `ncu --import REPORT --csv --page raw` into JSON

    python benchmarks/gpu_checks.py once --json benchmarks/results/once-h100.json

Without a GPU, all of it runs in Triton's interpreter, at few points, and times say nothing. Each result is written when
it is there.
"""

import argparse
import csv
import importlib
import itertools
import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import KernelInterface

from common import header
from kdcache.bench import timing
from kdcache.bench.kernels import EVERY, CheckSettings, Settings, check, parse_names, parse_shapes, roofline
from kdcache.bench.kernels.accuracy import Point
from kdcache.bench.kernels.inputs import make_inputs
from kdcache.bench.kernels.rivals import ours
from kdcache.bench.kernels.shapes import KINDS, Case
from kdcache_kernels import (
    PackedTarget,
    densify,
    distill_denominators,
    gpu,
    pack,
    relation_loss,
    target_argmax_confidence,
)
from kdcache_kernels.gpu import cells
from precompile import REGISTERS, TUNED, tiled

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROWS = range(2, 13) if CUDA else (2,)
EXP_ROUNDS, EXP_BLOCK = 4096 if CUDA else 2, 1024
REPEATS = 30 if CUDA else 1


def save(path: Path | None, theme: str, **content: Any) -> None:
    """Write the results that exist so far, unless `path` is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**_header(theme), **content}, indent=1) + "\n", encoding="utf-8")


_header = cache(header)


def time_step(step: Callable[[], Any]) -> timing.Spread:
    """Time a step that has already run once. On a GPU it runs as a CUDA graph."""
    return timing.as_graph(step, REPEATS) if CUDA else timing.in_turn({"step": step}, REPEATS)["step"]


# --- once --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Few(CheckSettings):
    """The settings of `bench-kernels --check` for every `of`-th point of its grid."""

    of: int

    def points(self) -> Iterator[Point]:
        """Yield every `of`-th point of the accuracy grid."""
        return itertools.islice(super().points(), 0, None, self.of)


def watch_kernels() -> dict[str, int]:
    """Return a dict that counts the launches of each kernel of the package from now on, by name."""
    launches: dict[str, int] = {}
    for module in pkgutil.walk_packages(gpu.__path__, f"{gpu.__name__}."):
        if module.name.endswith(".offline"):
            continue  # importing it is enough to change Triton
        for name, kernel in vars(importlib.import_module(module.name)).items():
            if isinstance(kernel, KernelInterface) and name.endswith("_kernel") and name not in launches:
                launches[name] = 0
                kernel.add_pre_run_hook(partial(_count, launches, name))  # type: ignore[attr-defined]
    return launches


def _count(launches: dict[str, int], name: str, *_: object, **__: object) -> None:
    launches[name] += 1


def other_operators(classes: int, kept: int) -> Iterator[tuple[str, float, float]]:
    """Yield (name, error, bound) for the operators that the accuracy grid does not call."""
    generator = torch.Generator().manual_seed(classes)
    student, teacher = (3 * torch.randn(2, classes, 5, 7, generator=generator) for _ in range(2))
    values, indices, tail = pack(teacher.double(), kept, impl="reference")
    exact = PackedTarget(values, indices, tail, classes, (20, 28))
    target = exact.to(DEVICE)
    packed = _twice(lambda: pack(teacher.to(DEVICE), kept, impl="triton")[0])
    yield "pack", relative_error(packed, values), 1e-3
    dense = densify(values, indices, tail, classes, torch.float64, impl="reference")
    densified = _twice(lambda: densify(target.values, target.indices, target.tail, classes, impl="triton"))
    yield "densify", relative_error(densified, dense), 1e-6
    _, confidence = target_argmax_confidence(exact, (20, 28), impl="reference")
    found = _twice(lambda: target_argmax_confidence(target, (20, 28), impl="triton")[1])
    yield "confidence", relative_error(found, confidence), 1e-3
    labels = torch.randint(0, classes, (2, 20, 28), generator=generator).to(torch.uint8)
    counted = distill_denominators(labels, exact, num_classes=classes, impl="reference")
    counts = _twice(partial(_denominators, labels.to(DEVICE), target, classes))
    yield "denominators", relative_error(counts, torch.stack(counted)), 1e-6
    window = torch.tensor([[3.0, 2.0, 18.0, 25.0]] * 2, dtype=torch.float64)
    for name, logits, place in (
        ("relations", student, None),
        ("relations through windows", student, window),
        ("relations of another size", student[..., 1:, 1:].contiguous(), None),
    ):
        gradient = _twice(partial(_relations, logits.to(DEVICE), dense.float().to(DEVICE), place, "triton"))
        yield name, relative_error(gradient, _relations(logits.double(), dense, place, "reference")), 1e-4


def _denominators(labels: Tensor, target: PackedTarget, classes: int) -> Tensor:
    return torch.stack(distill_denominators(labels, target, num_classes=classes, impl="triton"))


def _relations(student: Tensor, teacher: Tensor, window: Tensor | None, impl: str) -> Tensor:
    leaf = student.requires_grad_()
    place = None if window is None else window.to(leaf.device)
    options: dict[str, Any] = {"view_size": (20, 28), "size": (20, 28), "temperature": 2.0, "window_B4": place}
    return torch.autograd.grad(3 * relation_loss(leaf, teacher, **options, impl=impl), leaf)[0]


def _twice(compute: Callable[[], Tensor]) -> Tensor:
    """Return a result, or infinities if a second one has other bits."""
    first, second = compute(), compute()
    return first if torch.equal(first, second) else torch.full_like(first, float("inf"))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error divided by the largest value. NaN counts as infinite."""
    error = (actual.cpu().double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(error.nan_to_num(nan=float("inf")))


def once(path: Path | None, of: int) -> int:
    """Print and write the result of each check. Return how many failed.

    A kernel that was not launched counts as failed.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new tensors with NaN
    assert torch.empty(1, device=DEVICE).isnan().all()
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    launches = watch_kernels()
    rows: list[dict[str, Any]] = []
    failed: list[str] = []

    def add(name: str, passed: bool, **figures: Any) -> None:
        rows.append({"check": name, "passed": passed, **figures})
        if not passed:
            failed.append(name)
            print(f"FAILED {name}: {figures}", flush=True)
        save(path, "kernels once", complete=False, failed=failed, launches=launches, rows=rows)

    dtypes = ("fp32", "fp16", "bf16") if CUDA else ("fp32", "fp16")  # the interpreter truncates bf16
    for judged in check(Few(DEVICE, impl="triton", dtypes=dtypes, every=EVERY, of=of)):
        figures = judged.to_json()
        add(" ".join(f"{key}={value}" for key, value in vars(judged.point).items()), figures.pop("passed"), **figures)
    for classes, kept in ((21, 21), (33, 8)):
        for name, error, bound in other_operators(classes, kept):
            add(f"{name}, {kept} of {classes} classes", error <= bound, error=error, bound=bound)
    if not CUDA:
        launches.pop("scale_kernel", None)  # gradients are scaled by PyTorch there
    idle = sorted(name for name, count in launches.items() if not count)
    add("every kernel was launched", not idle, never=idle)
    save(path, "kernels once", complete=True, failed=failed, launches=launches, rows=rows)
    print(f"{len(launches) - len(idle)} of {len(launches)} kernels, {len(rows)} checks, {len(failed)} failed")
    return len(failed)


# --- ceilings ----------------------------------------------------------------------------------------------


@triton.jit
def exp2_loop(out_ptr, rounds, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write x after `rounds` exponentials. x = 2**-x has a fixed point, so nothing overflows."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (offs % 64).to(tl.float32) * 0.01
    for _ in range(rounds):
        x = tl.exp2(-x)
    tl.store(out_ptr + offs, x)


def ceilings(path: Path | None) -> int:
    """Measure the rates by which the roofline divides, and the exponentials that it derives from the clock."""
    programs = 64 * torch.cuda.get_device_properties(DEVICE).multi_processor_count if CUDA else 1
    out = torch.empty(programs * EXP_BLOCK, device=DEVICE)

    def exponentials() -> None:
        exp2_loop[(programs,)](out, EXP_ROUNDS, BLOCK=EXP_BLOCK, num_warps=4)

    timing.warm_up(exponentials, DEVICE)
    measured = programs * EXP_BLOCK * EXP_ROUNDS / time_step(exponentials).best * 1e3
    result = {**(roofline.measure_ceilings().to_json() if CUDA else {}), "exps_measured": measured}
    save(path, "ceilings", **result)
    print(", ".join(f"{name} {value:.3g}/s" for name, value in result.items()))
    return 0


# --- rows --------------------------------------------------------------------------------------------------


def cases(shapes: str, kinds: str) -> Iterator[Case]:
    """Yield the cases of `bench-kernels` for these shapes and kinds, in this device's usual dtype."""
    dtype = "bf16" if CUDA else "fp32"
    yield from Settings(DEVICE, parse_shapes(shapes), (dtype,), kinds=parse_names(kinds, "--case", KINDS)).cases()


def tune(path: Path | None, shapes: str, kinds: str) -> int:
    """Time forward and backward with each tiling, and with the package's own choice (None)."""
    rows: list[dict[str, Any]] = []
    for case in cases(shapes, kinds):
        inputs = make_inputs(case, DEVICE)
        for registers, height in itertools.product((None, *REGISTERS), (None, *ROWS)):
            if registers is None and height is not None:
                continue
            with tiled(rows=height, registers=registers):
                step = ours(case, inputs, "triton").step
                step()
                time = time_step(step)
            rows.append(
                {"case": str(case), "rows": height, "registers": registers, "ms": time.p50, "best_ms": time.best}
            )
        save(path, "rows by registers", default_registers=cells.REGISTERS, rows=rows)
        best = min((row for row in rows if row["case"] == str(case)), key=lambda row: row["ms"])
        print(f"{case}: {best['ms']:.4f} ms at {best['rows']} rows, {best['registers']} registers", flush=True)
    return 0


# --- launch, ncu -------------------------------------------------------------------------------------------


def launch(shapes: str, kinds: str) -> int:
    """Run one step of each case."""
    for case in cases(shapes, kinds):
        ours(case, make_inputs(case, DEVICE), "triton").step()
    if CUDA:
        torch.cuda.synchronize()
    return 0


def read_ncu(path: Path | None, report: Path) -> int:
    """Write the figures of each launch in a report of ncu, with numbers as numbers."""
    with report.open(newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.startswith('"')]  # what programs print comes between
    units, *launches = csv.DictReader(lines)
    result = [{key: _number(value) for key, value in row.items() if value} for row in launches]
    save(path, "ncu", units={key: unit for key, unit in units.items() if unit}, launches=result)
    for row in result:
        print(row.get("Kernel Name"), row.get("gpu__time_duration.sum"), units.get("gpu__time_duration.sum"))
    return 0


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def main() -> None:
    """Run the check that the arguments choose, and exit with its code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("once", "ceilings", "rows", "launch", "ncu"))
    parser.add_argument("report", type=Path, nargs="?", help="CSV of ncu")
    parser.add_argument("--shapes", default=TUNED, help="as in bench-kernels")
    parser.add_argument("--case", default="plain", help="as in bench-kernels")
    parser.add_argument("--of", type=int, default=11 if CUDA else 301, help="once: take one of so many points")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.what == "ncu" and (given.report is None or not given.report.is_file()):
        sys.exit(f"Report not found: {given.report}. Fix: name the CSV of ncu --import REPORT --csv --page raw.")
    work: dict[str, Callable[[], int]] = {
        "once": partial(once, given.json, given.of),
        "ceilings": partial(ceilings, given.json),
        "rows": partial(tune, given.json, given.shapes, given.case),
        "launch": partial(launch, given.shapes, given.case),
        "ncu": partial(read_ncu, given.json, given.report),
    }
    sys.exit(min(1, work[given.what]()))


if __name__ == "__main__":
    main()
