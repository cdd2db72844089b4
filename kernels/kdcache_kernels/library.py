"""The operators as PyTorch knows them: registered, with fake kernels for tracing and a backward.

A `torch.library.custom_op` is opaque to `torch.compile` and to autograd, which is what a fused kernel wants: it is
called in the forward, returns the loss together with its gradient, and the backward is one multiplication. A tensor
argument of an operator cannot be optional in every caller, so an absent one is the empty vector.

Every operator takes the name of the family that computes it, "numba" or "triton". The families are imported when they
are first used: together they cost a second that a program without a loss need not pay.

Legend: B batch, C classes, k kept classes, H W label size, h w the logits' own size.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from . import checks
from .problem import LossProblem, LossResult
from .reference import LossParts
from .topk import PackedTarget, index_dtype

FAMILIES = ("numba", "triton")


def absent(like: Tensor) -> Tensor:
    """Return what stands for a tensor that is not there."""
    return like.new_empty(0)


def _given(tensor: Tensor) -> Tensor | None:
    """Return the tensor, or None for an absent one (and for the flips of an empty batch, which change nothing)."""
    return None if tensor.dim() == 1 and tensor.numel() == 0 else tensor


def _module(family: str, operation: str) -> Any:
    return importlib.import_module(f".{family}_{operation}", __package__)


@torch.library.custom_op("kdcache::distill_loss", mutates_args=())
def distill_loss(
    student: Tensor,
    labels: Tensor,
    values: Tensor,
    indices: Tensor,
    tail: Tensor,
    window: Tensor,
    flip: Tensor,
    pixel_weight: Tensor,
    class_weight: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    ce_denominator: Tensor,
    kl_denominator: Tensor,
    size: list[int],
    view_size: list[int],
    temperature: float,
    ignore_index: int,
    use_ce: bool,
    use_kl: bool,
    distill_void: bool,
    align_corners: bool,
    target_align_corners: bool,
    need_gradient: bool,
    family: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, ce, kl, gradient); see `LossProblem` and `LossResult`."""
    target = None
    if use_kl:
        target = PackedTarget(
            values, _given(indices), _given(tail), student.shape[1], (view_size[0], view_size[1]), target_align_corners
        )
    problem = LossProblem(
        student=student,
        labels=_given(labels),
        target=target,
        size=(size[0], size[1]),
        use_ce=use_ce,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        ce_denominator=_given(ce_denominator),
        kl_denominator=_given(kl_denominator),
        temperature=temperature,
        class_weight=_given(class_weight),
        ignore_index=ignore_index,
        window=_given(window),
        flip=_given(flip),
        pixel_weight=_given(pixel_weight),
        distill_void=distill_void,
        align_corners=align_corners,
        need_gradient=need_gradient,
    )
    # Here and not before the operator: a compiled program does not run what stands around it.
    checks.check_values(problem)
    result: LossResult = _module(family, "loss").distill_loss(problem)
    if student.shape[1] == 1:
        # The one probability is 1; what the kernels leave of 1 - 1 is a rounding. NaN stays.
        loss = 0 * result.loss
        result = LossResult(loss, 0 * result.ce, 0 * result.kl, torch.zeros_like(result.gradient) + loss)
    checks.explain_non_finite(problem, result.loss)
    return result.loss, result.ce, result.kl, result.gradient


@distill_loss.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_gradient = others[-2]
    dtype = torch.bfloat16 if student.dtype == torch.bfloat16 else torch.float32
    scalars = [student.new_empty((), dtype=torch.float32) for _ in range(3)]
    gradient = student.new_empty(student.shape if need_gradient else (0,), dtype=dtype)
    return scalars[0], scalars[1], scalars[2], gradient


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, ce, kl, gradient = output
    ctx.mark_non_differentiable(ce, kl, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient, loss)
    ctx.dtype = inputs[0].dtype
    ctx.arguments = len(inputs)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradient, loss = ctx.saved_tensors
    others = (None,) * (ctx.arguments - 1)
    if grad_loss is None:
        return None, *others
    # A loss that is not finite makes the whole gradient NaN: no part of it can be trusted.
    return scale_gradient(gradient, grad_loss.float() + 0 * loss, ctx.dtype), *others


distill_loss.register_autograd(_backward, setup_context=_keep_gradient)


