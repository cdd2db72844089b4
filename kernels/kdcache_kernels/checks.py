"""Checks of the arguments of the public functions.

Shapes, dtypes and Python numbers are always checked. Values inside tensors are checked only on the CPU: elsewhere
reading them would wait for the device, and the loss becomes NaN instead. With KDCACHE_DEBUG=1 in the environment they
are checked on every device, and a loss that is not finite raises with the position of its cause.

Legend: B batch, C classes, H W label size, h w the student's own size.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor

from .errors import ShapeError, ValueRangeError, describe, misfit
from .problem import LossProblem
from .topk import FLOATS_BCHW, PackedTarget, check_device, check_ids, is_dense, is_logits
from .window import window_misses_view

LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SHOWN = 8
"""Wrong values that a message lists at most."""


def debugging() -> bool:
    """Return True if KDCACHE_DEBUG=1 is set in the environment.

    Values are then checked on a GPU also, not only on the CPU.
    """
    return os.environ.get("KDCACHE_DEBUG", "0") not in ("", "0")


def may_read(tensor: Tensor) -> bool:
    """Return True if checks may read the values of a tensor.

    They may on the CPU, and on any device with KDCACHE_DEBUG=1 in the environment. They may not while `torch.compile`
    traces or inside a `torch.func` transform.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type == "cpu" or debugging()


def is_finite(value: Any) -> bool:
    """Return True if a value is a finite number, or a tensor with one element that is finite."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):
        return False


def check_number(name: str, value: Any, *, above_zero: bool = False) -> None:
    """Raise ValueRangeError unless a value is a finite number of at least 0, or above 0 if `above_zero`.

    `name` is the argument's name in the message.
    """
    if not is_finite(value) or value < 0 or (above_zero and value == 0):
        kinds = (
            "above 0. 1 leaves the distributions as they are." if above_zero else "from 0 on. 0 leaves its term out."
        )
        raise ValueRangeError(f"Invalid {name}: {value!r}", fix=f"Pass a finite number {kinds}")


def check_label_terms(label_smoothing: float, focal_gamma: float) -> None:
    """Raise ValueRangeError if label smoothing is outside [0, 1), `focal_gamma` is negative, or both are above 0."""
    if not (is_finite(label_smoothing) and 0 <= label_smoothing < 1):
        raise ValueRangeError(
            f"Invalid label_smoothing: {label_smoothing!r}",
            fix="Pass a share of every label, at least 0 and below 1. 0.1 is usual, 0 leaves the labels as they are.",
        )
    if not (is_finite(focal_gamma) and focal_gamma >= 0):
        raise ValueRangeError(
            f"Invalid focal_gamma: {focal_gamma!r}",
            fix="Pass a finite number from 0 on. 2 is usual, 0 is the plain cross-entropy.",
        )
    if label_smoothing > 0 and focal_gamma > 0:
        raise ValueRangeError(
            f"Cannot combine focal_gamma {focal_gamma} with label_smoothing {label_smoothing}",
            fix="Leave one of them at 0.",
        )


def check_ignore_index(ignore_index: int) -> None:
    """Raise ValueRangeError unless the label of void pixels is an integer."""
    if not hasattr(ignore_index, "__index__"):
        raise ValueRangeError(
            f"Invalid ignore_index: {ignore_index!r}", fix="Pass an integer, such as -1 if no pixel is void."
        )


def check_tensor(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    fix: str,
) -> None:
    """Raise ShapeError unless a tensor is dense and has the given shape, one of `dtypes`, and the given device.

    None as `tensor` passes. If `dtypes` is empty, every dtype except complex ones passes. The message contains `name`,
    the argument's name, and `fix`, the step to take.
    """
    if tensor is None:
        return
    if (
        not is_dense(tensor)
        or tuple(tensor.shape) != shape
        or (tensor.dtype not in dtypes if dtypes else tensor.is_complex())
    ):
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "real numbers"
        raise misfit(name, tensor, f"a dense {shape} of {kinds}", fix)
    if tensor.device != device:
        raise ShapeError(
            f"Invalid {name}: {describe(tensor)}, but the other tensors are on {device}",
            fix=f"Move {name} there with .to(..., non_blocking=True) before the call.",
        )


def check_student(logits: Tensor) -> None:
    """Raise ShapeError unless logits are (B, C, h, w) floats with at least one class and pixel."""
    if not is_logits(logits) or min(logits.shape[1:]) < 1:
        raise misfit(
            "student_logits_BChw",
            logits,
            FLOATS_BCHW,
            "Pass the raw output of the student's head, before any resize or softmax.",
        )
    check_device("student_logits_BChw", logits)


def check_size(labels: Tensor | None, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the label size (H, W) in pixels, from the labels or from `size`.

    Raises: ShapeError if both are missing, or if they differ.
    """
    if labels is not None and not (is_dense(labels) and labels.dim() == 3):
        raise misfit(
            "labels_BHW",
            labels,
            "a dense (B, H, W)",
            "Drop a channel axis with squeeze(1). Turn one-hot labels into ids with argmax(1).",
        )
    if labels is None and size is None:
        raise ShapeError(
            "Missing labels_BHW or size", fix="Pass size=(H, W), the resolution at which the loss is taken."
        )
    if size is not None and (not hasattr(size, "__len__") or len(size) != 2):
        raise ShapeError(f"Invalid size: {size!r}", fix="Pass a pair (H, W) in pixels, such as labels.shape[1:].")
    label_size = None if labels is None else (labels.shape[1], labels.shape[2])
    final_size = label_size if size is None else (int(size[0]), int(size[1]))
    assert final_size is not None
    if (label_size is not None and label_size != final_size) or min(final_size) < 1:
        raise ShapeError(
            f"Invalid size: {final_size}" + ("" if label_size is None else f" for labels of {label_size}"),
            fix="Leave size out if there are labels. Otherwise pass (H, W), each at least 1.",
        )
    return final_size


