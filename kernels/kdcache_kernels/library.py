"""The operators in PyTorch: registered, with fake kernels for tracing. `autograd.py` differentiates them.

A `torch.library.custom_op` is opaque to `torch.compile` and to autograd, which is what a fused kernel wants: it is
called in the forward and returns the loss together with its gradient.

An operator takes tensors and plain values, never a dataclass. The loss therefore takes the fields of `LossProblem` and
of its target one by one: its schema, its call and the problem that it computes are made from one table of the fields.

Every operator takes the name of the family that computes it, "numba" or "triton". The families are imported when they
are first used: together they cost a second that a program without a loss need not pay.

`torch.compile` keeps compiled backwards on disk under a key that knows an operator's name and nothing of its backward
(pytorch issue 144344). The digest of this package's sources therefore enters that key: programs that another version
left behind are compiled anew.

Legend: B batch, C classes, k kept classes, H W label size, h w the logits' own size.
"""

import importlib
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import config as compiler

from . import checks
from .problem import Counted, LossProblem, LossResult, gradient_dtype
from .sources import digest_of
from .topk import PackedTarget, argmax_dtype, index_dtype

compiler.cache_key_tag = f"{compiler.cache_key_tag} kdcache_kernels {digest_of('**/*.py')}".strip()

FAMILIES = {"numba": ".cpu", "triton": ".gpu", "torch": ".plain"}
"""The sub-package of each family."""
PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))


@cache
def module_of(family: str, operation: str) -> Any:
    """Import and return the module of an implementation for one operation. Results are cached.

    `family` is "numba", "triton" or "torch". `operation` is "loss", "counts", "topk" or "argmax".
    """
    return importlib.import_module(f"{FAMILIES[family]}.{operation}", __package__)


SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    tuple[int, int]: "SymInt[]",
    int: "SymInt",
    float: "float",
    bool: "bool",
}


def _schema_types(owner: type) -> dict[str, str]:
    """Return the type in an operator's schema of every field of a dataclass except a target."""
    return {name: SCHEMA_TYPES[hint] for name, hint in get_type_hints(owner).items() if hint in SCHEMA_TYPES}


_PROBLEM_TYPES, _TARGET_TYPES = map(_schema_types, (LossProblem, PackedTarget))
_OPTIONAL_TYPES = {f"target_{name}": kind for name, kind in _TARGET_TYPES.items()}
_NO_TARGET = (None,) * len(_TARGET_TYPES)
LOSS_ARGUMENTS = (*_PROBLEM_TYPES, *_OPTIONAL_TYPES)
"""The loss's arguments by position, but for the family. Those of a target are None where there is none."""


def _schema(types: Iterable[str], names: Iterable[str]) -> str:
    return ", ".join(f"{kind} {name}" for kind, name in zip(types, names, strict=True))


LOSS_TYPES = (*_PROBLEM_TYPES.values(), *(kind.removesuffix("?") + "?" for kind in _OPTIONAL_TYPES.values()))
"""Their types in the operator's schema."""
_LOSS_INPUTS = f"(str family, {_schema(LOSS_TYPES, LOSS_ARGUMENTS)})"
_LOSS_SCHEMA, _GRADIENT_SCHEMA = f"{_LOSS_INPUTS} -> (Tensor, Tensor, Tensor, Tensor)", f"{_LOSS_INPUTS} -> Tensor"
_TARGET_SCHEMA = _schema(_TARGET_TYPES.values(), _TARGET_TYPES)
_ARGMAX_SCHEMA = f"(str family, {_TARGET_SCHEMA}, Tensor? window, Tensor? flip, SymInt[] size) -> (Tensor, Tensor)"


def is_traced(*tensors: Any) -> bool:
    """Return True if PyTorch records or transforms a call, so that the call must use registered operators.

    This is so under `torch.compile`, `torch.export`, `make_fx`, fake tensors and other dispatch modes, `torch.func` and
    forward-mode derivatives. Otherwise the kernels can be called directly, which saves 0.1 ms per call.

    Args:
        tensors: the arguments of the call, tensors or not. The result is also True if one of them is of a
            subclass of Tensor other than `Parameter`.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or any(issubclass(kind, Tensor) for kind in {type(x) for x in tensors} - PLAIN_TENSORS)
    )


def target_arguments(target: PackedTarget | None) -> tuple[Any, ...]:
    """Return the values of a target's fields in order, with tensors detached, to pass them to a registered operator.

    If `target` is None, every value is None.
    """
    if target is None:
        return _NO_TARGET
    values = [getattr(target, name) for name in _TARGET_TYPES]
    return tuple([x.detach() if isinstance(x, Tensor) and x.requires_grad else x for x in values])


def loss_arguments(problem: LossProblem) -> tuple[Any, ...]:
    """Return a problem's fields as a flat tuple for the registered operator, in the order of `LOSS_ARGUMENTS`."""
    return (*[getattr(problem, name) for name in _PROBLEM_TYPES], *target_arguments(problem.target))


