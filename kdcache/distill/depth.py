r"""Losses between two depth maps, as one number per image: functions of prediction, reference and mask.

| function | of an image's valid pixels | unit | source |
| --- | --- | --- | --- |
| `l1` | mean \|e\|, e = p - r | metres | |
| `berhu` | mean of \|e\| up to c and (e^2 + c^2) / (2 c) beyond, c = 0.2 max \|e\| | metres | Laina 2016 |
| `silog` | 10 sqrt(var g + 0.15 (mean g)^2), g = log p - log r, biased variance | | Eigen 2014; BTS, AdaBins |
| `scale_shift_invariant` | both aligned, then the smallest 80 % of \|e\| over 2 M, plus gradient matching | | MiDaS |
| `gradient_matching` | sum over scales of mean \|dx e\| + \|dy e\| | that of e | MegaDepth; MiDaS |

The reference is a label, or a teacher's map. Neither it nor the mask gets a gradient. Invalid pixels may be NaN or
infinite in either map and affect neither loss nor gradient. An image without a valid pixel has the loss 0. Nothing is
read from the device, no shape depends on data, and the results are deterministic.

Except for `l1`, none of these is a sum over pixels with a known denominator: a variance, a maximum and an alignment
belong to one image. So each is computed per image, and a batch is the mean over its images with a valid pixel. The
result does not depend on processes and accumulated parts.

Sources: Laina et al. 2016, arXiv 1606.00373, section 3.2 (whose c is of the batch); Eigen et al. 2014, arXiv 1406.2283,
equation 4, with lambda = 0.85 and the factor 10 of BTS (Lee et al. 2019, arXiv 1907.10326) and AdaBins (Bhat et al.
2021, arXiv 2011.14141); Li and Snavely 2018, arXiv 1804.00607; Ranftl et al. 2020, arXiv 1907.01341, section 5, and the
authors' code, whose median counts invalid pixels as zeros, unlike the paper's.

Shapes: B images, H W pixels, P = H W.
"""

import torch
from torch import Tensor

from kdcache.distill.terms.base import divide
from kdcache.distill.terms.overlap import falling_order

LAMBDA = 0.85
"""How much of the error that all pixels of an image share `silog` forgives: 1 is all of it."""
BERHU_SHARE = 0.2
SCALES = 4
KEPT = (4, 5)
"""The share of an image's residuals that are compared after the alignment, the smallest ones: 80 %."""
SMALLEST_SCALE = 1e-6
"""Alignment divides by no less: the mean deviation from the median of an image that shows one depth."""