def check_class_ids(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ValueRangeError for a label that is neither a class id (0 to num_classes - 1) nor `ignore_index`.

    Labels on a GPU are checked only with KDCACHE_DEBUG=1, because the check waits for the GPU. Nothing is checked while
    `torch.compile` traces.
    """
    if not may_read(labels):
        return
    wrong = (labels < 0) | (labels >= num_classes) if labels.dtype.is_signed else labels >= num_classes
    # A comparison with a number that the dtype cannot hold is false for every pixel.
    wrong &= labels != ignore_index
    if wrong.any():
        ids = sorted(set(labels[wrong].tolist()))[:SHOWN]
        raise ValueRangeError(
            f"Invalid labels_BHW: ids {ids} in {int(wrong.sum())} pixels, the first at (b, y, x) = {_first(wrong)}",
            fix=f"Map the labels to class ids below {num_classes}, or set ignore_index (now {ignore_index}).",
        )


def check_class_weight(class_weight: Tensor | None, num_classes: int, device: torch.device) -> None:
    """Raise ShapeError unless class weights are (num_classes,) floats on `device`. None as `class_weight` passes."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    fix = "Pass one weight for each of the student's classes."
    check_tensor("class_weight", class_weight, (num_classes,), dtypes, device, fix)


def check_class_weight_values(class_weight: Tensor | None) -> None:
    """Raise ValueRangeError for class weights that are negative or not finite.

    Does nothing for None, or if `may_read` does not allow reading the weights, for example on a GPU.
    """
    if class_weight is None or not may_read(class_weight):
        return
    wrong = ~((class_weight >= 0) & class_weight.isfinite())
    if wrong.any():
        raise ValueRangeError(
            f"Invalid class_weight: classes {wrong.nonzero().flatten()[:SHOWN].tolist()} are negative or not finite",
            fix="Give a class that never occurs weight 0: it has no inverse frequency.",
        )


def check_window(window: Tensor | None, flip: Tensor | None, batch: int, device: torch.device) -> None:
    """Raise ShapeError unless windows are (B, 4) float64 and flips are (B,) bool, both on `device`.

    None as `window` or `flip` passes. `batch` is B.
    """
    fix = "Pass (y0, x0, y1, x1) per sample, edges in pixels of the view."
    check_tensor("window_B4", window, (batch, 4), (torch.float64,), device, fix)
    check_tensor("flip_B", flip, (batch,), (torch.bool,), device, "Pass one bool per sample.")


def check_window_values(window: Tensor | None, view_size: tuple[int, int] | None) -> None:
    """Raise ValueRangeError for windows that are empty, reversed, not finite, or completely outside the view.

    Does nothing for None. It also does nothing on a GPU (except with KDCACHE_DEBUG=1), while `torch.compile` traces,
    and inside a `torch.func` transform.

    Args:
        window: (B, 4) edges y0, x0, y1, x1 in pixels of the view, or None.
        view_size: (height, width) of the view in pixels. None skips the check against the view.
    """
    if window is None or not may_read(window):
        return
    good = window.isfinite().all(1) & (window[:, 2:] > window[:, :2]).all(1)
    if not good.all():
        sample = int((~good).nonzero()[0])
        raise ValueRangeError(
            f"Invalid window_B4: {window[sample].tolist()} for sample {sample} is empty, reversed or not finite",
            fix="Give y0 < y1 and x0 < x1. Flip with flip_B, not by reversing the edges.",
        )
    if view_size is None:
        return
    outside = window_misses_view(window, view_size)
    if outside.any():
        sample = int(outside.nonzero()[0])
        raise ValueRangeError(
            f"Invalid window_B4: {window[sample].tolist()} for sample {sample} is outside the view {view_size}",
            fix="Give the edges in pixels of the view that the teacher saw. They may reach over its edge.",
        )


def check_packed_target(target: PackedTarget) -> None:
    """Raise ShapeError unless the target is a `PackedTarget`. For raw logits, the message says how to pack them."""
    if not isinstance(target, PackedTarget):
        raise misfit(
            "target",
            target,
            "a PackedTarget",
            "Pack raw logits: PackedTarget(*pack(logits, k), num_classes, view_size)",
        )


def check_target(target: PackedTarget, num_classes: int, batch: int, device: torch.device) -> None:
    """Raise ShapeError unless a target is a `PackedTarget` with the given classes, images and device.

    `num_classes` and `batch` are the numbers of classes and images.
    """
    check_packed_target(target)
    if (target.num_classes, target.batch_size) != (num_classes, batch):
        raise ShapeError(
            f"Invalid target: (B, C) is ({target.batch_size}, {target.num_classes}), not ({batch}, {num_classes}), "
            f"of values {describe(target.values)}",
            fix="Use a student with the cache's class list, and one record per image.",
        )
    if target.device != device:
        raise ShapeError(
            f"Invalid target: values {describe(target.values)}, but the student is on {device}",
            fix="Move it with target.to(device, non_blocking=True) before the call.",
        )


def check_scalar(
    name: str, value: Tensor | float | None, device: torch.device, example: str, *, optional: bool = False
) -> None:
    """Check that a value is a finite number of at least 0, or a 0-dimensional tensor on `device`.

    If `optional`, None also passes. The message contains `name`, the argument's name, and `example`, words for such a
    tensor, such as "a scheduled weight".

    Raises: ShapeError for another tensor, ValueRangeError for another value.
    """
    if isinstance(value, Tensor):
        check_tensor(name, value, (), (), device, f"Pass a 0-dimensional tensor, such as {example}.")
    elif value is not None or not optional:
        check_number(name, value)


def check_values(problem: LossProblem, *, ids: bool = True) -> None:
    """Raise ValueRangeError if a problem's tensors contain values that the loss cannot use.

    Such values are negative or non-finite class weights, and windows that are empty, not finite or outside the view.
    With `ids`, class ids out of range are such values too. Tensors are skipped if `may_read` does not allow reading
    them.
    """
    check_class_weight_values(problem.class_weight)
    if problem.use_ce and ids:
        assert problem.labels is not None
        check_class_ids(problem.labels, problem.student.shape[1], problem.ignore_index)
    if problem.target is not None:
        check_window_values(problem.window, problem.target.view_size)
        indices = problem.target.indices
        if ids and indices is not None and may_read(indices):
            check_ids(indices, problem.target.num_classes)


def explain_non_finite(problem: LossProblem, loss: Tensor) -> None:
    """Raise ValueRangeError if KDCACHE_DEBUG=1 is set and the loss is not finite.

    The message names the tensors that are not finite, each with the position of its first wrong value.
    """
    if not debugging() or not may_read(loss) or bool(loss.isfinite()):
        return
    suspects = {
        "student_logits_BChw": problem.student,
        "pixel_weight_BHW": problem.pixel_weight,
        "ce_pixel_weight_BHW": problem.ce_pixel_weight,
    }
    if problem.target is not None:
        suspects |= {"target.values": problem.target.values, "target.tail": problem.target.tail}
    causes = []
    for name, tensor in suspects.items():
        wrong = None if tensor is None else ~tensor.isfinite()
        if tensor is not None and wrong is not None and wrong.any():
            position = _first(wrong)
            causes.append(f"{name}{list(position)} is {tensor[position].item()} ({int(wrong.sum())} of them)")
    raise ValueRangeError(
        f"The loss is {loss.item()}: "
        + (", ".join(causes) or "the logits are so large that logits / temperature overflows"),
        fix="Look at those positions. In training, lower the learning rate or clip the gradient.",
    )


def _first(wrong: Tensor) -> tuple[int, ...]:
    return tuple(wrong.nonzero()[0].tolist())
