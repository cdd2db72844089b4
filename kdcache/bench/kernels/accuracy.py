"""The accuracy grid: `distill_loss` against float64, over every combination of error-prone settings.

The oracle is `impl="reference"` on float64 logits that were first rounded to the dtype under test, so a dtype's
rounding of its input does not count. Images are a few dozen pixels wide, because the errors of a kernel (a wrong tap, a
pixel in the wrong term, a cancellation) do not need more. Of the 6,750 points the command line takes every fourth,
along diagonals, so every two values of two factors still meet.

The gradient is taken of 2**n * loss, as with a GradScaler: an averaged gradient in float16 flushes to 0, which is not
an error of a kernel.

Bounds: loss 1e-6 |L| + 1e-7 T^2; gradient, largest error over largest value, 2e-6 in float32, 1e-3 in float16 and 8e-3
in bfloat16, which is the rounding of the result. To these comes the limit of float32: an interpolated logit to 6e-8 of
the largest, over T; the difference of two probabilities, of the order of 1 / T, to 6e-8; a sum over more than 25
classes to the square root of their number.

Legend: B batch, C classes, H W label size, h w logits' own size.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.bench.kernels.rivals import resolved
from kdcache.bench.kernels.shapes import DTYPES, KEPT, MOST_DENSE
from kdcache_kernels import PackedTarget, distill_loss, pack

GRADIENT_BOUND = {"fp32": 2e-6, "fp16": 1e-3, "bf16": 8e-3}
LOSS_RELATIVE, LOSS_PER_SQUARED_TEMPERATURE = 1e-6, 1e-7
ROUNDOFF = 2.0**-24
BATCH, NATIVE = 2, (5, 7)
IGNORE_INDEX = 255

STRIDES: dict[str, tuple[int, int]] = {
    **{str(s): (NATIVE[0] * s, NATIVE[1] * s) for s in (1, 2, 4, 8)},
    "17x23 of 5x7": (17, 23),
}
"""Label size by name: strides, and a ratio that is none."""
TEMPERATURES = (0.05, 1.0, 2.0, 2.5, 4.0, 100.0)
CLASSES = (2, 3, 21, 33, 150)
WINDOWS = ("whole", "flip", "crop", "scale", "edge")
VALUES = ("normal", "wide", "range")
EVERY = 4
"""The command line checks one of so many points."""


@dataclass(frozen=True)
class CheckSettings:
    """The choice of points at which `check` compares an implementation with the float64 oracle.

    Each combination of the values below is a point.

    Attributes:
        device: where to compute.
        impl: implementation of `kdcache_kernels.distill_loss`, such as "numba". "auto" is the fastest for the device.
        dtypes: names of `shapes.DTYPES`, such as "fp32".
        strides: names of STRIDES: label pixels per logit, such as "4", or "17x23 of 5x7" (label size and logit size).
        temperatures: values of T.
        classes: numbers of classes.
        windows: names of windows: "whole" (the whole view), "flip" (mirrored), "crop" (cut at cell edges), "scale"
            (zoomed) or "edge" (partly beyond the view).
        values: distributions of the logits: "normal", "wide" (each is 6e4 or -6e4) or "range" (uniform, from 0 to 75
            in the first image and from 0 to 90 in the second).
        every: 1 checks all points, 4 about one in four.
    """

    device: torch.device
    impl: str = "auto"
    dtypes: tuple[str, ...] = tuple(DTYPES)
    strides: tuple[str, ...] = tuple(STRIDES)
    temperatures: tuple[float, ...] = TEMPERATURES
    classes: tuple[int, ...] = CLASSES
    windows: tuple[str, ...] = WINDOWS
    values: tuple[str, ...] = VALUES
    every: int = 1

    def points(self) -> Iterator["Point"]:
        """Yield a `Point` for all combinations of the settings, or for about one in `every` of them.

        A value's index is its position in its own setting, such as `dtypes`. A combination is yielded if the sum of
        its values' indices is a multiple of `every`.
        """
        grid = (self.dtypes, self.strides, self.temperatures, self.classes, self.windows, self.values)
        for combination in itertools.product(*map(enumerate, grid)):
            positions, values = zip(*combination, strict=True)
            if sum(positions) % self.every == 0:
                yield Point(*values)


@dataclass(frozen=True)
class Point:
    """One combination of settings at which the loss is checked: one value of each list in `CheckSettings`.

    Attributes:
        dtype: dtype of the student's logits, such as "fp32".
        stride: label pixels per logit as text, such as "4", or "17x23 of 5x7" (label size and logit size).
        temperature: T.
        num_classes: C.
        window: what the label shows of the view: "whole", "flip", "crop", "scale" or "edge".
        values: distribution of the logits: "normal", "wide" or "range".
    """

    dtype: str
    stride: str
    temperature: float
    num_classes: int
    window: str
    values: str


@dataclass(frozen=True)
class Judged:
    """The errors of an implementation at one point, and the largest errors that are allowed.

    Attributes:
        point: the settings of the check.
        loss_error: |loss - the oracle's loss|, in nats.
        loss_bound: the largest allowed loss_error.
        gradient_error: largest |gradient - the oracle's gradient|, divided by the largest |oracle's gradient|.
        gradient_bound: the largest allowed gradient_error.
    """

    point: Point
    loss_error: float
    loss_bound: float
    gradient_error: float
    gradient_bound: float

    @property
    def loss_share(self) -> float:
        """The error of the loss divided by its bound. A value above 1 fails, and so does NaN."""
        return self.loss_error / self.loss_bound

    @property
    def gradient_share(self) -> float:
        """The error of the gradient divided by its bound. A value above 1 fails, and so does NaN."""
        return self.gradient_error / self.gradient_bound

    @property
    def passed(self) -> bool:
        """True if the error of the loss and the error of the gradient are both within their bounds."""
        return self.loss_error <= self.loss_bound and self.gradient_error <= self.gradient_bound

    def to_json(self) -> dict[str, Any]:
        """Return one flat JSON dict: the settings of `point`, the errors, their bounds and "passed".

        Numbers that are not finite become None.
        """
        errors = {name: value for name, value in vars(self).items() if name != "point"}
        finite = {name: value if math.isfinite(value) else None for name, value in errors.items()}
        return {**asdict(self.point), **finite, "passed": self.passed}


def check(settings: CheckSettings) -> Iterator[Judged]:
    """Compare loss and gradient with the float64 oracle at every point of the settings. Yield each result when ready.

    Raises: ValueRangeError for an implementation that cannot run on the device.
    """
    impl = resolved(settings.impl, settings.device)  # by name, so that nothing else can stand in for it
    for point in settings.points():
        yield _judge(point, settings.device, impl)


def summary(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Return one dict per dtype with the number of points, how many missed a bound, and the largest errors.

    The keys are "dtype", "points", "missed", "loss_share" and "gradient_error". The last two are the largest
    `Judged.loss_share` and `Judged.gradient_error`.
    """
    rows: list[dict[str, Any]] = []
    for dtype in dict.fromkeys(result.point.dtype for result in judged):
        among = [result for result in judged if result.point.dtype == dtype]
        worst = {name: _worst([getattr(result, name) for result in among]) for name in ("loss_share", "gradient_error")}
        rows.append({"dtype": dtype, "points": len(among), "missed": sum(not each.passed for each in among), **worst})
    return rows


