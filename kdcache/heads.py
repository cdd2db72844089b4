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
    """A head that returns logits (B, classes, h, w). The softmax of the logits gives the class probabilities."""

    classes: int
    kind: Literal["categorical"] = "categorical"


@dataclass(frozen=True)
class RegressionHead:
    """A head that returns numbers (B, channels, h, w), such as depth.

    Attributes:
        channels: how many numbers it returns for each pixel.
        unit: the values' unit: `m` for depth in metres, or another name, such as `relative`.
        parameterisation: the function from raw output to values: `softplus` and `exp` give positive values, `identity`
            gives any number.
        max_depth: values are clipped at this magnitude. None does not clip.
        kind: always `regression`.
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
        """The smallest and the largest value after clipping, in the head's unit, or None without clipping."""
        if self.max_depth is None:
            return None
        return (-self.max_depth if self.parameterisation == "identity" else 0.0), self.max_depth

    def values(self, raw: "Tensor") -> "Tensor":
        """Return the head's values, in its unit, for its raw output of any shape.

        If the output needs a resize, resize the raw output, not the values (see `values_of`).
        """
        return values_of(raw, self.parameterisation, self.max_depth)


HeadKind = CategoricalHead | RegressionHead


def values_of(raw: "Tensor", parameterisation: Parameterisation, max_depth: float | None) -> "Tensor":
    """Return depth (or other values) for a head's raw output: apply the nonlinearity, then clip.

    Resize the raw output before, not the result. The result is float64 if `raw` is, else float32. Its gradient is not
    cut off at `max_depth` (see `clip`).

    Args:
        raw: the head's raw output, of any shape.
        parameterisation: the nonlinearity: `softplus`, `exp`, or `identity` for none.
        max_depth: values are clipped at this magnitude. None does not clip.
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
    """Return values clipped to the range `low` to `high`, through which gradients pass unchanged. None means no limit.

    `torch.clamp` has the gradient 0 outside the range, so a prediction there would never learn to come back. If a
    gradient is taken, infinite values become NaN, so that a loss shows them.
    """
    clipped = values.clamp(low, high)
    return clipped.detach() + (values - values.detach()) if values.requires_grad else clipped


def raw_of(values: "Tensor", parameterisation: Parameterisation) -> "Tensor":
    """Return the raw output for which `values_of` would return `values` (depth or others), without clipping.

    `parameterisation` is the nonlinearity, which this function inverts: `softplus`, `exp`, or `identity` for none.
    With the first two, a depth of 0 gives -inf. The result is float64 if `values` is, else float32.
    """
    import torch

    wide = values if values.dtype == torch.float64 else values.float()
    if parameterisation == "exp":
        return wide.log()
    # log(e^v - 1), as neither large nor small values lose their digits.
    return wide + torch.log(-torch.expm1(-wide)) if parameterisation == "softplus" else wide


def head_kind(declaration: object, channels: int) -> HeadKind:
    """Return the kind of a head from its declaration in `kdcache_heads`.

    Args:
        declaration: `"categorical"`, `"regression"`, or a mapping such as `{"kind": "regression", "unit": "m"}`, whose
            other keys are fields of CategoricalHead or RegressionHead.
        channels: the channels of the head's output.

    Raises:
        ValueError: the declaration is something else, or declares another number of channels.
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
