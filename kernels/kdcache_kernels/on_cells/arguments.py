"""The checks of the arguments that all losses on cells have, and the call of the implementation.

Legend: B batch, C classes, h w the teacher's cells, H W the student's image.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import checks
from ..errors import ShapeError, describe
from ..ops import choose_implementation
from ..topk import check_view_size, is_logits
from .library import arguments_of
from .problem import CellProblem

Problem = TypeVar("Problem", bound=CellProblem)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHTS = ("alpha", "beta", "gamma")
"""Weights of the parts of a loss."""


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits that are not (B, C, h, w) floats of the same images and classes. Raises: ShapeError."""
    checks.check_student(student)
    B, C = student.shape[:2]
    if not is_logits(teacher) or tuple(teacher.shape[:2]) != (B, C) or min(teacher.shape[2:]) < 1:
        raise ShapeError(
            "teacher_logits_BChw is (B, C, h, w) floats with the batch size and the classes of student_logits_BChw.",
            received=f"{describe(teacher)}; not ({B}, {C}, h, w)",
            remedy="Use a student with the store's class list; densify a target that keeps some classes.",
        )
    remedy = "Pass the logits of every class, as densify returns them."
    checks.check_tensor("teacher_logits_BChw", teacher, tuple(teacher.shape), FLOATS, student.device, remedy)


def evaluate(
    kind: type[Problem],
    operator: Any,
    reference: Callable[[Problem], Tensor],
    impl: str,
    student: Tensor,
    teacher: Tensor,
    *,
    count: Tensor | float | None,
    **others: Any,
) -> Tensor:
    """Return a loss, 0-dimensional: check the arguments, and compute it by the operator or the reference."""
    check_logits(student, teacher)
    checks.check_scalar("count", count, student.device, "a sum over processes", optional=True)
    if isinstance(count, Tensor):
        count = count.detach()
    elif count is not None:
        count = torch.full((), count, dtype=torch.float64, device=student.device)
    need_gradient = student.requires_grad and torch.is_grad_enabled()
    family, problem = checked(kind, impl, student, teacher, count=count, need_gradient=need_gradient, **others)
    if family == "reference":
        return reference(problem)
    loss: Tensor = operator(family, *arguments_of(problem))[0]
    return loss


def checked(kind: type[Problem], impl: str, student: Tensor, teacher: Tensor, **others: Any) -> tuple[str, Problem]:
    """Check the arguments that all losses on cells have; return the implementation and the problem.

    Raises: ShapeError, ValueRangeError naming the argument.
    """
    check_logits(student, teacher)
    B, device = student.shape[0], student.device
    family = choose_implementation(impl, device, student.dtype, student_logits_BChw=student)
    checks.check_number("temperature", others["temperature"], above_zero=True)
    for name in WEIGHTS:
        checks.check_number(name, others.get(name, 0.0))
    size = others["size"] = checks.check_size(None, others["size"])
    check_view_size(others["view_size"])
    checks.check_window(others["window"], others["flip"], B, device)
    remedy = "Pass one value per pixel of the image."
    checks.check_tensor("pixel_weight_BHW", others["pixel_weight"], (B, *size), (), device, remedy)
    checks.check_tensor("counted_BHW", others["counted"], (B, *size), (torch.bool,), device, remedy)
    # The student alone has a gradient.
    detached: dict[str, Any] = {name: x.detach() if isinstance(x, Tensor) else x for name, x in others.items()}
    problem = kind(student=student, teacher=teacher.detach(), **detached)
    if family == "reference" and not torch.compiler.is_compiling():
        checks.check_window_values(problem.window, None)
    return family, problem
