"""Gradient norms of a loss's terms, and of its tasks, over the model's parameters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.distill import Criterion

Gradient = Sequence[Tensor | None]
"""A gradient by the model's parameters; None for those that it does not reach."""


class Norms(NamedTuple):
    """L2 norms of the gradients of a step, and the weights of the tasks.

    Attributes:
        terms: name of a loss term -> the norm of its weighted gradient over all parameters of the model.
        tasks: task -> the norm of its weighted gradient over the parameters that both tasks change. Empty without a
            balance of tasks.
        weights: task -> its weight from the balance. Empty without a balance.
    """

    terms: dict[str, float]
    tasks: dict[str, float]
    weights: dict[str, float]


class TaskGradients:
    """Sums the gradients of the loss terms of each task.

    Args:
        criterion: the loss. Without a balance of tasks nothing is summed.
    """

    def __init__(self, criterion: Criterion) -> None:
        self._balance = criterion.balance
        self._tasks = {} if self._balance is None else criterion.part_tasks
        self._sums: dict[str, list[Tensor | None]] = {}

    def add(self, part: str, gradient: Gradient) -> None:
        """Add the gradient of a loss term to its task.

        Args:
            part: name of the loss term. The sum of a stream's terms, such as `kitti/loss`, has no task and is ignored.
            gradient: a tensor or None for each parameter of the model.
        """
        task = self._tasks.get(part)
        if task is not None:
            before = self._sums.get(task)
            self._sums[task] = list(gradient) if before is None else _sum(before, gradient)

    def norms(self, terms: dict[str, float], norm: Callable[[Gradient], float]) -> Norms:
        """Return the gradient norms of a step: of each loss term, as given, and of each task's summed gradients.

        The sums are of all gradients that `add` got. Without a balance of tasks, the result has no norms of tasks.

        Args:
            terms: name of a loss term -> the norm of its gradient. The result holds it unchanged.
            norm: returns the L2 norm of a gradient.
        """
        if self._balance is None:
            return Norms(terms, {}, {})
        shared = [all(part is not None for part in parts) for parts in zip(*self._sums.values(), strict=True)]
        tasks = {}
        for task in self._balance.heads:
            gradient = self._sums.get(task, [None] * len(shared))
            tasks[task] = norm([part if both else None for part, both in zip(gradient, shared, strict=True)])
        return Norms(terms, tasks, self._balance.weights())


def add_gradients(total: dict[str, list[Tensor | None]], more: Iterable[tuple[str, Gradient]], parts: int) -> None:
    """Add gradients, each divided by `parts`, to the sums in `total`.

    Args:
        total: name of a loss term -> the sum of its gradients so far. It is changed.
        more: pairs of a term's name and its gradient.
        parts: the number of accumulated parts.
    """
    for name, gradient in more:
        share = [None if part is None else part / parts for part in gradient]
        total[name] = _sum(total[name], share) if name in total else share


def task_lines(losses: Mapping[str, float], norms: Norms) -> dict[str, dict[str, float]]:
    """Return what the log says about each task, as a dict: task -> `loss`, `weight`, `norm` and `ratio`.

    `weight` is the task's weight from the balance, and `norm` is the norm of its gradient. `ratio` is this norm divided
    by the other task's norm (NaN if that is 0).

    Args:
        losses: task -> its loss.
        norms: the norms and weights of the same step. Without a balance, the result is empty.
    """
    lines = {}
    for task, norm in norms.tasks.items():
        other_norm = max((norm_of_task for name, norm_of_task in norms.tasks.items() if name != task), default=0.0)
        ratio = norm / other_norm if other_norm else float("nan")
        lines[task] = {"loss": losses[task], "weight": norms.weights[task], "norm": norm, "ratio": ratio}
    return lines


def l2_norm(gradient: Gradient, average: Callable[[Tensor], Tensor] | None) -> float:
    """Return the L2 norm of a gradient over all parameters. Parameters without a gradient count as 0.

    `average` returns a tensor's mean over the processes, and is applied first. None is for a single process.
    """
    tensors = [part if average is None else average(part) for part in gradient if part is not None]
    squares = [part.float().square().sum() for part in tensors]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _sum(first: Gradient, second: Gradient) -> list[Tensor | None]:
    pairs = zip(first, second, strict=True)
    return [b if a is None else a if b is None else a + b for a, b in pairs]
