"""The values that a setting takes, in words: from the type that checks it, so that the two cannot differ."""

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from kdcache.errors import RecipeError

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def in_words(field: FieldInfo) -> str:
    """Describe the values of a field: 'a whole number from 0 to 256', 'one of adamw, adam, sgd'."""
    return _of(field.annotation, field.metadata)


def _of(kind: Any, bounds: Sequence[Any]) -> str:
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return _of(inner, [*bounds, *more])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_of(part, bounds) for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        inner = _of(parts[0], ())
        return f"a list, each {inner}" if parts[-1] is ... else f"{len(parts)} values, each {inner}"
    return f"{_KINDS.get(kind, 'a value')}{_range(bounds)}"


def _range(bounds: Sequence[Any]) -> str:
    """' from 0 to below 1', ' above 0', ' from 1 on' or nothing."""
    flat = [one for bound in bounds for one in getattr(bound, "metadata", [bound])]
    low = next((f" from {bound.ge}" for bound in flat if isinstance(bound, Ge)), "")
    low = next((f" above {bound.gt}" for bound in flat if isinstance(bound, Gt)), low)
    high = next((f" to {bound.le}" for bound in flat if isinstance(bound, Le)), "")
    high = next((f" to below {bound.lt}" for bound in flat if isinstance(bound, Lt)), high)
    return low + (high or " on" * low.startswith(" from"))


def check_focal(focal_gamma: float, label_smoothing: float) -> None:
    """Raises: RecipeError for a focal loss of smoothed labels."""
    if focal_gamma > 0 and label_smoothing > 0:
        raise RecipeError(
            "the focal loss is one of labels that are not smoothed",
            received=f"--focal-gamma {focal_gamma:g} with --label-smoothing {label_smoothing:g}",
            remedy="leave one of them out",
        )
