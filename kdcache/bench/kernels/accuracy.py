"""The accuracy grid: the public losses against float64, every combination of what has gone wrong before.

The oracle is `impl="reference"` on float64 logits that were first rounded to the dtype under test, so a dtype's own
rounding of its input is not counted. Images are a few dozen pixels wide: the errors that a kernel makes (a wrong tap, a
pixel in the wrong term, a cancellation) do not need more. Of the 27,000 points the command line takes every eighth,
along diagonals, so that every two values of two factors still meet; that takes about a minute.

The gradient is taken of 2**n * loss, as a GradScaler would: an averaged gradient in float16 flushes to 0, which is no
error of a kernel.

Bounds: loss 1e-6 |L| + 1e-7 T^2; gradient, largest error over largest value, 2e-6 in float32, 1e-3 in float16 and 8e-3
in bfloat16, which is what their rounding of the result costs. To these comes what float32 cannot know: an
interpolated logit to 6e-8 of the largest, over T; the difference of two probabilities, of the order of 1 / T, to 6e-8;
a sum over more than 25 classes to the square root of their number. The loss of relations has bounds of its own
(`rounding`) in the place of the latter: a correlation is as well known as its vectors are far from their means.

Legend: B batch, C classes, H W label size, h w logits' own size.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.bench.kernels.losses import LOSSES
from kdcache.bench.kernels.rivals import resolved
from kdcache.bench.kernels.rounding import rounding
from kdcache.bench.kernels.shapes import DTYPES, KEPT, MOST_DENSE
from kdcache_kernels import PackedTarget, distill_loss, pack, relation_loss
from kdcache_kernels.on_cells.problem import RelationProblem

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
EVERY = 8
"""The command line checks one of so many points."""
FACTORS = ("loss", "stride", "temperature", "num_classes", "window", "values")


@dataclass(frozen=True)
class CheckSettings:
    """The choice of points: the whole grid by default, or a part of it."""

    device: torch.device
    impl: str = "auto"
    dtypes: tuple[str, ...] = tuple(DTYPES)
    strides: tuple[str, ...] = tuple(STRIDES)
    temperatures: tuple[float, ...] = TEMPERATURES
    classes: tuple[int, ...] = CLASSES
    windows: tuple[str, ...] = WINDOWS
    values: tuple[str, ...] = VALUES
    losses: tuple[str, ...] = tuple(LOSSES)
    every: int = 1

    def points(self) -> Iterator["Point"]:
        """The combinations: all, or those whose positions on the axes have a sum that `every` divides."""
        axes = (self.dtypes, self.strides, self.temperatures, self.classes, self.windows, self.values)
        grid = (*axes, self.losses)
        for combination in itertools.product(*map(enumerate, grid)):
            positions, values = zip(*combination, strict=True)
            if sum(positions) % self.every == 0:
                yield Point(*values)


@dataclass(frozen=True)
class Point:
    """One combination."""

    dtype: str
    stride: str
    temperature: float
    num_classes: int
    window: str
    values: str
    loss: str = "distill"


@dataclass(frozen=True)
class Judged:
    """The result of the implementation at a point.

    Attributes:
        loss_error: |loss - oracle's|.
        gradient_error: max |g - oracle's| / max |oracle's|.
    """

    point: Point
    loss_error: float
    loss_bound: float
    gradient_error: float
    gradient_bound: float

    @property
    def loss_share(self) -> float:
        """The error of the loss as a share of its bound; NaN is beyond it."""
        return self.loss_error / self.loss_bound

    @property
    def gradient_share(self) -> float:
        """The error of the gradient as a share of its bound."""
        return self.gradient_error / self.gradient_bound

    @property
    def passed(self) -> bool:
        return self.loss_error <= self.loss_bound and self.gradient_error <= self.gradient_bound

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; an error that is not finite is null, for JSON has no NaN."""
        errors = {name: value for name, value in vars(self).items() if name != "point"}
        finite = {name: value if math.isfinite(value) else None for name, value in errors.items()}
        return {**asdict(self.point), **finite, "passed": self.passed}


def check(settings: CheckSettings) -> Iterator[Judged]:
    """Judge every point, one after the other.

    Raises: ValueRangeError for an implementation that cannot run on the device.
    """
    impl = resolved(settings.impl, settings.device)  # by name, so that nothing else can stand in for it
    for point in settings.points():
        yield _judge(point, settings.device, impl)


