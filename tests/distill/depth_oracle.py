"""Losses of depth as their papers write them, pixel by pixel in Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Map = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def valid_pairs(p: Map, r: Map, mask: Mask) -> list[tuple[float, float]]:
    return [(float(p[at]), float(r[at])) for at in zip(*np.nonzero(mask), strict=True)]


def l1(p: Map, r: Map, mask: Mask) -> float:
    pairs = valid_pairs(p, r, mask)
    return math.fsum(abs(a - b) for a, b in pairs) / len(pairs) if pairs else 0.0


def berhu(p: Map, r: Map, mask: Mask) -> float:
    """Laina et al.: B(x) = |x| for |x| <= c, else (x^2 + c^2) / 2c."""
    errors = [abs(a - b) for a, b in valid_pairs(p, r, mask)]
    if not errors or max(errors) == 0:
        return 0.0
    c = max(errors) / 5
    return math.fsum(e if e <= c else (e * e + c * c) / (2 * c) for e in errors) / len(errors)


def silog(p: Map, r: Map, mask: Mask) -> float:
    """BTS: 10 sqrt(1/T sum g^2 - 0.85/T^2 (sum g)^2)."""
    g = [math.log(a) - math.log(b) for a, b in valid_pairs(p, r, mask)]
    if not g:
        return 0.0
    squares, total, n = math.fsum(x * x for x in g), math.fsum(g), len(g)
    return 10 * math.sqrt(max(squares / n - 0.85 * total * total / n**2, 0.0))


def aligned(values: Map, mask: Mask) -> Map:
    """(d - t) / s: t the median, s the mean of |d - t|, over valid pixels."""
    own = sorted(float(v) for v in values[mask])
    if not own:
        return np.zeros_like(values)
    t = own[(len(own) - 1) // 2]
    s = max(math.fsum(abs(v - t) for v in own) / len(own), 1e-6)
    return np.where(mask, (values - t) / s, 0.0)


def gradient_matching(p: Map, r: Map, mask: Mask) -> float:
    """At every, every 2nd, 4th and 8th pixel: 1/M sum |dx (p - r)| + |dy (p - r)|, over pairs of valid pixels."""
    total = 0.0
    for step in (1, 2, 4, 8):
        rows, columns = range(0, p.shape[0], step), range(0, p.shape[1], step)
        count, steps = 0, []
        for y in rows:
            for x in columns:
                if not mask[y, x]:
                    continue
                count += 1
                for ny, nx in ((y + step, x), (y, x + step)):
                    if ny in rows and nx in columns and mask[ny, nx]:
                        steps.append(abs((p[ny, nx] - r[ny, nx]) - (p[y, x] - r[y, x])))
        total += math.fsum(steps) / count if count else 0.0
    return total


def scale_shift_invariant(p: Map, r: Map, mask: Mask) -> float:
    """MiDaS: 1/2M sum of the 0.8 M smallest |p' - r'| of the aligned maps, and half of gradient matching."""
    a, b = aligned(p, mask), aligned(r, mask)
    residuals = sorted(abs(x - y) for x, y in valid_pairs(a, b, mask))
    if not residuals:
        return 0.0
    kept = residuals[: len(residuals) * 8 // 10]
    return math.fsum(kept) / (2 * len(residuals)) + 0.5 * gradient_matching(a, b, mask)


ORACLES: dict[str, Callable[[Map, Map, Mask], float]] = {
    "l1": l1,
    "berhu": berhu,
    "silog": silog,
    "gradient_matching": gradient_matching,
    "scale_shift_invariant": scale_shift_invariant,
}
