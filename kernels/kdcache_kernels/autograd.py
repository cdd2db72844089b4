"""The derivative of the fused loss, for autograd, `torch.compile` and `torch.func`.

The gradient of the loss comes with the loss, and its backward is one multiplication. If a term is differentiated by
itself, the backward computes its gradient by the same kernels with other weights: keeping a gradient of each from the
forward would cost memory in every step. The loss's derivative by a weight is the term.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import library
from .library import LOSS_ARGUMENTS
from .problem import LossProblem
from .reference import LossParts

_WEIGHTS = ("ce_weight", "kl_weight")
_STUDENT, _CE_WEIGHT, _KL_WEIGHT = (LOSS_ARGUMENTS.index(name) for name in ("student", *_WEIGHTS))
_TENSORS = [place for place, kind in enumerate(library.LOSS_TYPES) if kind.startswith("Tensor")]
_OTHERS = [place for place in range(len(LOSS_ARGUMENTS)) if place not in _TENSORS]
_tensors_of, _others_of = itemgetter(*_TENSORS), itemgetter(*_OTHERS)
_NEED_GRADIENT = _OTHERS.index(LOSS_ARGUMENTS.index("need_gradient"))
"""Among the arguments that are no tensors."""


def call_distill_loss(problem: LossProblem, family: str, *, traced: bool) -> LossParts:
    """Compute the loss of checked arguments and its two terms, all three differentiable.

    The kernels compute in float32, also under autocast.

    Args:
        problem: the checked arguments.
        family: "numba" or "triton", the implementation to use.
        traced: True to call the registered PyTorch operator, which `torch.compile` and `torch.func` need. False calls
            the implementation directly, which is faster. Pass the result of `library.is_traced`.
    Returns: loss, CE and KL, 0-dimensional float32.
    """
    if traced:
        kind = problem.student.device.type
        with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):  # meta tensors have none
            loss, ce, kl, _ = _operator()(family, *library.loss_arguments(problem))
    elif torch.is_grad_enabled():
        loss, ce, kl = _DirectLoss.apply(problem.student, problem.ce_weight, problem.kl_weight, problem, family)
    else:
        loss, ce, kl, _ = library.checked_loss(problem, family)
    return LossParts(loss, ce, kl)


def _operator() -> Callable[..., Any]:
    """Return the operator for compiled programs, which can trace nothing else, and without differentiation."""
    operator: Callable[..., Any] = library.distill_loss
    if torch.compiler.is_compiling():
        return operator
    if torch._C._are_functorch_transforms_active():
        operator = _TransformedLoss.apply
    elif torch.is_grad_enabled():
        operator = _Loss.apply
    return operator


def _each(function: Callable[..., Any], info: Any, in_dims: Any, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the result of vmap for `function`, computed sample by sample."""
    results = []
    for n in range(info.batch_size):
        pairs = zip(arguments, in_dims, strict=True)
        selected = (x.select(dim, n) if isinstance(x, Tensor) and dim is not None else x for x, dim in pairs)
        results.append(function(*selected))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0,) * len(results[0])