def summary(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """A row per value of every factor: the worst errors by dtype, the points and how many missed a bound."""
    rows = []
    for factor in FACTORS:
        for value in dict.fromkeys(getattr(result.point, factor) for result in judged):
            among = [result for result in judged if getattr(result.point, factor) == value]
            by_dtype = {
                dtype: {
                    error: _worst([getattr(result, error) for result in among if result.point.dtype == dtype])
                    for error in ("loss_share", "gradient_error")
                }
                for dtype in dict.fromkeys(result.point.dtype for result in among)
            }
            missed = sum(not result.passed for result in among)
            rows.append({"factor": factor, "value": value, "points": len(among), "missed": missed, "worst": by_dtype})
    return rows


def _worst(errors: Sequence[float]) -> float:
    """The largest; NaN is larger than anything."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def _judge(point: Point, device: torch.device, impl: str) -> Judged:
    student, arguments = _draw(point, device)

    def run(logits: Tensor, implementation: str, scale: float) -> tuple[float, Tensor]:
        loss, gradient = _compute(point, logits, arguments, implementation, scale)
        return loss.item(), gradient.double() / scale

    rounded = student.to(DTYPES[point.dtype])
    expected, expected_gradient = run(rounded.double(), "reference", 1.0)
    largest = expected_gradient.abs().max().clamp_min(1e-30)
    loss, gradient = run(rounded, impl, _scale(point, largest.item()))
    loss_rounding, gradient_rounding = _rounding(point, rounded, arguments, largest.item())
    return Judged(
        point,
        loss_error=abs(loss - expected),
        loss_bound=LOSS_RELATIVE * abs(expected) + loss_rounding,
        gradient_error=((gradient - expected_gradient).abs().max() / largest).item(),
        gradient_bound=GRADIENT_BOUND[point.dtype] + gradient_rounding,
    )


def _rounding(point: Point, student: Tensor, arguments: dict[str, Any], largest: float) -> tuple[float, float]:
    """What float32 cannot know of the loss, and of the gradient as a share of its largest element."""
    T = point.temperature
    if point.loss == "dist":
        loss, gradient = rounding(_problem(point, student, arguments))
        return loss.item(), gradient.max().item() / largest
    per_squared_temperature = LOSS_PER_SQUARED_TEMPERATURE * max(1.0, math.sqrt(point.num_classes / 25))
    return per_squared_temperature * T**2, ROUNDOFF * (student.abs().max().item() / T + T)


def launch(point: Point, device: torch.device) -> None:
    """Call what a check of a point calls of the implementation, and look at nothing."""
    student, arguments = _draw(point, device)
    _compute(point, student.to(DTYPES[point.dtype]), arguments, "auto", 1.0)


def _compute(point: Point, logits: Tensor, arguments: dict[str, Any], impl: str, scale: float) -> tuple[Tensor, Tensor]:
    """The loss at a point, and the gradient of a multiple of it."""
    leaf = logits.detach().requires_grad_()
    if point.loss == "dist":
        loss = relation_loss(leaf, **arguments, temperature=point.temperature, impl=impl)
    else:
        loss = distill_loss(leaf, **arguments, kl_weight=1.0, temperature=point.temperature, impl=impl).loss
    return loss, torch.autograd.grad(loss, leaf, torch.full_like(loss, scale))[0]


def _scale(point: Point, largest: float) -> float:
    """The power of two that is nearest to the number of pixels, or of cells, where it keeps the gradient in float16.

    The gradient of relations has the steepness of a correlation, which is 1e4 where predictions are even.
    """
    height, width = NATIVE if point.loss == "dist" else STRIDES[point.stride]
    scale = float(2 ** round(math.log2(BATCH * height * width)))
    return min(scale, 2.0 ** -round(math.log2(largest))) if point.loss == "dist" else scale


def _draw(point: Point, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    """The student's logits in float32 and the other arguments of the loss, drawn on the CPU."""
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
    where = {
        "window_B4": None if window is None else window.to(device),
        "flip_B": None if point.window in ("whole", "scale") else torch.tensor([False, True], device=device),
    }
    if point.loss != "dist":
        return student.to(device), where | {
            "labels_BHW": labels.to(device),
            "target": target.to(device),
            "ignore_index": IGNORE_INDEX,
        }
    dense = target.values if target.indices is None else target.densify()
    arguments = {"teacher_logits_BChw": dense, "counted_BHW": labels != IGNORE_INDEX}
    on_device = {name: tensor.to(device) for name, tensor in arguments.items()}
    return student.to(device), where | on_device | {"view_size": view, "size": size}


def _problem(point: Point, student: Tensor, arguments: dict[str, Any]) -> RelationProblem:
    return RelationProblem(
        student=student,
        teacher=arguments["teacher_logits_BChw"],
        view_size=arguments["view_size"],
        size=arguments["size"],
        temperature=point.temperature,
        window=arguments["window_B4"],
        flip=arguments["flip_B"],
        pixel_weight=None,
        counted=arguments["counted_BHW"],
        count=None,
        need_gradient=False,
        beta=1.0,
        gamma=1.0,
        moments=None,
    )


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
    """Windows (y0, x0, y1, x1) in pixels of the view for both images; None is the whole view."""
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
