"""The operators of the losses on cells in PyTorch: registered, with fake kernels for tracing and a backward.

As in `kdcache_kernels.library`, whose backward scales the gradient that the forward has left.
"""

import importlib
from dataclasses import fields
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .. import checks
from ..library import FAMILIES, SCHEMA_TYPES, scale_gradient
from .problem import MOMENTS, CellProblem, ChannelProblem, DecoupledProblem, RelationProblem


def arguments_of(problem: CellProblem) -> tuple[Any, ...]:
    """Return the problem as the operators take it: the values of its fields."""
    return tuple(getattr(problem, field.name) for field in fields(problem))


def _names(kind: type[CellProblem]) -> list[str]:
    return [field.name for field in fields(kind)]


def _schema(kind: type[CellProblem]) -> str:
    hints = get_type_hints(kind)
    return ", ".join(("str family", *(f"{SCHEMA_TYPES[hints[name]]} {name}" for name in _names(kind))))


def _checked(kind: type[CellProblem], arguments: tuple[Any, ...]) -> Any:
    """Return the problem whose `arguments_of` these are; the dispatcher turns tuples into lists."""
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in arguments]
    problem = kind(**dict(zip(_names(kind), values, strict=True)))
    checks.check_window_values(problem.window, None)
    return problem


def _family(name: str, module: str) -> Any:
    return importlib.import_module(f"kdcache_kernels{FAMILIES[name]}.on_cells.{module}")


def _register(name: str, module: str, kind: type[CellProblem]) -> Any:
    """Register an operator: what the function of its name in a family's module computes.

    Returns: an operator (family, *arguments) -> (loss, gradient): float32, the loss 0-dimensional, the gradient (0,)
        where it is not needed. The student alone has a gradient.
    """
    names = _names(kind)  # the student is the first
    need_gradient_at = names.index("need_gradient")

    def compute(family: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        problem = _checked(kind, arguments)
        loss, gradient = getattr(_family(family, module), name)(problem)
        if problem.student.shape[1] == 1 and not kind.ONE_CLASS:
            # One class has no relations: what the kernels leave of 1 - 1 is a rounding. NaN stays.
            loss = 0 * loss
            gradient = torch.zeros_like(gradient)
        return loss, gradient

    def fake(family: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        student = arguments[0]
        shape = student.shape if arguments[need_gradient_at] else (0,)
        return student.new_empty((), dtype=torch.float32), student.new_empty(shape, dtype=torch.float32)

    def keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loss, gradient = output
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, loss)
        ctx.dtype = inputs[1].dtype

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradient, loss = ctx.saved_tensors
        student = None
        if grad_loss is not None:
            # A loss that is not finite makes the whole gradient NaN: no part of it can be trusted.
            student = scale_gradient(gradient, grad_loss, loss, ctx.dtype)
        return None, student, *(None for _ in names[1:])

    schema = f"({_schema(kind)}) -> (Tensor, Tensor)"
    operator = torch.library.custom_op(f"kdcache::{name}", compute, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=keep_gradient)
    return operator


relation_loss = _register("relation_loss", "relations", RelationProblem)
decoupled_loss = _register("decoupled_loss", "decoupled", DecoupledProblem)
channel_loss = _register("channel_loss", "channels", ChannelProblem)


@torch.library.custom_op("kdcache::relation_moments", mutates_args=(), schema=f"({_schema(RelationProblem)}) -> Tensor")
def relation_moments(family: str, *arguments: Any) -> Tensor:
    """Return the moments (6, C) of the own cells, float64; see `RelationProblem.moments`."""
    moments: Tensor = _family(family, "relations").relation_moments(_checked(RelationProblem, arguments))
    return moments


@relation_moments.register_fake
def _(family: str, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty((MOMENTS, student.shape[1]), dtype=torch.float64)