def _worst(errors: Sequence[float]) -> float:
    """Return the largest value, with NaN larger than anything."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def _judge(point: Point, device: torch.device, impl: str) -> Judged:
    student, arguments = draw(point, device)
    T, (height, width) = point.temperature, STRIDES[point.stride]
    scale = float(2 ** round(math.log2(BATCH * height * width)))  # near the number of pixels
    rounded = student.to(DTYPES[point.dtype])
    expected, expected_gradient = _compute(point, rounded.double(), arguments, "reference", 1.0)
    largest = expected_gradient.abs().max().clamp_min(1e-30)
    loss, gradient = _compute(point, rounded, arguments, impl, scale)
    per_squared_temperature = LOSS_PER_SQUARED_TEMPERATURE * max(1.0, math.sqrt(point.num_classes / 25))
    return Judged(
        point,
        loss_error=abs(loss.item() - expected.item()),
        loss_bound=LOSS_RELATIVE * abs(expected.item()) + per_squared_temperature * T**2,
        gradient_error=((gradient.double() / scale - expected_gradient).abs().max() / largest).item(),
        gradient_bound=GRADIENT_BOUND[point.dtype] + ROUNDOFF * (rounded.abs().max().item() / T + T),
    )


def launch(point: Point, device: torch.device) -> None:
    """Compute loss and gradient at a point with `impl="auto"`, and drop the results without reading them.

    This launches the same kernels as `check` does at that point on `device`, for example to compile them.
    """
    student, arguments = draw(point, device)
    _compute(point, student.to(DTYPES[point.dtype]), arguments, "auto", 1.0)


def _compute(point: Point, logits: Tensor, arguments: dict[str, Any], impl: str, scale: float) -> tuple[Tensor, Tensor]:
    """Return the loss at a point, and the gradient of a multiple of it."""
    leaf = logits.detach().requires_grad_()
    loss = distill_loss(leaf, **arguments, kl_weight=1.0, temperature=point.temperature, impl=impl).loss
    return loss, torch.autograd.grad(loss, leaf, torch.full_like(loss, scale))[0]


def draw(point: Point, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """Draw random inputs of the loss for a point, a combination of settings, and move them to the device.

    They are drawn on the CPU from fixed seeds, so they are the same for each device.

    Returns: the student's float32 logits (B, C, h, w), and the other tensors as keyword arguments of
        `kdcache_kernels.distill_loss`.
    """
    C, size = point.num_classes, STRIDES[point.stride]
    generator = torch.Generator().manual_seed(1000 * C + len(point.window))
    # A crop has room beside it, so that its target has more cells than the student.
    room = (3, 2) if point.window in ("crop", "scale") else (0, 0)
    grid = (NATIVE[0] + room[0], NATIVE[1] + room[1])
    view = (size[0] * grid[0] // NATIVE[0], size[1] * grid[1] // NATIVE[1])
    student, teacher = (_logits((BATCH, C, *shape), point.values, generator) for shape in (NATIVE, grid))
    labels = torch.randint(0, C, (BATCH, *size), generator=generator).to(torch.uint8)
    labels[torch.rand(BATCH, *size, generator=generator) < 0.2] = IGNORE_INDEX
    labels[0, 0, 0] = 0
    window = _window(point.window, size, view)
    target = PackedTarget(*pack(teacher, C if C <= MOST_DENSE else KEPT), C, view)
    return student.to(device), {
        "labels_BHW": labels.to(device),
        "target": target.to(device),
        "ignore_index": IGNORE_INDEX,
        "window_B4": None if window is None else window.to(device),
        "flip_B": None if point.window in ("whole", "scale") else torch.tensor([False, True], device=device),
    }


def _logits(shape: tuple[int, ...], values: str, generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    if values == "normal":
        return 3 * normal
    if values == "wide":
        # Either sign of the largest value: a saturated softmax, or one that is tied and stays so.
        return torch.where(normal > 0, 6e4, -6e4)
    # One image just below the range at which a fast path may stop being valid, one above.
    image_B111 = torch.tensor([75.0, 90.0])[:, None, None, None]
    return image_B111 * torch.rand(shape, generator=generator)


def _window(kind: str, size: tuple[int, int], view: tuple[int, int]) -> Tensor | None:
    """Return windows (y0, x0, y1, x1) in pixels of the view for both images, or None for the whole view."""
    if kind in ("whole", "flip"):
        return None
    H, W = size
    corners: list[tuple[float, ...]]
    if kind == "crop":  # along the cells: one to three down, one or two to the right
        y, x = H // NATIVE[0], W // NATIVE[1]
        corners = [(y, x, y + H, x + W), (3 * y, 2 * x, 3 * y + H, 2 * x + W)]
    elif kind == "scale":  # anywhere, zoomed in and out
        corners = [(0.31, 1.7, 0.31 + 0.73 * H, 1.7 + 0.66 * W), (0.2, 0.4, view[0] - 0.7, view[1] - 0.3)]
    else:  # over the edge of the view
        corners = [(-0.3 * H, -0.2 * W, 0.9 * H, 0.8 * W), (0.5 * H, 0.1 * W, 1.4 * H, 1.3 * W)]
    return torch.tensor(corners, dtype=torch.float64)
