"""The operators of the loss of relations in PyTorch: registered, with fake kernels for tracing and a backward.

As in `kdcache_kernels.library`, whose backward scales the gradient that the forward has left.
"""

import importlib
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .. import checks
from ..library import FAMILIES, SCHEMA_TYPES, is_traced, scale_gradient, scaled
from .problem import MOMENTS, RelationProblem

_TYPES = {name: SCHEMA_TYPES[hint] for name, hint in get_type_hints(RelationProblem).items()}
_NAMES = [field.name for field in fields(RelationProblem)]
"""The student is the first."""
_INPUTS = ", ".join(("str family", *(f"{_TYPES[name]} {name}" for name in _NAMES)))


def arguments_of(problem: RelationProblem) -> tuple[Any, ...]:
    """Return a problem's fields as a flat tuple, in the order in which the registered operators take them."""
    return tuple(getattr(problem, name) for name in _NAMES)


def call_relation_loss(problem: RelationProblem, family: str) -> Tensor:
    """Compute the relation loss of a problem, 0-dimensional and differentiable by the student's logits.

    `family` is "numba" or "triton". The kernels are called directly, or by a registered operator under `torch.compile`
    and similar (see `kdcache_kernels.library.is_traced`).
    """
    arguments = arguments_of(problem)
    loss: Tensor
    if is_traced(*arguments):
        loss = relation_loss(family, *arguments)[0]
    elif problem.need_gradient:
        loss = _DirectLoss.apply(family, problem.student, problem)
    else:
        loss = _computed(problem, family)[0]
    return loss


def _problem(arguments: tuple[Any, ...]) -> RelationProblem:
    """Return the problem of `arguments_of`. The dispatcher turns tuples into lists."""
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in arguments]
    return RelationProblem(**dict(zip(_NAMES, values, strict=True)))


@cache
def _family(name: str) -> Any:
    return importlib.import_module(f"kdcache_kernels{FAMILIES[name]}.on_cells.relations")


def _computed(problem: RelationProblem, family: str) -> tuple[Tensor, Tensor]:
    """Check the values of a problem, and return its loss and gradient. Raises: ValueRangeError."""
    checks.check_window_values(problem.window, None)
    loss, gradient = _family(family).relation_loss(problem)
    if problem.student.shape[1] == 1:
        # One class has no relations: what the kernels leave of 1 - 1 is a rounding. NaN stays.
        loss, gradient = 0 * loss, torch.zeros_like(gradient)
    return loss, gradient


@torch.library.custom_op("kdcache::relation_loss", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def relation_loss(family: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute the relation loss and its gradient by the student's logits, as a registered operator.

    Args:
        family: "numba" or "triton", the implementation.
        arguments: the flattened problem, from `arguments_of`.
    Returns: the loss, 0-dimensional float32, and the float32 gradient in the student's shape. The gradient is empty,
        (0,), if the problem's `need_gradient` is False.
    Raises: ValueRangeError for windows that are empty, reversed or not finite.
    """
    return _computed(_problem(arguments), family)


@relation_loss.register_fake
def _(family: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    student = arguments[0]
    shape = student.shape if arguments[_NAMES.index("need_gradient")] else (0,)
    return student.new_empty((), dtype=torch.float32), student.new_empty(shape, dtype=torch.float32)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save(ctx, inputs[1].dtype, *output)


def _save(ctx: Any, dtype: torch.dtype, loss: Tensor, gradient: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, loss)
    ctx.dtype = dtype


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return None, _student_gradient(ctx, grad_loss), *(None for _ in _NAMES[1:])


def _student_gradient(ctx: Any, grad_loss: Tensor | None) -> Tensor | None:
    if grad_loss is None:
        return None
    gradient, loss = ctx.saved_tensors
    # The operator says that its result cannot be differentiated again.
    traced = torch.is_grad_enabled() or is_traced(gradient, grad_loss)
    # A loss that is not finite makes the whole gradient NaN: no part of it can be trusted.
    student: Tensor = (scale_gradient if traced else scaled)(gradient, grad_loss, loss, ctx.dtype)
    return student


relation_loss.register_autograd(_backward, setup_context=_keep_gradient)


class _DirectLoss(torch.autograd.Function):
    """A family for autograd, without the operator around it."""

    @staticmethod
    def forward(ctx: Any, family: str, student: Tensor, problem: RelationProblem) -> Tensor:
        loss, gradient = _computed(problem, family)
        _save(ctx, student.dtype, loss, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, _student_gradient(ctx, gradients[0]), None


@torch.library.custom_op("kdcache::relation_moments", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def relation_moments(family: str, *arguments: Any) -> Tensor:
    """Compute the (6, C) float64 `RelationProblem.moments` of this batch's cells. It is a registered operator of torch.

    `family` is "numba" or "triton", the implementation. `arguments` is the flattened problem, from `arguments_of`.

    Raises: ValueRangeError for windows that are empty, reversed or not finite.
    """
    return _moments(_problem(arguments), family)


def _moments(problem: RelationProblem, family: str) -> Tensor:
    """Compute what `relation_moments` returns. Raises: ValueRangeError."""
    checks.check_window_values(problem.window, None)
    moments: Tensor = _family(family).relation_moments(problem)
    return moments


@relation_moments.register_fake
def _(family: str, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty((MOMENTS, student.shape[1]), dtype=torch.float64)
