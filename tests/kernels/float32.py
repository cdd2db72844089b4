"""How far a loss in float32 may be from the exact one: bounds that follow from its roundings, whatever is drawn."""

UNIT = 2.0**-24
"""The rounding of a number to float32, relative."""

ROUNDINGS = 32
"""Roundings of a number of order 1 on the way from logits to a loss.

A logit has three (maximum subtracted, constant, product), an exponential up to four units in the last place, a sum
over C classes at most C, a quotient and a logarithm two each. Each shifts the loss by one unit of the entropies of the
two distributions, not of the logits: a logit far below the maximum has a large error and no probability.
"""

INTERPOLATED = 4
"""Roundings of an interpolated logit: of its corners, along the row, along the column, of the distance to the maximum.

They are relative to the corners, which may be far from 0 where the logit is the pixel's largest.
"""


def error_of_value(span: float = 0.0) -> float:
    """Return the largest error of a pixel's cross-entropy, relative to itself plus 1; of its KL / T^2 likewise.

    Both are the difference of two numbers of that order, each rounded by itself: 1 of them stays however small the
    difference is. It is also the largest error of a difference of two probabilities, hence of a gradient.

    Args:
        span: the largest minus the smallest logit / T at a corner, in nats, where logits are interpolated; else 0.
    """
    return UNIT * (ROUNDINGS + INTERPOLATED * span)