def _keep(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    """Keep the operator's last result, the gradient, for the backward."""
    ctx.mark_non_differentiable(output[3])
    _save(ctx, inputs[0], inputs[1:], output)


def _save(ctx: Any, family: str, arguments: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    ctx.family, ctx.others = family, _others_of(arguments)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *_tensors_of(arguments))


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of all arguments: the student and the weights alone have one."""
    result: list[Tensor | None] = [None] * len(LOSS_ARGUMENTS)
    places = (_STUDENT, _CE_WEIGHT, _KL_WEIGHT)
    needed = [ctx.needs_input_grad[1 + place] for place in places]
    for place, gradient in zip(places, _gradients(ctx, needed, *grads[:3]), strict=True):
        result[place] = gradient
    return None, *result


def _gradients(
    ctx: Any, needed: Sequence[bool], grad_loss: Tensor | None, grad_ce: Tensor | None, grad_kl: Tensor | None
) -> list[Tensor | None]:
    """Return the gradients of the student and of both weights, if `needed`."""
    loss, ce, kl, gradient, *tensors = ctx.saved_tensors
    result: list[Tensor | None] = [None, None, None]
    if grad_loss is not None:
        for n, (place, term) in enumerate(((_CE_WEIGHT, ce), (_KL_WEIGHT, kl)), 1):
            if needed[n]:
                result[n] = (grad_loss * term.detach()).to(tensors[_TENSORS.index(place)].dtype)
    if ctx.others[_NEED_GRADIENT]:
        if grad_ce is not None or grad_kl is not None:
            places = zip((*_TENSORS, *_OTHERS), (*tensors, *ctx.others), strict=True)
            fields = {LOSS_ARGUMENTS[place]: value for place, value in sorted(places, key=itemgetter(0))}
            weighed = _weighed(fields, grad_loss, (grad_ce, grad_kl))
            result[0] = _once(library.distill_gradient, library.direct_gradient, ctx.family, *weighed)
        elif grad_loss is not None:
            # A loss that is not finite makes the whole gradient NaN: no part of it can be trusted.
            scaling = (gradient, grad_loss, loss, tensors[_TENSORS.index(_STUDENT)].dtype)
            result[0] = _once(library.scale_gradient, library.scaled, *scaling)
    return result


def _weighed(
    fields: dict[str, Any], grad_loss: Tensor | None, grad_terms: tuple[Tensor | None, Tensor | None]
) -> list[Any]:
    """Return the arguments of the problem whose loss is differentiated, without terms that need no gradient."""
    weights: list[Tensor | None] = []
    for name, grad in zip(_WEIGHTS, grad_terms, strict=True):
        parts = [] if grad_loss is None else [grad_loss.double() * fields[name].double()]
        parts += [] if grad is None else [grad.double()]
        weights.append(torch.stack(parts).sum(0) if parts else None)
    ce, kl = weights
    changes: dict[str, Any] = {"ce_weight": fields["ce_weight"] if ce is None else ce}
    changes |= {"kl_weight": fields["kl_weight"] if kl is None else kl, "use_ce": fields["use_ce"] and ce is not None}
    if kl is None:
        changes |= dict.fromkeys(name for name in LOSS_ARGUMENTS if name.startswith("target_"))
    return list({**fields, **changes}.values())


class _Loss(torch.autograd.Function):
    """The operator for autograd."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = library.distill_loss(*arguments)
        _keep(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return _backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "Cannot differentiate distill_loss forwards (torch.func.jvp, jacfwd, hessian)\n"
            "  fix: Take torch.func.grad, vjp or jacrev. For a Hessian, take jacrev of jacrev with impl='reference'."
        )


class _DirectLoss(_Loss):
    """A family for autograd, without the operator around it. It takes what has a derivative, problem and family."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        problem, family = inputs[3:]
        output = library.checked_loss(problem, family)
        _save(ctx, family, library.loss_arguments(problem), output)
        return output[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return *_gradients(ctx, ctx.needs_input_grad, *grads), None, None


class _TransformedLoss(_Loss):
    """The operator for `torch.func`, in the form that its transforms take.

    It costs a call the time that reading a signature takes, and they do not take an operator's own backward.
    """

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return library.distill_loss(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _each(_TransformedLoss.apply, info, in_dims, arguments)


def _once(operator: Callable[..., Tensor], direct: Callable[..., Tensor], *arguments: Any) -> Any:
    """Call an operator of the backward, or compute it directly. Its result cannot be differentiated again."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return _Once.apply(operator, *arguments)
    return operator(*arguments) if library.is_traced(*arguments) else direct(*arguments)


class _Once(torch.autograd.Function):
    """An operator of the backward that raises if its result is differentiated, and supports vmap."""

    @staticmethod
    def forward(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing, because there is no further backward."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "Cannot differentiate distill_loss twice (create_graph=True)\n"
            "  fix: Pass impl='reference' and float64 logits, which differentiate any number of times."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _each(_Once.apply, info, in_dims, arguments)


library.distill_loss.register_autograd(_backward, setup_context=_keep)
