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
    """Return True if any pixel has a nonzero weight (NaN counts as nonzero)."""
    for p in range(weight_Pn.shape[0]):
        for k in range(weight_Pn.shape[1]):
            if weight_Pn[p, k] != 0:
                return True
    return False


@njit(**OPTIONS)
def pixel_terms(
    n, sum_1, sum_T, sum_v, cross, own, weight_Pn, gate_Pn, ce_factor, kl_factor, slope_1, slope_T, slope_v, hot, loss
):
    """Compute the losses of a row of pixels, and the factors of its gradient, from sums over classes.

    Shapes and units:
        sum_1, sum_T, sum_v: sums of the exponentials of the student at T = 1 and at T, and of the target at T.
        cross: sum of target exponential * (target - student), base-2 logits at T.
        own: base-2 logarithm of the exponential at T = 1 of the pixel's label.
        weight_Pn, gate_Pn: factors of CE and KL, or 0 if a pixel is not counted.
        slope_1, slope_T, slope_v, hot: results; the gradient by a student logit is
            slope_1 * exponential at 1 + slope_T * exponential at T - slope_v * target's exponential [- hot].
        loss: (2 * 4 * TILE,) float64, CE and KL in bits, to which is added.
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
    """Add what smoothed labels ask of every class next to a label's own: `spread` of each class's weight.

    Shapes and units:
        mix: sum over the classes of class weight * base-2 logit at T = 1, relative as `sum_1` is.
        total_weight: sum of the class weights.
        spread_Pn: the share of one class, times the pixel's weight, or 0 if it is not labelled.
        even: result, to be subtracted from the gradient by a logit, times the class's weight.
        slope_1, loss: as in `pixel_terms`, which came before; to these is added.
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
    """Multiply the cross-entropy of `pixel_terms`, which ran before, by (1 - p)**gamma of the label's probability p.

    The gradient by a logit is the cross-entropy's times (1 - p)**gamma - gamma (1 - p)**(gamma - 1) p log p.
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
