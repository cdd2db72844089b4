"""Checks of the arguments of the public functions.

Shapes, dtypes and Python numbers are checked everywhere. Values inside tensors are checked on the CPU alone:
elsewhere looking would wait for the device, and the loss comes out as NaN instead.

Legend: B batch, C classes, H W label size, h w the student's own size.
"""

import math

import torch
from torch import Tensor

from .errors import ShapeError, ValueRangeError
from .topk import PackedTarget

LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SHOWN = 8
"""Wrong values that a message lists at most."""


def check_number(name: str, value: float, *, above_zero: bool = False) -> None:
    """Refuse a number that is not finite, negative, or zero where it must be above zero."""
    if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
        raise ValueRangeError(
            f"{name} is finite and {'above 0' if above_zero else 'at least 0'}.",
            received=f"{value}",
            remedy=f"Pass a valid {name}"
            + ("; 1 leaves the distributions as they are." if above_zero else "; 0 leaves its term out."),
        )


def check_tensor(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    remedy: str,
) -> None:
    """Refuse a tensor of another shape, dtype or device; no dtypes means any. None passes."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape or (dtypes and tensor.dtype not in dtypes):
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ShapeError(
            f"{name} is {shape}{' of ' + kinds if kinds else ''}.",
            received=f"{tuple(tensor.shape)} {tensor.dtype}",
            remedy=remedy,
        )
    if tensor.device != device:
        raise ShapeError(
            f"{name} is on the device of the other tensors.",
            received=f"{tensor.device} and {device}",
            remedy=f"Move {name} there with .to(..., non_blocking=True) before the call.",
        )


def check_student(logits: Tensor) -> None:
    """Refuse anything but (B, C, h, w) floats of at least one class and pixel."""
    if logits.dim() != 4 or not logits.is_floating_point() or min(logits.shape[1:]) < 1:
        raise ShapeError(
            "student_logits_BChw is a (B, C, h, w) tensor of floats.",
            received=f"{tuple(logits.shape)} {logits.dtype}",
            remedy="Pass the raw output of the student's head, before any resize or softmax.",
        )


def check_size(labels: Tensor | None, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the label size from the labels or from `size`, which must agree."""
    if labels is not None and labels.dim() != 3:
        raise ShapeError(
            "labels_BHW is a (B, H, W) tensor.",
            received=f"{tuple(labels.shape)} {labels.dtype}",
            remedy="Drop a channel axis with squeeze(1); turn one-hot labels into ids with argmax(1).",
        )
    if labels is None and size is None:
        raise ShapeError(
            "size is given where labels_BHW is not.",
            received="neither",
            remedy="Pass size=(H, W), the resolution at which the loss is taken.",
        )
    found = None if labels is None else (labels.shape[1], labels.shape[2])
    wanted = found if size is None else (int(size[0]), int(size[1]))
    assert wanted is not None
    if (found is not None and found != wanted) or min(wanted) < 1:
        raise ShapeError(
            "size is the (H, W) of labels_BHW, each at least 1.",
            received=f"size={wanted}, labels {found}",
            remedy="Leave size out where there are labels.",
        )
    return wanted


def check_class_ids(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse, on the CPU, a class id that is neither below C nor `ignore_index`."""
    if labels.device.type != "cpu":
        return
    wrong = (labels < 0) | (labels >= num_classes) if labels.dtype.is_signed else labels >= num_classes
    # A comparison with a number that the dtype cannot hold is false for every pixel.
    wrong &= labels != ignore_index
    if wrong.any():
        ids = sorted(set(labels[wrong].tolist()))[:SHOWN]
        raise ValueRangeError(
            f"labels_BHW holds class ids below {num_classes}, or {ignore_index} for void.",
            received=f"ids {ids} in {int(wrong.sum())} pixels",
            remedy="Map the labels to the student's classes, or set ignore_index.",
        )


def check_class_weight(class_weight: Tensor | None, num_classes: int, device: torch.device) -> None:
    """Refuse class weights that are not C floats, or (on the CPU) negative or not finite."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    remedy = "Pass one weight for each of the student's classes."
    check_tensor("class_weight", class_weight, (num_classes,), dtypes, device, remedy)
    if class_weight is None or class_weight.device.type != "cpu":
        return
    wrong = ~((class_weight >= 0) & class_weight.isfinite())
    if wrong.any():
        raise ValueRangeError(
            "class_weight is finite and at least 0.",
            received=f"classes {wrong.nonzero().flatten()[:SHOWN].tolist()}",
            remedy="A class that never occurs has no inverse frequency; give it weight 0.",
        )


def check_window(window: Tensor | None, flip: Tensor | None, batch: int, device: torch.device) -> None:
    """Refuse windows that are not (B, 4) float64, or (on the CPU) empty, reversed or not finite."""
    remedy = "Pass (y0, x0, y1, x1) per sample, edges in pixels of the view."
    check_tensor("window_B4", window, (batch, 4), (torch.float64,), device, remedy)
    check_tensor("flip_B", flip, (batch,), (torch.bool,), device, "Pass one bool per sample.")
    if window is None or window.device.type != "cpu":
        return
    good = window.isfinite().all(1) & (window[:, 2:] > window[:, :2]).all(1)
    if not good.all():
        sample = int((~good).nonzero()[0])
        raise ValueRangeError(
            "window_B4 is finite, with y0 < y1 and x0 < x1.",
            received=f"{window[sample].tolist()} for sample {sample}",
            remedy="A flip is said with flip_B, never by reversing the edges.",
        )


def check_target(target: PackedTarget, num_classes: int, batch: int, device: torch.device) -> None:
    """Refuse a target of other classes, another batch or on another device."""
    if (target.num_classes, target.batch_size) != (num_classes, batch):
        raise ShapeError(
            "target has the batch size and the classes of student_logits_BChw.",
            received=f"(B, C) is ({target.batch_size}, {target.num_classes}), not ({batch}, {num_classes})",
            remedy="Use a student with the store's class list, and one record per image.",
        )
    if target.device != device:
        raise ShapeError(
            "target is on the device of student_logits_BChw.",
            received=f"{target.device} and {device}",
            remedy="Move it with target.to(device, non_blocking=True) before the call.",
        )


def check_denominator(name: str, value: Tensor | float | None, device: torch.device) -> None:
    """Refuse what is neither a number of at least 0 nor a 0-dimensional tensor on the device."""
    if isinstance(value, Tensor):
        check_tensor(name, value, (), (), device, "Pass a 0-dimensional tensor, such as a sum reduced over ranks.")
    elif value is not None:
        check_number(name, value)
