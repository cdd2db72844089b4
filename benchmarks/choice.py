"""Time numba and torch on small problems of the CPU, for the table by which `impl="auto"` chooses.

Cross-entropy plus KL at T = 2, forward and backward, on one thread, in turns, best against best. Classes that a store
keeps: all up to 32, else 8. A stride is the label pixels of a cell along an axis. The table is part of the package,
so a new one changes which arithmetic some problems take: see which choices it changes before you commit it.

    python benchmarks/choice.py --json kernels/kdcache_kernels/plain/choice.json
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import header, write
from kdcache.bench import timing
from kdcache_kernels import PackedTarget, distill_loss, pack
from kdcache_kernels.plain.choice import LEAST, MOST, ONE_CELL

FAMILIES = ("numba", "torch")
CLASSES = (2, 10, 21, 50, 100, 150, 300, 600, 1000)
CELLS = (1, 2, 4, 8, 16, 32)
"""Along an axis of an image."""
STRIDES = (1, 2, 4)
IMAGES = (1, 4, 16, 64, 256)
"""In a batch of images of one pixel."""
REPEATS = 40


def steps(batch: int, classes: int, cells: int, stride: int) -> dict[str, Callable[[], Any]]:
    """Return a function for each family of kernels that takes a step on the same tensors."""
    generator, size = torch.Generator().manual_seed(0), (cells * stride, cells * stride)
    student, teacher = (3 * torch.randn(batch, classes, cells, cells, generator=generator) for _ in range(2))
    target = PackedTarget(*pack(teacher, classes if classes <= 32 else 8), classes, size)
    labels = torch.randint(0, classes, (batch, *size), generator=generator)
    student.requires_grad_()

    def step(impl: str) -> Tensor:
        parts = distill_loss(student, labels, target, kl_weight=1.0, temperature=2.0, ignore_index=-1, impl=impl)
        return torch.autograd.grad(parts.loss, student)[0]

    return {family: partial(step, family) for family in FAMILIES}


def ratio(batch: int, classes: int, cells: int, stride: int) -> float | None:
    """Return the time of numba divided by the time of torch, or None for a problem that is too large."""
    if batch * classes * (cells * stride) ** 2 > MOST:
        return None
    contestants = steps(batch, classes, cells, stride)
    for step in contestants.values():
        timing.warm_up(step, torch.device("cpu"))
    times = timing.in_turn(contestants, REPEATS)
    return round(times["numba"].best / times["torch"].best, 2)


def main() -> None:
    """Time both families on the grid of problems, print the ratios, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    grids = {ONE_CELL: (list(IMAGES), [(images, 1, 1) for images in IMAGES])}
    for stride in STRIDES:
        grids[str(stride)] = ([(cells * stride) ** 2 for cells in CELLS], [(1, cells, stride) for cells in CELLS])
    kinds: dict[str, Any] = {}
    for kind, (pixels, shapes) in grids.items():
        kinds[kind] = {"pixels": pixels, "ratios": []}
        for classes in CLASSES:
            row = [ratio(images, classes, cells, stride) for images, cells, stride in shapes]
            kinds[kind]["ratios"].append(row)
            print(f"{kind:>8} {classes:5d} classes", *(f"{x or 0:6.2f}{'*' if (x or 0) >= LEAST else ''}" for x in row))
    if arguments.json is not None:
        write(arguments.json, {**header("choice of the CPU"), "classes": list(CLASSES), "kinds": kinds})


if __name__ == "__main__":
    main()
