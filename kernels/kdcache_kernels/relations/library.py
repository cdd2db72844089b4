"""The operators of the loss of relations in PyTorch: registered, with fake kernels for tracing and a backward.

As in `kdcache_kernels.library`, whose backward scales the gradient that the forward has left.
"""

import importlib
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..library import FAMILIES, scale_gradient
from .problem import MOMENTS, RelationProblem

_FIELDS = tuple(field.name for field in fields(RelationProblem))
_ARGUMENTS = (
    "str family, Tensor student, Tensor teacher, SymInt[] view_size, SymInt[] size, float temperature, float beta, "
    "float gamma, Tensor? window, Tensor? flip, Tensor? pixel_weight, Tensor? counted, Tensor? count, Tensor? moments, "
    "bool need_gradient"
)


def relation_arguments(problem: RelationProblem) -> tuple[Any, ...]:
    """Return the problem as the operators take it: the values of its fields."""
    return tuple(getattr(problem, name) for name in _FIELDS)


def _checked(arguments: tuple[Any, ...]) -> RelationProblem:
    """Return the problem whose `relation_arguments` these are; the dispatcher turns tuples into lists."""
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in arguments]
    problem = RelationProblem(*values)
    checks.check_window_values(problem.window, None)
    return problem


def _family(name: str) -> Any:
    return importlib.import_module(f"kdcache_kernels{FAMILIES[name]}.relations")


@torch.library.custom_op("kdcache::relation_loss", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def relation_loss(family: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient): float32, the loss 0-dimensional, the gradient (0,) where it is not needed."""
    problem = _checked(arguments)
    loss, gradient = _family(family).relation_loss(problem)
    if problem.student.shape[1] == 1:
        # One class has no relations: what the kernels leave of 1 - 1 is a rounding. NaN stays.
        loss = 0 * loss
        gradient = torch.zeros_like(gradient)
    return loss, gradient


@relation_loss.register_fake
def _(family: str, student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    need_gradient = arguments[-1]
    gradient = student.new_empty(student.shape if need_gradient else (0,), dtype=torch.float32)
    return student.new_empty((), dtype=torch.float32), gradient


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, loss)
    ctx.dtype = inputs[1].dtype


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of the family, of the student, which alone has one, and of the other arguments."""
    gradient, loss = ctx.saved_tensors
    student = None
    if grad_loss is not None:
        # A loss that is not finite makes the whole gradient NaN: no part of it can be trusted.
        student = scale_gradient(gradient, grad_loss, loss, ctx.dtype)
    return None, student, *(None for _ in _FIELDS[1:])


relation_loss.register_autograd(_backward, setup_context=_keep_gradient)


@torch.library.custom_op("kdcache::relation_moments", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def relation_moments(family: str, *arguments: Any) -> Tensor:
    """Return the moments (6, C) of the own cells, float64; see `RelationProblem.moments`."""
    moments: Tensor = _family(family).relation_moments(_checked(arguments))
    return moments


@relation_moments.register_fake
def _(family: str, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty((MOMENTS, student.shape[1]), dtype=torch.float64)
