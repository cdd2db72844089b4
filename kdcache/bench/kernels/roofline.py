"""Compute the least time that a GPU needs for a case of the kernels.

A case has three floors, from the machine code for sm_90 (`benchmarks/results/sass-sm90.md`). A fraction is floor over
measured median. The largest floor is the bound. State a GPU figure as a fraction of it.

- bytes: logits, target and labels read once, the gradient written once, over the speed of a copy in the same run.
- sfu: exponentials over the rate of the special function units. Both walks over the classes compute them. Inside a cell
  of stride s the logits are bilinear, so 4 exponentials per walk, class and tensor replace s*s (16 at s = 8, in four
  turns): 1.0 per class-pixel at s = 4. Elsewhere there is one per walk and softmax. At T = 1, 2, 3, 4 one
  softmax of the student gives the other by multiplication.
- issue: instructions over the issue rate. At s = 4 and 21 classes there are 29 per class-pixel, at 150 classes 25.

A multiprocessor of compute capability 7.x to 10.x has 16 special function lanes and issues 128 lanes per clock. At
16x21x512x512/4 on an H200 the floors are 8, 22 and 77 microseconds: the bound is issue. A gate's own pass over the
target is in none of them.

The loss on cells: two exponentials and INSTRUCTIONS_PER_CLASS_CELL per class-cell, and no label.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kdcache.bench import timing
from kdcache.bench.kernels.shapes import KINDS, Case

CELLS = {2: (51.8, 155.0, 4), 4: (23.4, 96.4, 16), 8: (23.3, 96.3, 16)}
"""By stride: instructions of the loops per class-pixel, others per pixel, and the pixels that share exponentials."""
PIXELS, TILES = 25.4, 45.0
"""Instructions per class-pixel of the kernels for stride 1 and for any window: their loops, without the rest."""
HALO = 32 / 31
"""One lane of 32 does a cell for its neighbour."""
WALKS = 2
SFU_LANES, LANES_PER_SFU_LANE = 16, 8
INSTRUCTIONS_PER_CLASS_CELL = 180
"""Instructions of the loops over the classes, on whole views, as compiled for sm_90."""
COPY_BYTES, CEILING_REPEATS = 2**30, 20


@dataclass(frozen=True)
class Ceilings:
    """The highest speeds of one GPU.

    Attributes:
        copy_bytes: bytes read and written per second by a copy.
        exps: exponentials per second.
    """

    copy_bytes: float
    exps: float

    @property
    def instructions(self) -> float:
        """The instructions per second that the GPU can issue, counted per lane (thread)."""
        return LANES_PER_SFU_LANE * self.exps

    def to_json(self) -> dict[str, float]:
        """Return a dict of the speeds per second: "copy_bytes", "exps" and "instructions"."""
        return {"copy_bytes": self.copy_bytes, "exps": self.exps, "instructions": self.instructions}


@dataclass(frozen=True)
class Work:
    """The least numbers of bytes, exponentials and instructions that one forward and backward of a loss needs."""

    bytes: float
    exps: float
    instructions: float


def least_work(case: Case) -> Work:
    """Return the least work of one forward and backward of the fused kernel for a case.

    The bytes are those of each input and of the gradient, moved once. The exponentials and instructions are the numbers
    that the compiled kernel for sm_90 needs, counted in its machine code.
    """
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
    if shape.divides and shape.stride in CELLS and not KINDS[case.kind].drawn:
        of_class, once, sharing = CELLS[shape.stride]
        pixels = B * (h + 1) * (w + 1) * shape.stride**2 * HALO
        return Work(
            bytes=touched,
            exps=WALKS * softmaxes * 4 / sharing * C * pixels,
            instructions=(of_class * C + once) * pixels,
        )
    of_class = PIXELS if shape.divides and shape.stride == 1 and not KINDS[case.kind].drawn else TILES
    return Work(
        bytes=touched,
        exps=WALKS * softmaxes * shape.class_pixels,
        instructions=of_class * shape.class_pixels,
    )


def fractions(work: Work, ceilings: Ceilings, milliseconds: float) -> dict[str, float]:
    """Return the least possible time for bytes, exponentials and instructions, each divided by the measured time.

    `work` has the three numbers, `ceilings` has the GPU's speeds, and `milliseconds` is the measured time. The keys are
    "bytes", "sfu" (exponentials) and "issue" (instructions). 1 means that the measured time is the least possible.
    """
    floors = {
        "bytes": work.bytes / ceilings.copy_bytes,
        "sfu": work.exps / ceilings.exps,
        "issue": work.instructions / ceilings.instructions,
    }
    return {name: floor / (milliseconds / 1e3) for name, floor in floors.items()}


def measure_ceilings() -> Ceilings:
    """Return the highest speeds of the current CUDA device.

    The copy speed is the best of 20 measurements. The exponentials per second are computed from the GPU's clock rate.
    """
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy: Callable[[], Any] = partial(target.copy_, source)
    for _ in range(3):
        copy()
    copy_ms = timing.on_device(copy, CEILING_REPEATS).best
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    exps = SFU_LANES * properties.multi_processor_count * 1e3 * properties.clock_rate
    return Ceilings(copy_bytes=2 * COPY_BYTES / copy_ms * 1e3, exps=exps)
