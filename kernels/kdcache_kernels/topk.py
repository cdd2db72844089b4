"""Packed targets: a teacher's logits for a batch, in their stored form.

A packed target holds, per target pixel, the k largest logits minus the largest one in float16, their class ids, and the
log-odds of the mass outside them. With k = C it is dense, in class order, without ids and tail. Keeping 8 of 150
classes stores 4.5 times fewer bytes than dense float16 and makes a quarter of the gradient wrong at T = 1 (`choose.py`
measures it). So the tail is stored, and dense is the rule up to 32 classes.

Legend: B batch, C classes, k kept classes, h w target pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import ShapeError, ValueRangeError, describe, misfit

NO_FLOAT64 = ("mps",)
"""Devices without float64, in which positions, sums and windows are."""
MOST_CLASSES = 2**16
"""Classes that a target of the top k can have: its ids are uint16."""
FLOATS_BCHW = "a dense (B, C, h, w) of floats"
"""What logits are, for messages."""
LOGIT_LIMIT = 6e4
"""Bound of stored values and tails: exact in float16, far below its overflow, and 0 after any softmax."""


@dataclass(frozen=True)
class PackedTarget:
    """Packed teacher logits of a batch, at the teacher's native stride.

    >>> import kdcache_kernels
    >>> values, indices, tail = kdcache_kernels.pack(torch.randn(2, 3, 4, 4), 3)
    >>> target = kdcache_kernels.PackedTarget(values, indices, tail, num_classes=3, view_size=(16, 16))
    >>> target.densify().shape
    torch.Size([2, 3, 4, 4])

    Attributes:
        values: (B, k, h, w) float16, logit minus the pixel's maximum over classes.
        indices: (B, k, h, w) uint8 (uint16 above 256 classes), class ids, or None if k = C.
        tail: (B, h, w) float16, log-odds of the mass outside the top k, or None if k = C.
        num_classes: C.
        view_size: (height, width) in pixels of the view that the h x w logits cover.
        align_corners: whether the last resize of the teacher's head aligns corners.
    Raises: ShapeError, ValueRangeError naming the attribute.
    """

    values: Tensor
    indices: Tensor | None
    tail: Tensor | None
    num_classes: int
    view_size: tuple[int, int]
    align_corners: bool = False

    def __post_init__(self) -> None:
        check_packed(self.values, self.indices, self.tail, self.num_classes)
        if self.values.dtype != torch.float16:
            raise misfit("values", self.values, "float16", "Pack raw logits with kdcache_kernels.pack.")
        check_view_size(self.view_size)

    @property
    def k(self) -> int:
        """The number of kept classes per pixel."""
        return self.values.shape[1]

    @property
    def batch_size(self) -> int:
        """The number of images, B."""
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.values.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedTarget":
        """Return the target with its tensors on `device`. `non_blocking` is as in `Tensor.to`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedTarget":
        """Return the target with `function` applied to each of its tensors."""
        tensors = {"values": self.values, "indices": self.indices, "tail": self.tail}
        changes = {name: function(tensor) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **changes)  # type: ignore[arg-type]

    def densify(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the (B, C, h, w) logits of every class in `dtype`, relative to the pixel's largest logit.

        The dropped classes share the tail's mass evenly, see `kdcache_kernels.densify`.
        """
        return densify(self.values, self.indices, self.tail, self.num_classes, dtype)


def pack(logits_BChw: Tensor, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Keep the k largest logits of every pixel, with PyTorch operations on any device.

    This is the reference for `kdcache_kernels.pack`, and returns the same.

    Args:
        logits_BChw: any floating dtype. Computed in float32, or in float64 if it is float64.
        k: 1 to C. C keeps every class in class order.
    Returns: (values, indices, tail) as in `PackedTarget`: the kept logits (B, k, h, w) minus the pixel's largest, their
        class ids, and the log-odds (B, h, w) of the other classes' mass. With k = C, indices and tail are None.
    Raises: ShapeError for a tensor that is not (B, C, h, w) of floats, ValueRangeError for k.
    """
    check_logits(logits_BChw, k)
    num_classes = logits_BChw.shape[1]
    logits_BChw = logits_BChw.detach().to(compute_dtype(logits_BChw.dtype))
    largest_B1hw = logits_BChw.amax(1, keepdim=True)
    # +inf - +inf is NaN in its own class alone; the whole pixel must be seen to be lost.
    largest_B1hw = torch.where(largest_B1hw.isfinite(), largest_B1hw, torch.nan)
    relative_BChw = logits_BChw - largest_B1hw
    if k == num_classes:
        return _to_float16(relative_BChw), None, None
    sorted_BChw, order_BChw = relative_BChw.sort(dim=1, descending=True, stable=True)
    tail = sorted_BChw[:, k:].logsumexp(1) - sorted_BChw[:, :k].logsumexp(1)
    indices = order_BChw[:, :k].to(index_dtype(num_classes))
    return _to_float16(sorted_BChw[:, :k]), indices, _to_float16(tail)


def densify(
    values: Tensor,
    indices: Tensor | None,
    tail: Tensor | None,
    num_classes: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return logits (B, C, h, w) of every class from packed logits, with PyTorch operations on any device.

    This is the reference of `kdcache_kernels.densify`, and gives the same result.

    Args:
        values: (B, k, h, w), logit minus the pixel's largest logit, for the k kept classes.
        indices: (B, k, h, w), the ids of the kept classes, or None if k = C.
        tail: (B, h, w), log-odds of the dropped classes' mass, or None if k = C.
        num_classes: C.
        dtype: dtype of the result.
    """
    check_packed(values, indices, tail, num_classes)
    values = values.to(dtype)
    if indices is None or tail is None:
        return values
    log_missing = math.log(num_classes - values.shape[1])
    # Rounded once, at the end: C - k classes share the error.
    fill_Bhw = values.double().logsumexp(1) + tail.double() - log_missing
    fill_BChw = fill_Bhw.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).to(dtype)[:, None].expand(-1, num_classes, -1, -1)
    ids_BKhw = indices.long()
    if ids_BKhw.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
        check_ids(ids_BKhw, num_classes)
    else:
        values = values.masked_fill(ids_BKhw >= num_classes, torch.nan)
        ids_BKhw = ids_BKhw.clamp(max=num_classes - 1)
    return fill_BChw.scatter(1, ids_BKhw, values)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which to compute with tensors of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_dtype(num_classes: int) -> torch.dtype:
    """Return the dtype of stored class ids: uint8 for up to 256 classes, else uint16."""
    return torch.uint8 if num_classes <= 256 else torch.uint16


def argmax_dtype(num_classes: int) -> torch.dtype:
    """Return the dtype of argmax results: the smallest of uint8, int16 and int32 that holds all class ids.

    uint16 is not used, because PyTorch cannot compare its values.
    """
    if num_classes <= 256:
        return torch.uint8
    return torch.int16 if num_classes <= 2**15 else torch.int32


def is_dense(value: Any) -> bool:
    """Return True if a value is a tensor with strided layout, neither sparse nor nested."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def is_logits(value: Any) -> bool:
    """Return True if a value is a floating-point tensor with strided layout and four axes."""
    return is_dense(value) and value.dim() == 4 and value.is_floating_point()


def check_logits(logits_BChw: Tensor, k: int) -> None:
    """Raise an error for logits or k that `pack` cannot take.

    Raises: ShapeError for logits that are not (B, C, h, w) floats, ValueRangeError for a k outside 1 to C.
    """
    if not is_logits(logits_BChw):
        raise misfit("logits_BChw", logits_BChw, FLOATS_BCHW, "Pass the raw output of one head, before any softmax.")
    check_device("logits_BChw", logits_BChw)
    num_classes = logits_BChw.shape[1]
    if not 1 <= k <= num_classes:
        raise ValueRangeError(
            f"Invalid k: {k} with {num_classes} classes",
            fix=f"Choose k from 1 to {num_classes}. {num_classes} keeps every class.",
        )
    _check_ids_fit(k, num_classes)


def check_view_size(view_size: tuple[int, int]) -> None:
    """Raise ValueRangeError unless a size is a pair (height, width) of at least 1 pixel each."""
    if not hasattr(view_size, "__len__") or len(view_size) != 2 or min(view_size) < 1:
        raise ValueRangeError(
            f"Invalid view_size: {view_size!r}",
            fix="Pass (height, width) in pixels, the size at which the teacher saw the view.",
        )


def check_device(name: str, tensor: Tensor) -> None:
    """Raise ShapeError for a tensor on a device without float64, such as MPS. Every implementation needs float64.

    `name` is the argument's name in the message.
    """
    if tensor.device.type in NO_FLOAT64:
        raise ShapeError(
            f"Invalid {name}: {describe(tensor)}, a device without float64",
            fix=f"Move {name} and what goes with it to the CPU, with .to('cpu'). The fused kernels run there.",
        )


def check_packed(values: Tensor, indices: Tensor | None, tail: Tensor | None, num_classes: int) -> None:
    """Raise ShapeError if the tensors of a packed target have wrong shapes, dtypes or devices.

    Values inside the tensors are not read. The arguments are fields of `PackedTarget`.

    Raises: ShapeError, or ValueRangeError if there are too many classes for class ids of 16 bits.
    """
    if not is_logits(values):
        raise misfit("values", values, FLOATS_BCHW, "Pass the values that kdcache_kernels.pack returned.")
    check_device("values", values)
    B, k, h, w = values.shape
    if not 1 <= k <= num_classes or min(h, w) < 1:
        raise ShapeError(
            f"Invalid values: {describe(values)}, with num_classes={num_classes}",
            fix="Pass the number of classes of the teacher that was packed, and at least one pixel.",
        )
    if k == num_classes:
        if indices is not None or tail is not None:
            raise ShapeError(
                f"Invalid target: it keeps all {k} classes, and has indices or tail",
                fix="Pass None for both. The values are in class order.",
            )
        return
    _check_ids_fit(k, num_classes)
    ids = index_dtype(num_classes)
    _check_part("indices", indices, (B, k, h, w), (ids,), values.device)
    _check_part("tail", tail, (B, h, w), (torch.float16, torch.float32, torch.float64), values.device)


def _check_ids_fit(k: int, num_classes: int) -> None:
    if k < num_classes > MOST_CLASSES:
        raise ValueRangeError(
            f"Cannot keep the top {k} of {num_classes} classes: ids of 16 bits count {MOST_CLASSES}",
            fix="Merge classes (--class-map), or keep every class with k = num_classes.",
        )


def _check_part(
    name: str,
    part: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if part is None or not is_dense(part) or tuple(part.shape) != shape or part.dtype not in dtypes:
        raise misfit(
            name,
            part,
            f"a dense {shape} of {str(dtypes[0]).removeprefix('torch.')}",
            "Pass values, indices and tail of one call of kdcache_kernels.pack.",
        )
    if part.device != device:
        raise ShapeError(
            f"Invalid {name}: {describe(part)}, but values is on {device}",
            fix="Move the whole target with PackedTarget.to.",
        )


def check_ids(ids: Tensor, num_classes: int) -> None:
    """Raise ValueRangeError if a class id is `num_classes` or more. This waits for the device."""
    ids = ids.long()  # uint16 has no comparisons
    if ids.numel() and int(ids.max()) >= num_classes:
        wrong = sorted(set(ids[ids >= num_classes].tolist()))[:8]
        raise ValueRangeError(
            f"Invalid indices: ids {wrong} are not below {num_classes}",
            fix="Check num_classes against the teacher that was packed. If they agree, the cache is damaged.",
        )


def _to_float16(x: Tensor) -> Tensor:
    return x.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).to(torch.float16)
