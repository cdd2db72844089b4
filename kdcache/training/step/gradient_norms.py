"""Gradient norms of a loss's terms, and of its tasks, over the model's parameters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.distill import Criterion

Gradient = Sequence[Tensor | None]
"""A gradient by the model's parameters; None for those that it does not reach."""


class Norms(NamedTuple):
    """L2 norms of a step's gradients, and the weights of the tasks.

    Attributes:
        terms: the norm of each loss term's gradient, over all parameters.
        tasks: the norm of each of two tasks' gradients, over the parameters that both reach, or {} for a single task.
        weights: the weight of each task, from the balance.
    """

    terms: dict[str, float]
    tasks: dict[str, float]
    weights: dict[str, float]


class TaskGradients:
    """The sum of the gradients of each task's terms.

    Args:
        criterion: the loss whose terms are added. Without a balance nothing is added.
    """

    def __init__(self, criterion: Criterion) -> None:
        self._balance = criterion.balance
        self._tasks = {} if self._balance is None else criterion.part_tasks
        self._sums: dict[str, list[Tensor | None]] = {}

    def add(self, part: str, gradient: Gradient) -> None:
        """Add the gradient of a term. A term without a task (a stream's whole loss) is ignored."""
        task = self._tasks.get(part)
        if task is not None:
            before = self._sums.get(task)
            self._sums[task] = list(gradient) if before is None else _sum(before, gradient)

    def norms(self, terms: dict[str, float], norm: Callable[[Gradient], float]) -> Norms:
        """Return the norms of a step, given the norms of its `terms`."""
        if self._balance is None:
            return Norms(terms, {}, {})
        shared = [all(own is not None for own in of_tasks) for of_tasks in zip(*self._sums.values(), strict=True)]
        tasks = {}
        for task in self._balance.heads:
            own = self._sums.get(task, [None] * len(shared))
            tasks[task] = norm([part if both else None for part, both in zip(own, shared, strict=True)])
        return Norms(terms, tasks, self._balance.weights())


def add_gradients(total: dict[str, list[Tensor | None]], more: Iterable[tuple[str, Gradient]], parts: int) -> None:
    """Add gradients by name, each divided by the number of parts, to the sums in `total`."""
    for name, gradient in more:
        own = [None if part is None else part / parts for part in gradient]
        total[name] = _sum(total[name], own) if name in total else own


def task_lines(losses: Mapping[str, float], norms: Norms) -> dict[str, dict[str, float]]:
    """Return loss, weight, gradient norm and its ratio to the other task's, by task."""
    lines = {}
    for task, norm in norms.tasks.items():
        other = max((own for name, own in norms.tasks.items() if name != task), default=0.0)
        ratio = norm / other if other else float("nan")
        lines[task] = {"loss": losses[task], "weight": norms.weights[task], "norm": norm, "ratio": ratio}
    return lines


def l2_norm(gradient: Gradient, average: Callable[[Tensor], Tensor] | None) -> float:
    """Return the L2 norm of a gradient over all parameters, averaged over the processes first."""
    whole = [part if average is None else average(part) for part in gradient if part is not None]
    squares = [part.float().square().sum() for part in whole]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _sum(one: Gradient, other: Gradient) -> list[Tensor | None]:
    pairs = zip(one, other, strict=True)
    return [b if a is None else a if b is None else a + b for a, b in pairs]
