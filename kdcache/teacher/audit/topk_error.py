"""The error that keeping only k classes causes in the gradient of the KL term, on a teacher's targets.

The gradient of T^2 KL(p_t || p_s) by the student's logits is T (p_s - p_t), so the relative error is
||p_t' - p_t|| / ||p_s - p_t|| over every pixel at view size. t' keeps the k largest classes of t and the log-odds of
all others. Two students bracket a training: an untrained one (uniform), and the teacher plus unit Gaussian noise, as in
`kdcache_kernels.gradient_error`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache_kernels import densify, pack

TEMPERATURES = (1.0, 2.0, 4.0)
SEED = 20


@dataclass(frozen=True)
class GradientErrors:
    """The relative error of the KL gradient if only k classes of a target are kept.

    Attributes:
        records: number of measured records.
        kept: number of classes that the cache stores.
        uniform: k -> temperature -> error for an untrained student.
        noisy: k -> temperature -> error for a student near the teacher.
    """

    records: int
    kept: int
    uniform: dict[int, dict[float, float]]
    noisy: dict[int, dict[float, float]]


def candidates(kept: int) -> tuple[int, ...]:
    """Return the values of k to measure: the powers of two, from 1, below the number `kept` of stored classes."""
    return tuple(takewhile(lambda k: k < kept, (2**n for n in count())))


@torch.inference_mode()
def gradient_errors(
    logits: Iterable[Tensor], kept: int, size: tuple[int, int], *, align_corners: bool
) -> GradientErrors:
    """Measure the relative error of the KL gradient if only the k largest logits of each pixel are kept.

    It is measured for each k in `candidates(kept)`, at the temperatures 1, 2 and 4.

    Args:
        logits: the teacher's logits of all classes, (C, h, w) for each record.
        kept: number of classes that the cache stores.
        size: (H, W) of the view in pixels.
        align_corners: whether the resize from (h, w) to `size` aligns corners.
    Memory: O(C*H*W).
    """
    ks = candidates(kept)
    errors = torch.zeros(len(ks), len(TEMPERATURES), dtype=torch.float64)
    students = torch.zeros(2, len(TEMPERATURES), dtype=torch.float64)
    generator = torch.Generator().manual_seed(SEED)
    records = 0
    for teacher_Chw in logits:
        records += 1
        classes = teacher_Chw.shape[0]
        noise_Chw = torch.randn(teacher_Chw.shape, generator=generator, dtype=teacher_Chw.dtype)
        up_CHW = _resize(teacher_Chw, size, align_corners)
        noisy_CHW = _resize(teacher_Chw + noise_Chw, size, align_corners)
        exact = [(up_CHW / T).softmax(0) for T in TEMPERATURES]
        for column, (T, p_CHW) in enumerate(zip(TEMPERATURES, exact, strict=True)):
            students[0, column] += _squares(p_CHW - 1 / classes)
            students[1, column] += _squares((noisy_CHW / T).softmax(0) - p_CHW)
        for row, k in enumerate(ks):
            left_CHW = _resize(densify(*pack(teacher_Chw[None], k), classes)[0], size, align_corners)
            for column, (T, p_CHW) in enumerate(zip(TEMPERATURES, exact, strict=True)):
                errors[row, column] += _squares((left_CHW / T).softmax(0) - p_CHW)
    uniform, noisy = (
        {
            k: {T: _relative(float(e), float(g)) for T, e, g in zip(TEMPERATURES, row, student, strict=True)}
            for k, row in zip(ks, errors, strict=True)
        }
        for student in students
    )
    return GradientErrors(records, kept, uniform, noisy)


def _resize(x_Chw: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(x_Chw[None], size, mode="bilinear", align_corners=align_corners)[0]


def _squares(x_CHW: Tensor) -> float:
    # Summed in float32 by pairs, then added up in float64: a record has too few numbers to lose digits that matter.
    return float(x_CHW.square().sum())


def _relative(error: float, gradient: float) -> float:
    return math.sqrt(error / gradient) if gradient else 0.0
