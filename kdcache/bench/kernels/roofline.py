"""Limits of a GPU, and the least work of a case.

Three floors for our kernel, after the mathematics of its fast path. A fraction is floor / measured median, and the
largest one shows what binds:

- bytes: logits, target and labels read once, the gradient written once, over the speed of a copy in the same run.
- sfu: exponentials over the rate of the special function units. Inside a cell of stride s the logits are bilinear, so 4
  exponentials per cell, class and tensor replace s*s: 0.5 per class-pixel at s = 4. Elsewhere, as through a window that
  is drawn, it is one per softmax. At T = 1, 2, 3, 4 one softmax of the student gives the other by multiplication.
- issue: 20 instructions per class-pixel over the issue rate.

A multiprocessor of compute capability 7.x to 10.x has 16 special function lanes and issues 128 lanes per clock. At
16x21x512x512/4 on an H200 that predicts 8, 11 and 53 microseconds: the kernel is bound by issue. A gate's own pass over
the target is in none of them.

The loss on cells: two exponentials and INSTRUCTIONS_PER_CLASS_CELL per class-cell, and no label.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kdcache.bench import timing
from kdcache.bench.kernels.shapes import KINDS, Case

INSTRUCTIONS_PER_CLASS_PIXEL = 20
SFU_LANES, LANES_PER_SFU_LANE = 16, 8
INSTRUCTIONS_PER_CLASS_CELL = 180
"""Instructions of the loops over the classes, on whole views, as compiled for sm_90."""
CELL_STRIDES = (2, 4, 8)
COPY_BYTES, CEILING_REPEATS = 2**30, 20


@dataclass(frozen=True)
class Ceilings:
    """Speeds of one device, per second."""

    copy_bytes: float
    exps: float

    @property
    def instructions(self) -> float:
        """Lanes that could issue an instruction."""
        return LANES_PER_SFU_LANE * self.exps

    def to_json(self) -> dict[str, float]:
        """Plain numbers."""
        return {"copy_bytes": self.copy_bytes, "exps": self.exps, "instructions": self.instructions}


@dataclass(frozen=True)
class Work:
    """The least that one forward and backward must do."""

    bytes: float
    exps: float
    instructions: float


def least_work(case: Case) -> Work:
    """Return the work of the fused kernel's fast path; see the module's docstring."""
    shape = case.shape
    h, w = shape.native
    B, C = shape.batch, shape.num_classes
    logit_bytes = 4 if case.dtype == "fp32" else 2
    kept_bytes = 2 * case.k + (0 if case.k == C else case.k * (1 if C <= 256 else 2) + 2)
    touched = B * h * w * (2 * C * logit_bytes + kept_bytes)
    if KINDS[case.kind].on_cells:
        class_cells = B * h * w * C
        return Work(bytes=touched, exps=2 * class_cells, instructions=INSTRUCTIONS_PER_CLASS_CELL * class_cells)
    touched += B * shape.height * shape.width * (1 if shape.ignore_index == 255 else 2)
    softmaxes = 2 if case.temperature in (1, 2, 3, 4) else 3  # then exp(u) = exp(u / T)**T serves both temperatures
    cells = shape.divides and shape.stride in CELL_STRIDES and not KINDS[case.kind].drawn
    per_class_pixel = softmaxes * 4 / shape.stride**2 if cells else softmaxes
    return Work(
        bytes=touched,
        exps=per_class_pixel * shape.class_pixels,
        instructions=INSTRUCTIONS_PER_CLASS_PIXEL * shape.class_pixels,
    )


def fractions(work: Work, ceilings: Ceilings, milliseconds: float) -> dict[str, float]:
    """Return each floor over the time that was measured; 1 is the floor itself."""
    floors = {
        "bytes": work.bytes / ceilings.copy_bytes,
        "sfu": work.exps / ceilings.exps,
        "issue": work.instructions / ceilings.instructions,
    }
    return {name: floor / (milliseconds / 1e3) for name, floor in floors.items()}


def measure_ceilings() -> Ceilings:
    """Measure the copy of the current CUDA device, best of 20; its exponentials follow from its clock."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy: Callable[[], Any] = partial(target.copy_, source)
    for _ in range(3):
        copy()
    copy_ms = timing.on_device(copy, CEILING_REPEATS).best
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    exps = SFU_LANES * properties.multi_processor_count * 1e3 * properties.clock_rate
    return Ceilings(copy_bytes=2 * COPY_BYTES / copy_ms * 1e3, exps=exps)
