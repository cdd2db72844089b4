"""The loss of relations: how predictions vary over the classes of a cell, and over the cells of a class.

Legend: B batch, C classes, hs ws the student's own size, h w the teacher's cells, H W the student's image.
"""

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..errors import misfit
from ..library import is_traced
from ..ops import choose_implementation, constant
from ..topk import check_view_size, is_logits
from ..window import Size
from . import library
from .problem import MOMENTS, RelationProblem
from .reference import relation_loss_reference, relation_moments_reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def relation_loss(
    student_logits_BChw: Tensor,
    teacher_logits_BChw: Tensor,
    *,
    view_size: Size,
    size: Size,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    window_B4: Tensor | None = None,
    flip_B: Tensor | None = None,
    pixel_weight_BHW: Tensor | None = None,
    counted_BHW: Tensor | None = None,
    count: Tensor | float | None = None,
    moments_6C: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the DIST relation loss: 1 - the correlation of student and teacher over classes, plus the same over cells.

    >>> import kdcache_kernels
    >>> logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    >>> loss = kdcache_kernels.relation_loss(logits, torch.randn(2, 3, 4, 4), view_size=(16, 16), size=(16, 16))
    >>> loss.backward()

    It is T^2 * (beta * inter + gamma * intra), with probabilities q = softmax(logits / T). inter is the mean over cells
    of 1 - Pearson's correlation of q_s and q_t over the classes. intra is the mean over classes of 1 - their
    correlation over the cells of the whole batch. 1e-8 is added to every variance.

    A cell is the area of the view that one of the teacher's h x w logits covers. Equally many cells tile the student's
    image. The teacher is sampled at their centres, and the student's logits are resized to them, both without aligned
    corners. A cell counts by the share of its pixels that count, and its weight is that share times the gate.

    If no cell counts, or with one class, loss and gradient are exactly 0. A logit is unusable if it is NaN, infinite,
    or so large that logits / T overflows. If a counted cell depends on an unusable logit, the loss is NaN, and so is
    its gradient at every logit of the batch.

    Args:
        student_logits_BChw: raw logits at their own size, float32, float16, bfloat16 or float64, any strides. The only
            input with a gradient. Computed in float32 even under autocast (float64 logits: in float64 by the
            reference).
        teacher_logits_BChw: (B, C, h, w) logits of all classes. `densify` makes them from a packed target.
        view_size: (height, width) in pixels of the view that the teacher's cells tile.
        size: (H, W) in pixels of the student's image.
        temperature: > 0, dimensionless.
        beta: >= 0, weight of inter.
        gamma: >= 0, weight of intra.
        window_B4: (B, 4) float64 edges (y0, x0, y1, x1) of what the image shows, in pixels of the view. None is the
            whole view. A window outside the view has no counted cells.
        flip_B: (B,) bool, whether the window is mirrored left to right. None mirrors nothing.
        pixel_weight_BHW: gate, any dtype, taken as a number. It does not shrink the denominator.
        counted_BHW: bool, which pixels of the student's image count. None counts all.
        count: denominator of inter. None uses this batch's number of counted cells. If a batch has several parts, pass
            the mean of their counts. The losses of the parts then average to the loss of the batch.
        moments_6C: moments of the whole batch: `average_moments` of the `relation_moments` of all parts. Each part's
            intra is then the intra of the whole batch. None uses this batch's moments.
        impl: "auto" (the fastest for the device), "triton", "numba" or "reference".
    Returns: 0-dimensional float32 (float64 for float64 logits). Differentiable once, or any number of times with the
        reference.
    Raises: ShapeError, ValueRangeError naming the argument.
    Memory: on CUDA, the gradient in float32. On the CPU, up to four float32 tensors of the size of the teacher's
        logits.
    Source: Huang et al. 2022, arXiv 2205.10536, equations 8 to 10. Oracle: kdcache_kernels.on_cells.reference.
    """
    check_logits(student_logits_BChw, teacher_logits_BChw)
    device, C = student_logits_BChw.device, student_logits_BChw.shape[1]
    fix = "Pass average_moments(torch.stack([...])) of what relation_moments returned."
    checks.check_tensor("moments_6C", moments_6C, (MOMENTS, C), (torch.float64,), device, fix)
    checks.check_scalar("count", count, device, "a sum over processes", optional=True)
    if count is not None:
        count = count.detach() if isinstance(count, Tensor) else constant(count, device, traced=is_traced())
    family, problem = _checked(
        impl,
        student_logits_BChw,
        teacher_logits_BChw,
        view_size=view_size,
        size=size,
        temperature=temperature,
        beta=beta,
        gamma=gamma,
        window=window_B4,
        flip=flip_B,
        pixel_weight=pixel_weight_BHW,
        counted=counted_BHW,
        count=count,
        moments=moments_6C,
        need_gradient=student_logits_BChw.requires_grad and torch.is_grad_enabled(),
    )
    if family == "reference":
        return relation_loss_reference(problem)
    return library.call_relation_loss(problem, family)


@torch.no_grad()
def relation_moments(
    student_logits_BChw: Tensor,
    teacher_logits_BChw: Tensor,
    *,
    view_size: Size,
    size: Size,
    temperature: float = 1.0,
    window_B4: Tensor | None = None,
    flip_B: Tensor | None = None,
    pixel_weight_BHW: Tensor | None = None,
    counted_BHW: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the moments of the predictions for one part of a batch, such as the images of one process.

    Combine the moments of all parts with `average_moments`, and pass the result to each part's `relation_loss`.

    >>> import kdcache_kernels
    >>> student, teacher = torch.randn(2, 2, 3, 4, 4)
    >>> kdcache_kernels.relation_moments(student, teacher, view_size=(16, 16), size=(16, 16)).shape
    torch.Size([6, 3])

    Pass the arguments that `relation_loss` gets for this part: logits, view size, label size, temperature, window,
    flip, gate, mask of counted pixels and implementation. `relation_loss` explains them. The errors are the same.

    Returns: (6, C) float64. For each class: the sum of the cells' weights, the weighted means of the student's and the
        teacher's probabilities p and q, and three sums over the cells. With a = p - its mean and b = q - its mean,
        these are the sums of weight * a * b, weight * a * a and weight * b * b. NaN if a counted cell depends on a
        logit that is not finite.
    """
    check_logits(student_logits_BChw, teacher_logits_BChw)
    family, problem = _checked(
        impl,
        student_logits_BChw.detach(),
        teacher_logits_BChw,
        view_size=view_size,
        size=size,
        temperature=temperature,
        beta=1.0,
        gamma=1.0,
        window=window_B4,
        flip=flip_B,
        pixel_weight=pixel_weight_BHW,
        counted=counted_BHW,
        count=None,
        moments=None,
        need_gradient=False,
    )
    if family == "reference":
        return relation_moments_reference(problem)
    moments: Tensor = library.relation_moments(family, *library.arguments_of(problem))
    return moments


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Raise ShapeError unless student's and teacher's logits are dense (B, C, h, w) floats with equal B and C."""
    checks.check_student(student)
    B, C = student.shape[:2]
    if not is_logits(teacher) or tuple(teacher.shape[:2]) != (B, C) or min(teacher.shape[2:]) < 1:
        raise misfit(
            "teacher_logits_BChw",
            teacher,
            f"a dense ({B}, {C}, h, w) of floats",
            "Use a student with the cache's class list. Densify a target that keeps some classes.",
        )
    fix = "Pass the logits of every class, as densify returns them."
    checks.check_tensor("teacher_logits_BChw", teacher, tuple(teacher.shape), FLOATS, student.device, fix)


def _checked(impl: str, student: Tensor, teacher: Tensor, **others: Any) -> tuple[str, RelationProblem]:
    """Check the arguments that both functions have. Return the implementation and the problem.

    Raises: ShapeError, ValueRangeError naming the argument.
    """
    B, device = student.shape[0], student.device
    family = choose_implementation(impl, device, student.dtype, student_logits_BChw=student)
    checks.check_number("temperature", others["temperature"], above_zero=True)
    for name in ("beta", "gamma"):
        checks.check_number(name, others[name])
    size = others["size"] = checks.check_size(None, others["size"])
    check_view_size(others["view_size"])
    checks.check_window(others["window"], others["flip"], B, device)
    fix = "Pass one value per pixel of the image."
    checks.check_tensor("pixel_weight_BHW", others["pixel_weight"], (B, *size), (), device, fix)
    checks.check_tensor("counted_BHW", others["counted"], (B, *size), (torch.bool,), device, fix)
    # The student alone has a gradient.
    detached: dict[str, Any] = {name: x.detach() if isinstance(x, Tensor) else x for name, x in others.items()}
    problem = RelationProblem(student=student, teacher=teacher.detach(), **detached)
    if family == "reference" and not torch.compiler.is_compiling():
        checks.check_window_values(problem.window, None)
    return family, problem