def l1(prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Return the mean absolute error (B,) of each image's valid pixels.

    Args:
        prediction_BHW: the student's depth, float32 or float64. Only it gets a gradient.
        reference_BHW: the reference depth, of the same dtype and unit.
        mask_BHW: bool, True for valid pixels.
    """
    return _mean(_error(prediction_BHW, reference_BHW, mask_BHW).abs(), mask_BHW)


def berhu(prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Return the reverse Huber loss (B,) of each image: absolute for small errors, squared for large ones.

    e is prediction - reference, and c is a fifth of the image's largest |e|. An error counts as |e| up to c, and as
    (e^2 + c^2) / (2 c) above. The loss is the mean over the image's valid pixels. The gradient treats c as a constant.

    Args:
        prediction_BHW: the student's depth, float32 or float64. Only it gets a gradient.
        reference_BHW: the reference depth, of the same dtype and unit.
        mask_BHW: bool, True for valid pixels.
    """
    error_BHW = _error(prediction_BHW, reference_BHW, mask_BHW).abs()
    c_B11 = BERHU_SHARE * error_BHW.detach().amax((1, 2), keepdim=True)
    safe_B11 = c_B11.masked_fill(c_B11 == 0, 1)
    # e (e / 2c) + c / 2, for the square of a large error overflows first
    squared_BHW = error_BHW * (error_BHW / (2 * safe_B11)) + c_B11 / 2
    return _mean(torch.where(error_BHW > c_B11, squared_BHW, error_BHW), mask_BHW)


def silog(prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Return the scale-invariant logarithmic loss (B,) of each image: 10 sqrt(mean g^2 - 0.85 (mean g)^2).

    g is log prediction - log reference at valid pixels. If all g are 0, or no pixel is valid, loss and gradient are 0.

    Args:
        prediction_BHW: the student's depth, above 0, float32 or float64. Only it gets a gradient.
        reference_BHW: the reference depth, above 0, of the same dtype and unit.
        mask_BHW: bool, True for valid pixels.
    """
    p_BHW, r_BHW = _filled(prediction_BHW, reference_BHW, mask_BHW)
    g_BHW = p_BHW.log() - r_BHW.log()
    mean_B = _mean(g_BHW, mask_BHW)
    centred_BHW = torch.where(mask_BHW, g_BHW - mean_B[:, None, None], 0)
    d_B = _mean(centred_BHW.square(), mask_BHW) + (1 - LAMBDA) * mean_B.square()
    return torch.where(d_B == 0, 0, 10 * d_B.masked_fill(d_B == 0, 1).sqrt())


def scale_shift_invariant(
    prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor, gradient_weight: float = 0.5
) -> Tensor:
    """Return the loss (B,) of maps that are known only up to a scale and a shift, such as disparities.

    First, each map is aligned: its median over the valid pixels is subtracted, and the result is divided by its mean
    absolute value. The smallest 80 % of the absolute differences between the aligned maps are summed, and divided by
    twice the number of valid pixels. The loss is this quotient plus `gradient_weight` times `gradient_matching` of the
    aligned maps.

    The median of an even number of pixels is the lower of the two middle values.

    Args:
        prediction_BHW: the student's map in any unit, float32 or float64. Only it gets a gradient.
        reference_BHW: the reference map, of the same dtype.
        mask_BHW: bool, True for valid pixels.
        gradient_weight: the factor on the gradient matching.
    """
    maps = _filled(prediction_BHW, reference_BHW.detach(), mask_BHW)
    p_BHW, r_BHW = (_aligned(values_BHW, mask_BHW) for values_BHW in maps)
    residual_BP = torch.where(mask_BHW, p_BHW - r_BHW, 0).abs().flatten(1)
    valid_BP, count_B = mask_BHW.flatten(1), _count(mask_BHW)
    # What is not valid has the residual 0 and comes first.
    rank_BP = _rising_rank(residual_BP.detach().masked_fill(~valid_BP, -1))
    first_B, kept_B = valid_BP.shape[1] - count_B, count_B * KEPT[0] // KEPT[1]
    kept_BP = valid_BP & (rank_BP < (first_B + kept_B)[:, None])
    # Not a number times False: a residual that is not finite shows.
    trimmed_B = torch.where(kept_BP | ~residual_BP.isfinite(), residual_BP, 0).sum(1)
    loss_B = divide(trimmed_B, 2 * count_B.to(p_BHW.dtype))
    if gradient_weight == 0:
        return loss_B
    return loss_B + gradient_weight * gradient_matching(p_BHW, r_BHW, mask_BHW)


def gradient_matching(prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor, scales: int = SCALES) -> Tensor:
    """Return the gradient-matching loss (B,) of each image: how much the error changes between neighbouring pixels.

    The error is prediction - reference. Its map is subsampled at strides of 1, 2, 4 and 8 pixels. At each stride, the
    absolute differences between valid neighbours are summed, and divided by the number of valid pixels. The loss is the
    sum over the strides.

    Args:
        prediction_BHW: the student's depth, float32 or float64. Only it gets a gradient.
        reference_BHW: the reference depth, of the same dtype and unit.
        mask_BHW: bool, True for valid pixels.
        scales: the number of strides. The default, 4, gives the strides above.
    """
    error_BHW = _error(prediction_BHW, reference_BHW, mask_BHW)
    loss_B = error_BHW.new_zeros(len(error_BHW))
    for step in (2**scale for scale in range(scales)):
        e_Bhw, valid_Bhw = error_BHW[:, ::step, ::step], mask_BHW[:, ::step, ::step]
        total_B = loss_B.new_zeros(len(loss_B))
        for axis in (1, 2):
            size = e_Bhw.shape[axis] - 1
            pairs_Bhw = valid_Bhw.narrow(axis, 0, size) & valid_Bhw.narrow(axis, 1, size)
            total_B = total_B + torch.where(pairs_Bhw, e_Bhw.diff(dim=axis).abs(), 0).sum((1, 2))
        loss_B = loss_B + divide(total_B, _count(valid_Bhw).to(total_B.dtype))
    return loss_B


def _filled(prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps with 1 at invalid pixels, so nothing there is read, also in the backward."""
    return torch.where(mask_BHW, prediction_BHW, 1), torch.where(mask_BHW, reference_BHW.detach(), 1)


def _error(prediction_BHW: Tensor, reference_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Return prediction minus reference, and 0 at invalid pixels."""
    p_BHW, r_BHW = _filled(prediction_BHW, reference_BHW, mask_BHW)
    return p_BHW - r_BHW


def _count(mask_BHW: Tensor) -> Tensor:
    return mask_BHW.sum((1, 2))


def _mean(loss_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Return the mean (B,) over the valid pixels. Invalid pixels must be 0."""
    return divide(loss_BHW.sum((1, 2)), _count(mask_BHW).to(loss_BHW.dtype))


def _aligned(values_BHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Return each map minus its median, divided by the mean absolute deviation from it. Invalid pixels are 0."""
    values_BP, valid_BP, count_B = values_BHW.flatten(1), mask_BHW.flatten(1), _count(mask_BHW)
    # Invalid pixels come first, in front of any number.
    rank_BP = _rising_rank(values_BP.detach().masked_fill(~valid_BP, -torch.inf))
    middle_B = valid_BP.shape[1] - count_B + (count_B - 1).clamp_min(0) // 2
    # A sum over one pixel, whose backward needs no scatter.
    median_B = torch.where(valid_BP & (rank_BP == middle_B[:, None]), values_BP, 0).sum(1)
    centred_BHW = torch.where(mask_BHW, values_BHW - median_B[:, None, None], 0)
    scale_B = _mean(centred_BHW.abs(), mask_BHW).clamp_min(SMALLEST_SCALE)
    return centred_BHW / scale_B[:, None, None]


@torch.no_grad()
def _rising_rank(values_BP: Tensor) -> Tensor:
    """Return the rank of every value within its image, from the smallest, (B, P) int64."""
    order_BP = falling_order(-values_BP[:, None])[:, 0]
    places_BP = torch.arange(values_BP.shape[1], device=values_BP.device).expand_as(order_BP)
    return torch.empty_like(order_BP).scatter(1, order_BP, places_BP)
