"""The kinds of heads: the meaning of a network's raw output, and the one way in which it becomes depth.

    categorical   logits of classes, whose softmax is the prediction
    regression    numbers per cell: depth is `softplus` or `exp` of the raw output, clipped at `max_depth`

A depth map is resized as raw output, before the nonlinearity. Between its cells a network predicts, with `exp`, the
geometric mean of depths. Resizing depth afterwards would give larger values at every edge.
Torch is imported only if a tensor is given.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Parameterisation = Literal["softplus", "exp", "identity"]


@dataclass(frozen=True)
class CategoricalHead:
    """A head of logits (B, classes, h, w)."""

    classes: int
    kind: Literal["categorical"] = "categorical"


@dataclass(frozen=True)
class RegressionHead:
    """A head of numbers (B, channels, h, w), as in model.json and in a declaration in code.

    Attributes:
        unit: the values' unit: `m` for depth in metres, or another name, such as `relative`.
        parameterisation: how raw output becomes values: `softplus` and `exp` are positive, `identity` is any number.
        max_depth: the largest magnitude of the values, at which they are clipped. None does not clip.
    Raises: ValueError for invalid values.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  where pydantic reads one

    channels: int = 1
    unit: str = "m"
    parameterisation: Parameterisation = "softplus"
    max_depth: float | None = 80.0
    kind: Literal["regression"] = "regression"

    def __post_init__(self) -> None:
        if self.parameterisation not in (names := get_args(Parameterisation)):
            raise ValueError(f"parameterisation is one of {', '.join(names)}, not {self.parameterisation}")
        if self.channels < 1:
            raise ValueError(f"channels is at least 1, not {self.channels}")
        if self.max_depth is not None and not 0 < self.max_depth < math.inf:
            raise ValueError(f"max_depth is a finite number above 0, not {self.max_depth:g}")

    @property
    def range(self) -> tuple[float, float] | None:
        """The least and the largest value, or None without clipping."""
        if self.max_depth is None:
            return None
        return (-self.max_depth if self.parameterisation == "identity" else 0.0), self.max_depth

    def values(self, raw: "Tensor") -> "Tensor":
        """Return values in the head's unit (see `values_of`)."""
        return values_of(raw, self.parameterisation, self.max_depth)


HeadKind = CategoricalHead | RegressionHead


def values_of(raw: "Tensor", parameterisation: Parameterisation, max_depth: float | None) -> "Tensor":
    """Return depth from a raw output of any shape, which must be resized before. Differentiable, float32 or float64.

    The gradient passes the clip at `max_depth` (see `clip`).
    """
    import torch
    from torch.nn import functional as F

    wide = raw if raw.dtype == torch.float64 else raw.float()
    if parameterisation == "exp":
        # Clipped first: the gradient of an infinite exponential would be NaN.
        return (wide if max_depth is None else clip(wide, None, math.log(max_depth))).exp()
    values = F.softplus(wide, threshold=40) if parameterisation == "softplus" else wide
    return values if max_depth is None else clip(values, -max_depth, max_depth)


def clip(values: "Tensor", low: float | None, high: float | None) -> "Tensor":
    """Return values clipped to a range, with the gradient of a value at the bound instead of 0.

    Otherwise a prediction outside the range would never learn its way back. Values that are not finite stay so if a
    gradient is taken, so a loss shows them.
    """
    clipped = values.clamp(low, high)
    return clipped.detach() + (values - values.detach()) if values.requires_grad else clipped


def raw_of(values: "Tensor", parameterisation: Parameterisation) -> "Tensor":
    """Return the raw output whose `values_of` these are, float32 or float64, and -inf at a depth of 0."""
    import torch

    wide = values if values.dtype == torch.float64 else values.float()
    if parameterisation == "exp":
        return wide.log()
    # log(e^v - 1), as neither large nor small values lose their digits.
    return wide + torch.log(-torch.expm1(-wide)) if parameterisation == "softplus" else wide


def head_kind(declaration: object, channels: int) -> HeadKind:
    """Return a head's kind from its declaration: `categorical`, `regression`, or a mapping of `kind` and fields.

    Raises: ValueError for anything else, or other `channels` of the output than declared.
    """
    fields: dict[str, Any] = dict(declaration) if isinstance(declaration, Mapping) else {"kind": declaration}
    kind = fields.pop("kind", None)
    try:
        if kind == "categorical":
            head: HeadKind = CategoricalHead(**{"classes": channels, **fields})
        elif kind == "regression":
            head = RegressionHead(**{"channels": channels, **fields})
        else:
            raise ValueError("kind is categorical or regression")
    except TypeError as error:
        raise ValueError(str(error).partition(") ")[2] or str(error)) from error
    declared = head.classes if isinstance(head, CategoricalHead) else head.channels
    if declared != channels:
        raise ValueError(f"{declared} channels are declared, {channels} are returned")
    return head
