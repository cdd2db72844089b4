"""Choose how many classes to keep: measure the error of top-k in the gradient of the KL term on logits.

Softmax at a temperature above 1 brings back the classes that top-k dropped, so a k that is harmless at T = 1 is not at
T = 2 (21 classes, k = 8, synthetic logits: 6 % and 30 % of the gradient). No rule of thumb replaces the measurement on
the teacher's logits.

Legend: B batch, C classes, h w target pixels, H W label pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import is_finite
from .errors import ValueRangeError, misfit
from .topk import check_logits, compute_dtype, densify, is_logits, pack

DENSE_UP_TO = 32
CANDIDATES = (8, 16, 32, 64)
TEMPERATURES = (1.0, 2.0)
MAX_GRADIENT_ERROR = 0.05
SEED = 20


@torch.no_grad()
def gradient_error(
    logits_BChw: Tensor, k: int, temperature: float, size: tuple[int, int], *, align_corners: bool = False
) -> float:
    """Return the relative error of the KL gradient if only k classes of the teacher are kept.

    >>> import kdcache_kernels
    >>> logits = torch.randn(1, 21, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> kdcache_kernels.gradient_error(logits, 21, 1.0, (16, 16)) < 0.01
    True

    The gradient of KL by the student's logits is proportional to p_s - p_t, the student's minus the teacher's
    probabilities. With top-k logits, p_t becomes p_k. The error is ||p_k - p_t|| / ||p_s - p_t|| over all label pixels.
    It includes the rounding to float16. The student is simulated by the teacher's logits plus unit Gaussian noise
    (fixed seed).

    Args:
        logits_BChw: raw teacher logits, any floating dtype and device.
        k: number of kept classes, 1 to C.
        temperature: > 0, dimensionless.
        size: (H, W) of the labels in pixels.
        align_corners: whether the last resize of the teacher's head aligns corners.
    Returns: a dimensionless number, 0 for one class. Waits for the device.
    Raises: ShapeError for the logits, ValueRangeError for k or temperature.
    Memory: O(C*H*W), because it computes one image at a time.
    Source: T * (p_s - p_t) is the gradient in Hinton et al. 2015, section 2.1.
    """
    if not (is_finite(temperature) and temperature > 0):
        raise ValueRangeError(
            f"Invalid temperature: {temperature}", fix="Pass a finite number above 0, such as 1 or 2."
        )
    check_logits(logits_BChw, k)
    num_classes = logits_BChw.shape[1]
    dtype = compute_dtype(logits_BChw.dtype)
    generator = torch.Generator().manual_seed(SEED)
    error = gradient = torch.zeros((), dtype=torch.float64, device=logits_BChw.device)

    def probabilities(image_1Chw: Tensor) -> Tensor:
        image_1CHW = F.interpolate(image_1Chw, size, mode="bilinear", align_corners=align_corners)
        return (image_1CHW / temperature).softmax(1)

    for logits_Chw in logits_BChw.unbind():
        logits_1Chw = logits_Chw[None]
        teacher_1Chw = logits_1Chw.to(dtype)
        # Drawn on the CPU: the figure must not depend on the device.
        noise_1Chw = torch.randn(teacher_1Chw.shape, generator=generator, dtype=dtype).to(teacher_1Chw.device)
        packed_1Chw = densify(*pack(logits_1Chw, k), num_classes, dtype)
        exact_1CHW = probabilities(teacher_1Chw)
        error = error + (probabilities(packed_1Chw) - exact_1CHW).double().square().sum()
        gradient = gradient + (probabilities(teacher_1Chw + noise_1Chw) - exact_1CHW).double().square().sum()
    if float(gradient) == 0:
        return 0.0
    return math.sqrt(float(error) / float(gradient))


def choose_k(
    logits_BChw: Tensor, size: tuple[int, int], num_classes: int, *, align_corners: bool = False
) -> tuple[int, dict[int, dict[float, float]]]:
    """Choose how many classes per pixel a cache must keep, as `--top-k auto` does.

    >>> import kdcache_kernels
    >>> kdcache_kernels.choose_k(torch.randn(1, 21, 8, 8), (16, 16), num_classes=21)
    (21, {})

    With at most 32 classes, keep all. Otherwise choose the smallest k of 8, 16, 32, 64 whose error is at
    most 0.05 at T = 1 and at T = 2, or C if none is. The error is the KL gradient's, see `gradient_error`.

    Args:
        logits_BChw: raw logits of the teacher, usually of 16 records.
        size: (H, W) of the labels in pixels.
        num_classes: C, which the logits must have.
        align_corners: whether the last resize of the teacher's head aligns corners.
    Returns: (k, table). `table[k][temperature]` is the measured error for every k that was tried. The table is empty
        with at most 32 classes.
    Raises: ShapeError if the logits do not have num_classes classes.
    """
    if not is_logits(logits_BChw) or logits_BChw.shape[1] != num_classes:
        raise misfit(
            "logits_BChw",
            logits_BChw,
            f"a dense (B, {num_classes}, h, w) of floats",
            "Pass the class list of the teacher that made the logits.",
        )
    table: dict[int, dict[float, float]] = {}
    if num_classes <= DENSE_UP_TO:
        return num_classes, table
    for k in (*(k for k in CANDIDATES if k < num_classes), num_classes):
        table[k] = {T: gradient_error(logits_BChw, k, T, size, align_corners=align_corners) for T in TEMPERATURES}
        if max(table[k].values()) <= MAX_GRADIENT_ERROR:
            return k, table
    return num_classes, table
