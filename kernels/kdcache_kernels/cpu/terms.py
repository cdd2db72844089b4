"""The losses of a pixel and the factors of its gradient, between the two loops over the classes.

Legend: C classes, P phases, n pixels of a tile and phase; see `loss.py` for tiles and phases. Rows of pixels are
4 * TILE long, phases one after the other.
"""

import numpy as np

from .math import LN2, OPTIONS, TILE, exp2, log2, njit

_f = np.float32
_LN2 = _f(LN2)


@njit(**OPTIONS)
def any_counts(weight_Pn):
    """Return True if any weight is not 0, NaN included. `weight_Pn` has a weight per pixel: P phases of n pixels."""
    for p in range(weight_Pn.shape[0]):
        for k in range(weight_Pn.shape[1]):
            if weight_Pn[p, k] != 0:
                return True
    return False


@njit(**OPTIONS)
def pixel_terms(
    n, sum_1, sum_T, sum_v, cross, own, weight_Pn, gate_Pn, ce_factor, kl_factor, slope_1, slope_T, slope_v, hot, loss
):
    """Add the CE and KL of a row of label pixels to `loss`, and compute the factors of their gradient.

    The gradient by the logit of a class is slope_1 * e_1 + slope_T * e_T - slope_v * v, minus `hot` if the class is the
    pixel's label. e_1 and e_T are the student's exponentials at T = 1 and at T, and v is the target's at T.

    The pixels are a tile of a label row: P phases of n pixels, stored one after the other. P is 4 with n up to TILE, or
    1 with n up to 4 * TILE. An array without a shape has 4 * TILE float32 entries. Its entry p * TILE + k is for pixel
    k of phase p.

    Shapes and units:
        n: pixels of each phase.
        sum_1, sum_T, sum_v: sums of e_1, e_T and v over the classes.
        cross: sum over classes of v * (target - student), with logits times log2(e) / T.
        own: log2 of e_1 for the pixel's label.
        weight_Pn, gate_Pn: (P, n) weights in CE and in KL, 0 if the term does not count the pixel.
        ce_factor, kl_factor: factors of the terms in the gradient.
        slope_1, slope_T, slope_v, hot: results, one number per pixel.
        loss: (8 * TILE,) float64. Each pixel's CE is added to the first half, its KL to the second, both in bits. Both
            halves have the order of the other arrays.
    """
    for p in range(weight_Pn.shape[0]):
        start = p * TILE
        for k in range(n):
            weight, gate = weight_Pn[p, k], gate_Pn[p, k]
            kl = cross[start + k] / sum_v[start + k] + log2(sum_T[start + k] / sum_v[start + k])
            loss[start + k] += weight * (log2(sum_1[start + k]) - own[start + k])
            loss[4 * TILE + start + k] += gate * kl if gate != 0 else _f(0)
            hot[start + k] = ce_factor * weight
            slope_1[start + k] = ce_factor * weight / sum_1[start + k]
            slope_T[start + k] = kl_factor * gate / sum_T[start + k]
            slope_v[start + k] = kl_factor * gate / sum_v[start + k]


@njit(**OPTIONS)
def smoothing_terms(n, sum_1, mix, total_weight, spread_Pn, ce_factor, slope_1, even, loss):
    """Add the part of label smoothing to the cross-entropy of a row of label pixels and to its gradient's factors.

    This part is the sum over all classes of spread * class weight * the cross-entropy with that class. Call it after
    `pixel_terms`. An array without a shape has 4 * TILE float32 entries. Its entry p * TILE + k is for pixel k of phase
    p.

    Shapes and units:
        n: pixels of each of the P phases.
        sum_1: sum over the classes of e_1, the student's exponential at T = 1.
        mix: sum over the classes of class weight * log2 of e_1.
        total_weight: sum of the class weights.
        spread_Pn: (P, n) share of a label that each class gets, times the pixel's weight. 0 if not labelled.
        ce_factor: factor of CE in the gradient.
        slope_1: factor of e_1 in the gradient by every class's logit, increased.
        even: result. Subtract even * class weight from the gradient by every class's logit.
        loss: (8 * TILE,) float64. This part of CE in bits is added to its first half.
    """
    for p in range(spread_Pn.shape[0]):
        start = p * TILE
        for k in range(n):
            spread = spread_Pn[p, k]
            loss[start + k] += spread * (total_weight * log2(sum_1[start + k]) - mix[start + k])
            slope_1[start + k] += ce_factor * spread * total_weight / sum_1[start + k]
            even[start + k] = ce_factor * spread


@njit(**OPTIONS)
def focal_terms(n, sum_1, own, weight_Pn, gamma, slope_1, hot, loss):
    """Turn the cross-entropy of `pixel_terms` into the focal loss: multiply it by (1 - p)**gamma.

    p is the probability of the pixel's label. Call this function after `pixel_terms`, whose docstring says how arrays
    without a shape are stored.

    Shapes and units:
        n: pixels of each of the P phases.
        sum_1: sum over the classes of the student's exponentials at T = 1.
        own: log2 of the exponential of the pixel's label.
        weight_Pn: (P, n) weight in CE, 0 if not counted.
        gamma: exponent, > 0.
        slope_1, hot: factors of the gradient, from `pixel_terms`. They are multiplied by (1 - p)**gamma - gamma * (1 -
            p)**(gamma - 1) * p * log(p).
        loss: (8 * TILE,) float64. Its first half, CE in bits, becomes the focal loss.
    """
    for p in range(weight_Pn.shape[0]):
        start = p * TILE
        for k in range(n):
            bits = log2(sum_1[start + k]) - own[start + k]
            sure = exp2(-bits)
            rest = max(_f(1) - sure, _f(1e-30))
            power = exp2(gamma * log2(rest))
            slope = power + gamma * (power / rest) * sure * bits * _LN2
            # Probability 1: both are 0, and the quotient is not to be trusted.
            counts = rest > _f(1e-30)
            power, slope = (power if counts else _f(0)), (slope if counts else _f(0))
            loss[start + k] += weight_Pn[p, k] * bits * (power - _f(1))
            slope_1[start + k] *= slope
            hot[start + k] *= slope
