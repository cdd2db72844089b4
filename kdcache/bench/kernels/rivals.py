"""Ours and its rivals: one step each, forward and backward, on the same tensors.

Every rival computes the loss of the case at label size in float32, as in `losses`.

- eager: op by op.
- compile, compile-max-autotune: under torch.compile. CUDA graphs are captured for every contestant, so the second mode
  is the one without its own graphs.
- chunked: image by image with a backward each, for a fraction 1/B of the memory.
- liger: LigerCrossEntropyLoss and LigerKLDIVLoss. They know rows, not images: their rows are upsampled, gathered (only
  labelled pixels) and laid out before the clock starts, and their gradient stays at label resolution. That favours
  them. They take only the plain case, whose rows are the same for both terms.

Legend: B batch, C classes, H W label size, h w logits' own size, N labelled pixels.
"""

import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.bench.kernels.inputs import Inputs
from kdcache.bench.kernels.losses import loss_of, targets_of
from kdcache.bench.kernels.shapes import DTYPES, Case
from kdcache_kernels.ops import choose_implementation

Step = Callable[[], tuple[Tensor, Tensor]]
"""One forward and backward: the loss and the gradient."""

OURS = "kdcache"
OLDEST_LIGER = (0, 5)
"""Since then both classes are called like those of torch.nn (0.5.10, 0.6.4 and 0.8.5 were tried)."""
LIGER_MODULES = {
    "LigerCrossEntropyLoss": "liger_kernel.transformers.cross_entropy",
    "LigerKLDIVLoss": "liger_kernel.transformers.kl_div",
}


class UnavailableError(Exception):
    """Raised if a rival, an implementation other than kdcache's, cannot run here. Its message is a line, the reason."""


@dataclass(frozen=True)
class Contestant:
    """An implementation to measure on one case: kdcache's or a rival's.

    Attributes:
        step: computes one forward and backward, and returns (loss, gradient). It may be called any number of times.
        title: the name in tables.
        capturable: True if the step can be captured as a CUDA graph, because it never waits for the device.
    """

    step: Step
    title: str
    capturable: bool = True


def ours(case: Case, inputs: Inputs, impl: str) -> Contestant:
    """Return the contestant that computes a case with kdcache's public loss function, as a training does.

    `inputs` are the case's tensors. `impl` is the implementation, such as "auto" or "triton".
    """
    loss_of_case = loss_of(case).ours

    def step() -> tuple[Tensor, Tensor]:
        loss = loss_of_case(case, inputs, impl)
        return loss, _gradient(loss, inputs.student)

    return Contestant(step, f"{OURS} ({resolved(impl, inputs.student.device)})")


def resolved(impl: str, device: torch.device) -> str:
    """Return the implementation that `impl` means on a device: "triton", "numba", "torch" or "reference".

    Raises: ValueRangeError if the device cannot run it.
    """
    return choose_implementation(impl, device, torch.float32, has_torch=True)


def _whole(title: str, mode: str | None, case: Case, inputs: Inputs) -> Contestant:
    """Return the loss of the whole batch, op by op or compiled in a mode of torch.compile."""
    eager = loss_of(case).eager
    compute = eager if mode is None else torch.compile(eager, fullgraph=True, dynamic=False, mode=mode)
    targets = targets_of(case, inputs)

    def step() -> tuple[Tensor, Tensor]:
        loss = compute(inputs.student, targets)
        return loss, _gradient(loss, inputs.student)

    return Contestant(step, title)


def _chunked(case: Case, inputs: Inputs) -> Contestant:
    """Compute each image's part of the loss and its gradient into one buffer."""
    loss, targets = loss_of(case), targets_of(case, inputs)
    if not loss.by_image:
        raise UnavailableError(f"the loss of {case.kind} compares images, and cannot be done one by one")

    def step() -> tuple[Tensor, Tensor]:
        gradient_BChw = torch.empty_like(inputs.student, requires_grad=False)
        total = inputs.student.new_zeros((), dtype=torch.float32)
        for image in range(case.shape.batch):
            rows = slice(image, image + 1)
            student_1Chw = inputs.student.detach()[rows].requires_grad_()
            part = loss.eager(student_1Chw, targets.image(image))
            gradient_BChw[rows] = _gradient(part, student_1Chw)
            total += part.detach()
        return total, gradient_BChw

    return Contestant(step, "eager, image by image")


def _liger(case: Case, inputs: Inputs) -> Contestant:
    if case.kind != "plain":
        raise UnavailableError(f"Liger's losses know rows of one mask, not the case {case.kind}")
    modules = _import_liger(inputs.student.device)
    cross_entropy = modules["LigerCrossEntropyLoss"](ignore_index=case.shape.ignore_index)
    divergence = modules["LigerKLDIVLoss"](reduction="batchmean", log_target=True)
    labels_N = inputs.labels_int64[inputs.mask > 0]
    rows_NC = _rows(inputs.student.detach(), inputs.mask, DTYPES[case.dtype]).requires_grad_()
    teacher_NC = _rows(inputs.teacher, inputs.mask, DTYPES[case.dtype])
    T = case.temperature

    def step() -> tuple[Tensor, Tensor]:
        # The KL first: the cross-entropy writes its gradient over its input. (So only a first call's loss is right.)
        log_p_NC = F.log_softmax(rows_NC if T == 1 else rows_NC / T, 1)
        log_q_NC = F.log_softmax(teacher_NC if T == 1 else teacher_NC / T, 1)
        loss = T * T * divergence(log_p_NC, log_q_NC) + cross_entropy(rows_NC, labels_N)
        return loss, _gradient(loss, rows_NC)

    return Contestant(step, "Liger, rows upsampled beforehand", capturable=False)  # it calls .item()


def _rows(logits_BChw: Tensor, mask_BHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (N, C): the labelled pixels' logits, upsampled."""
    logits_BCHW = F.interpolate(logits_BChw.float(), mask_BHW.shape[1:], mode="bilinear", align_corners=False)
    return logits_BCHW.permute(0, 2, 3, 1)[mask_BHW > 0].to(dtype)


def _import_liger(device: torch.device) -> dict[str, Any]:
    try:
        version = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        raise UnavailableError("liger-kernel is not installed (pip install liger-kernel)") from None
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnavailableError(f"liger-kernel {version} has no kernel for {device.type}")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_LIGER:
        raise UnavailableError(f"liger-kernel {version} is older than {'.'.join(map(str, OLDEST_LIGER))}")
    try:
        return {name: getattr(importlib.import_module(module), name) for name, module in LIGER_MODULES.items()}
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"liger-kernel {version} cannot be used: {error}") from error


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    """Return d loss / d leaf. Unlike backward() it leaves no gradient for the next step to add to."""
    return torch.autograd.grad(loss, leaf)[0]


RIVALS: dict[str, Callable[[Case, Inputs], Contestant]] = {
    "eager": partial(_whole, "eager", None),
    "compile": partial(_whole, "torch.compile", "default"),
    "compile-max-autotune": partial(_whole, "torch.compile max-autotune", "max-autotune-no-cudagraphs"),
    "chunked": _chunked,
    "liger": _liger,
}
"""What --against chooses from."""


def prepare(name: str, case: Case, inputs: Inputs, impl: str) -> Contestant:
    """Return the contestant called `name` for a case, ready to run.

    `name` is "kdcache" or a name of RIVALS, such as "eager". `inputs` are the case's tensors. `impl` is the
    implementation of kdcache's loss, such as "auto".

    Raises: UnavailableError if a rival cannot run on this machine.
    """
    return ours(case, inputs, impl) if name == OURS else RIVALS[name](case, inputs)
