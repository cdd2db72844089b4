"""Limits of a GPU: ceilings measured in the same run, and the least work of a case.

Three floors for our kernel, after the mathematics of its fast path; a fraction is floor / measured median, and the
largest one shows what binds:

- bytes: logits, target and labels read once, the gradient written once, over the speed of a copy.
- sfu: exponentials over the speed of an exp2 loop. Inside a cell of stride s the logits are bilinear, so 4 exponentials
  per cell, class and tensor replace s*s: 0.5 per class-pixel at s = 4. Elsewhere, as through a window that is drawn, it
  is one per softmax. At T = 1, 2, 3, 4 one softmax of the student gives the other by multiplication.
- issue: 20 instructions per class-pixel over the issue rate. A multiprocessor of compute capability 7.x to 10.x issues
  128 lanes per clock and has 16 special function lanes, so its issue rate is 8 times the measured exp rate, at the same
  clock.

At 16x21x512x512/4 on an H200 that predicts 8, 11 and 53 microseconds: the kernel is bound by issue. A gate's own pass
over the target is in none of them.

The loss of relations: two exponentials and INSTRUCTIONS_PER_CLASS_CELL per class-cell, and no label.

For a rival only the bytes count: those its operations touch (`bytes_per_class_pixel`), for eager at T = 2 156 per
class-pixel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdcache.bench import timing
from kdcache.bench.kernels.inputs import make_inputs
from kdcache.bench.kernels.rivals import prepare
from kdcache.bench.kernels.shapes import KINDS, Case

INSTRUCTIONS_PER_CLASS_PIXEL = 20
LANES_PER_SFU_LANE = 8
INSTRUCTIONS_PER_CLASS_CELL = 180
"""Those of the loops over the classes, of whole views, as compiled for sm_90."""
COMPILED_BYTES_PER_CLASS_PIXEL = {"distill": 33}
"""By `Kind.loss`. Inductor writes both upsampled tensors and two gradients in float32 and reads them again."""
CELL_STRIDES = (2, 4, 8)
COPY_BYTES, EXP_ROUNDS, CEILING_REPEATS = 2**30, 1024, 20

SHARED_VIEWS = {"view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "t", "transpose", "alias", "detach"}
SHARED_VIEWS |= {"slice", "select", "as_strided", "permute", "reshape"}


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
    """Measure the copy and the exponentials of the current CUDA device: best of 20."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = _best_ms(partial(target.copy_, source))
    del source, target
    from kdcache.bench.kernels.exp_loop import BLOCK, WARPS, exp2_loop  # imports triton

    programs = 16 * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    out = torch.empty(programs * BLOCK, device="cuda")
    exp_ms = _best_ms(lambda: exp2_loop[(programs,)](out, EXP_ROUNDS, BLOCK=BLOCK, num_warps=WARPS))
    exps = programs * BLOCK * EXP_ROUNDS
    return Ceilings(copy_bytes=2 * COPY_BYTES / copy_ms * 1e3, exps=exps / exp_ms * 1e3)


def _best_ms(work: Callable[[], Any]) -> float:
    for _ in range(3):
        work()
    return timing.on_device(work, CEILING_REPEATS).best


def rival_fraction(name: str, case: Case, ceilings: Ceilings, milliseconds: float) -> float | None:
    """Return a rival's bytes over the copy speed and its time; None where its bytes are not known."""
    if name in ("eager", "chunked"):
        per_class_pixel: float | None = bytes_per_class_pixel(case)
    else:
        known = COMPILED_BYTES_PER_CLASS_PIXEL if name.startswith("compile") else {}
        per_class_pixel = known.get(KINDS[case.kind].loss)
    if per_class_pixel is None:
        return None
    return per_class_pixel * case.shape.class_pixels / ceilings.copy_bytes / (milliseconds / 1e3)


def bytes_per_class_pixel(case: Case) -> float:
    """Count what the operations of eager read and write, on a small image on the CPU."""
    small = case.tiny()
    contestant = prepare("eager", small, make_inputs(small, torch.device("cpu")), impl="")
    with _Touched() as touched:
        contestant.step()
    return float(touched.bytes / small.shape.class_pixels)


class _Touched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the sizes of all tensors that go into and come out of operations; views touch nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.partition("::")[2] not in SHARED_VIEWS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(_distinct_bytes(tensor) for tensor in tensors)
        return out


def _distinct_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; an expanded axis is read once."""
    count = int(tensor.element_size())
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count