def _with_tuples(arguments: Iterable[Any]) -> list[Any]:
    """Return an operator's arguments as it was called with: the dispatcher turns tuples into lists."""
    return [tuple(value) if isinstance(value, list) else value for value in arguments]


def loss_problem(arguments: tuple[Any, ...]) -> LossProblem:
    """Rebuild a problem from the flat arguments of the registered operator. This is the inverse of `loss_arguments`."""
    values = _with_tuples(arguments)
    fields = dict(zip(_PROBLEM_TYPES, values, strict=False))
    target = dict(zip(_TARGET_TYPES, values[len(fields) :], strict=True))
    return LossProblem(target=None if target["values"] is None else PackedTarget(**target), **fields)


@torch.library.custom_op("kdcache::distill_loss", mutates_args=(), schema=_LOSS_SCHEMA)
def distill_loss(family: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (loss, ce, kl, gradient) as the registered operator `kdcache::distill_loss`.

    Args:
        family: "numba" or "triton", the implementation.
        arguments: the flattened problem, from `loss_arguments`.
    Returns: the fields of `LossResult`.
    Raises: ValueRangeError for values that the loss cannot use.
    """
    # The values are checked within the operator: a compiled program does not run what stands around it.
    result = checked_loss(loss_problem(arguments), family)
    return result.loss, result.ce, result.kl, result.gradient


def checked_loss(problem: LossProblem, family: str) -> LossResult:
    """Compute the loss of a problem with an implementation, and raise an error if its tensors have invalid values.

    `family` is "numba" or "triton".

    Raises: ValueRangeError for invalid class weights, windows or class ids. With KDCACHE_DEBUG=1, also for a loss that
        is not finite.
    """
    checks.check_values(problem, ids=family != "numba")
    result = computed(problem, family)
    if result.loss.device.type != "cpu" or not math.isfinite(result.loss.item()):
        checks.explain_non_finite(problem, result.loss)
    return result


def computed(problem: LossProblem, family: str) -> LossResult:
    """Compute the loss of a problem with the implementation `family`: "numba", "triton" or "torch".

    Arguments are not checked. With only one class, loss and gradient are exactly 0, or NaN if a counted pixel depends
    on an unusable logit (NaN, infinite or too large).
    """
    result: LossResult = module_of(family, "loss").distill_loss(problem)
    if problem.student.shape[1] > 1:
        return result
    # The one probability is 1; what the kernels leave of 1 - 1 is a rounding. NaN stays.
    loss = 0 * result.loss
    return LossResult(loss, 0 * result.ce, 0 * result.kl, torch.zeros_like(result.gradient) + loss)


@distill_loss.register_fake
def _(family: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Not the problem: the checks of its target would tie a compiled program to the sizes that it was traced with.
    fields = dict(zip(LOSS_ARGUMENTS, arguments, strict=True))
    student = fields["student"]
    loss, ce, kl = (student.new_empty((), dtype=torch.float32) for _ in range(3))
    shape = student.shape if fields["need_gradient"] else (0,)
    return loss, ce, kl, student.new_empty(shape, dtype=gradient_dtype(student))


@torch.library.custom_op("kdcache::distill_gradient", mutates_args=(), schema=_GRADIENT_SCHEMA)
def distill_gradient(family: str, *arguments: Any) -> Tensor:
    """Compute the gradient of a problem's loss by the student's logits, as a registered operator.

    Args:
        family: "numba" or "triton", the implementation.
        arguments: the flattened problem, from `loss_arguments`.
    Returns: the contiguous gradient in the student's dtype, NaN everywhere if the loss is not finite.
    """
    return direct_gradient(family, *arguments)


def direct_gradient(family: str, *arguments: Any) -> Tensor:
    """Return the gradient of a problem's loss by the student's logits, contiguous and in their dtype.

    It is NaN everywhere if the loss is not finite. Unlike `distill_gradient`, this call does not use PyTorch's operator
    registry, which makes it faster.

    `family` is "numba" or "triton", the implementation. `arguments` are the flattened problem, from `loss_arguments`.
    """
    problem = loss_problem(arguments)
    result = computed(problem, family)
    return scaled(result.gradient, torch.ones_like(result.loss), result.loss, problem.student.dtype)


@distill_gradient.register_fake
def _(family: str, *arguments: Any) -> Tensor:
    student: Tensor = dict(zip(LOSS_ARGUMENTS, arguments, strict=True))["student"]
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@torch.library.custom_op("kdcache::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, factor: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * factor in `dtype`, contiguous, as a registered operator.

    The result is NaN everywhere if the loss is not finite. The product is computed in float32. `factor` and `loss` are
    0-dimensional.
    """
    return scaled(gradient, factor, loss, dtype)


def scaled(gradient: Tensor, factor: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * factor in `dtype`, contiguous. It is NaN everywhere if the loss is not finite.

    `factor` and `loss` are 0-dimensional. A direct call is faster than the registered operator `scale_gradient`.
    """
    if gradient.device.type != "cpu":
        result: Tensor = module_of("triton", "loss").scale_gradient(gradient, factor, loss, dtype)
        return result
    # A number, for two operators on tensors of one element cost more.
    number = factor.item() + 0 * loss.item()
    if number == 1 and gradient.dtype == dtype and gradient.is_contiguous():
        return gradient.clone()
    if gradient.dtype == dtype == torch.float32 and gradient.is_contiguous():
        return gradient * number
    return (gradient.contiguous().float() * number).to(dtype)


@scale_gradient.register_fake
def _(gradient: Tensor, factor: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("kdcache::denominators", mutates_args=())
def denominators(
    family: str,
    labels: Tensor | None,
    class_weight: Tensor | None,
    num_classes: int,
    ignore_index: int,
    distill_void: bool,
    size: Sequence[int],
    view_size: Sequence[int] | None,
    window: Tensor | None,
    flip: Tensor | None,
    anchor: Tensor,
) -> Tensor:
    """Compute the denominators of the mean CE and KL, as a registered operator of torch.

    The denominator of CE is the sum of the class weights of the labelled pixels. The denominator of KL is the number of
    pixels that it counts.

    Args:
        family: "numba" or "triton", the implementation.
        labels: (B, H, W) integers, or None.
        class_weight: (C,) floats, or None for ones.
        num_classes: C.
        ignore_index: the label of void pixels.
        distill_void: whether KL counts void pixels.
        size: (H, W) of the labels in pixels.
        view_size: (height, width) of the target's view in pixels, or None without a target.
        window: (B, 4) float64 edges in pixels of the view, or None for the whole view.
        flip: (B,) bool, or None.
        anchor: any tensor with a first axis of B on the device of the result.
    Returns: (2,) float64, for CE and KL.
    """
    view = None if view_size is None else tuple(view_size)
    counted = Counted(
        labels, class_weight, num_classes, ignore_index, distill_void, tuple(size), view, window, flip, len(anchor)
    )
    counts: Tensor = module_of(family, "counts").count(counted, anchor.device)
    return counts


@denominators.register_fake
def _(family: str, *arguments: Any) -> Tensor:
    counts: Tensor = arguments[-1].new_empty(2, dtype=torch.float64)
    return counts


@torch.library.custom_op("kdcache::pack", mutates_args=())
def pack(logits: Tensor, k: int, family: str) -> list[Tensor]:
    """Keep the k largest logits of every pixel, as a registered operator. Return the fields of a `PackedTarget`.

    Args:
        logits: (B, C, h, w), any floating dtype.
        k: number of classes to keep, 1 to C.
        family: "numba" or "triton", the implementation.
    Returns: [values, indices, tail], or [values] for k = C, because registered operators cannot return None.
    """
    return [part for part in module_of(family, "topk").pack(logits, k) if part is not None]


@pack.register_fake
def _(logits: Tensor, k: int, family: str) -> list[Tensor]:
    B, C, h, w = logits.shape
    values = logits.new_empty((B, k, h, w), dtype=torch.float16)
    if k == C:
        return [values]
    indices = logits.new_empty((B, k, h, w), dtype=index_dtype(int(C)))
    return [values, indices, logits.new_empty((B, h, w), dtype=torch.float16)]


@torch.library.custom_op("kdcache::densify", mutates_args=())
def densify(values: Tensor, indices: Tensor, tail: Tensor, num_classes: int, family: str) -> Tensor:
    """Compute `kdcache_kernels.densify` as a registered operator. The result is (B, C, h, w) float32.

    `values`, `indices` and `tail` are the fields of a `PackedTarget` that keeps k < C classes, and `num_classes` is C.
    `family` is "numba" or "triton", the implementation.
    """
    dense: Tensor = module_of(family, "topk").densify(values, indices, tail, num_classes)
    return dense


@densify.register_fake
def _(values: Tensor, indices: Tensor, tail: Tensor, num_classes: int, family: str) -> Tensor:
    B, _, h, w = values.shape
    return values.new_empty((B, num_classes, h, w), dtype=torch.float32)


@torch.library.custom_op("kdcache::argmax_confidence", mutates_args=(), schema=_ARGMAX_SCHEMA)
def argmax_confidence(family: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the teacher's best class and its probability at label size, as a registered operator.

    It runs `kdcache_kernels.target_argmax_confidence` in one implementation.

    Args:
        family: "numba" or "triton", the implementation.
        arguments: the fields of the `PackedTarget` in order, then window, flip and size (H, W).
    Returns: (class ids, float16 probabilities), (B, H, W) each.
    """
    *fields, window, flip, size = _with_tuples(arguments)
    ids, confidence = module_of(family, "argmax").argmax_confidence(PackedTarget(*fields), size, window, flip)
    return ids, confidence


@argmax_confidence.register_fake
def _(family: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    (values, _, _, num_classes), size = arguments[:4], arguments[-1]
    shape = (values.shape[0], *size)
    ids = values.new_empty(shape, dtype=argmax_dtype(num_classes))
    return ids, values.new_empty(shape, dtype=torch.float16)