def call_distill_loss(problem: LossProblem, family: str) -> LossParts:
    """Call the operator, whatever autocast says: the kernels know which precision each step needs."""
    student, target = problem.student, problem.target
    nothing = absent(student)

    def or_absent(tensor: Tensor | None) -> Tensor:
        return nothing if tensor is None else tensor

    with torch.autocast(student.device.type, enabled=False):
        loss, ce, kl, _ = distill_loss(
            student,
            or_absent(problem.labels),
            nothing if target is None else target.values.detach(),
            nothing if target is None else or_absent(target.indices),
            nothing if target is None or target.tail is None else target.tail.detach(),
            or_absent(problem.window),
            or_absent(problem.flip),
            or_absent(problem.pixel_weight),
            or_absent(problem.class_weight),
            problem.ce_weight,
            problem.kl_weight,
            or_absent(problem.ce_denominator),
            or_absent(problem.kl_denominator),
            list(problem.size),
            [0, 0] if target is None else list(target.view_size),
            problem.temperature,
            problem.ignore_index,
            problem.use_ce,
            problem.use_kl,
            problem.distill_void,
            problem.align_corners,
            target is not None and target.align_corners,
            problem.need_gradient,
            family,
        )
    return LossParts(loss, ce, kl)


@torch.library.custom_op("kdcache::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `gradient * factor` in `dtype`, multiplied in float32: a factor rounded to bfloat16 would bias it.

    The result is contiguous, whatever the gradient is.
    """
    if gradient.device.type == "cuda":
        scaled: Tensor = _module("triton", "loss").scale_gradient(gradient, factor, dtype)
        return scaled
    return (gradient.contiguous().float() * factor).to(dtype)


@scale_gradient.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)


def _once(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "distill_loss can be differentiated once.\n"
        "  received: a backward through its backward (create_graph=True)\n"
        "  remedy:   pass impl='reference' and float64 logits, which differentiate any number of times."
    )


scale_gradient.register_autograd(_once)


@torch.library.custom_op("kdcache::pack", mutates_args=())
def pack(logits: Tensor, k: int, family: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (values, indices, tail) as `kdcache_kernels.pack` does, the last two absent when k = C."""
    values, indices, tail = _module(family, "topk").pack(logits, k)
    return values, absent(values) if indices is None else indices, absent(values) if tail is None else tail


@pack.register_fake
def _(logits: Tensor, k: int, family: str) -> tuple[Tensor, Tensor, Tensor]:
    B, C, h, w = logits.shape
    values = logits.new_empty((B, k, h, w), dtype=torch.float16)
    if k == C:
        return values, absent(values), absent(values)
    indices = logits.new_empty((B, k, h, w), dtype=index_dtype(int(C)))
    return values, indices, logits.new_empty((B, h, w), dtype=torch.float16)


@torch.library.custom_op("kdcache::densify", mutates_args=())
def densify(values: Tensor, indices: Tensor, tail: Tensor, num_classes: int, family: str) -> Tensor:
    """Return (B, C, h, w) float32 as `kdcache_kernels.densify` does."""
    dense: Tensor = _module(family, "topk").densify(values, _given(indices), _given(tail), num_classes)
    return dense


@densify.register_fake
def _(values: Tensor, indices: Tensor, tail: Tensor, num_classes: int, family: str) -> Tensor:
    B, _, h, w = values.shape
    return values.new_empty((B, num_classes, h, w), dtype=torch.float32)


@torch.library.custom_op("kdcache::argmax_confidence", mutates_args=())
def argmax_confidence(
    values: Tensor,
    indices: Tensor,
    tail: Tensor,
    window: Tensor,
    flip: Tensor,
    num_classes: int,
    view_size: list[int],
    align_corners: bool,
    size: list[int],
    family: str,
) -> tuple[Tensor, Tensor]:
    """Return (argmax, confidence) as `kdcache_kernels.target_argmax_confidence` does."""
    target = PackedTarget(
        values, _given(indices), _given(tail), num_classes, (view_size[0], view_size[1]), align_corners
    )
    ids, confidence = _module(family, "argmax").argmax_confidence(
        target, (size[0], size[1]), _given(window), _given(flip)
    )
    return ids, confidence


@argmax_confidence.register_fake
def _(values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    num_classes, size = others[4], others[7]
    shape = (values.shape[0], size[0], size[1])
    ids = values.new_empty(shape, dtype=torch.uint8 if num_classes <= 256 else torch.int16)
    return ids, values.new_empty(shape, dtype=torch.float16)
