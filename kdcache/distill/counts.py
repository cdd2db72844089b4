"""The denominators of a loss, as a value that the processes and accumulated parts of one batch share.

If losses of n parts are divided by the mean denominator, their average is the whole batch's loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")
"""The counts of a stream, or those of every stream in a tuple."""


@dataclass(frozen=True)
class Counts:
    """Denominators of the loss terms of one stream, on the loss's device. A pytree.

    Attributes:
        ce: sum of the class weights of the labelled pixels, 0-dimensional.
        kl: number of pixels that KL counts, 0-dimensional.
        terms: `Term.count` of each further term, in the order of `DistillLoss.further`.
    """

    ce: Tensor
    kl: Tensor
    terms: tuple[Tensor, ...] = ()


pytree.register_dataclass(Counts)


def average_counts(counts: T, average: Callable[[Tensor], Tensor]) -> T:
    """Return the mean of the loss's denominators over all processes. The processes exchange data only once.

    The result has the same structure as `counts`.

    Args:
        counts: this process's denominators, for example a tuple with the `Counts` of each stream.
        average: takes a float64 tensor and returns its mean over the processes.
    """
    process_counts, spec = pytree.tree_flatten(counts)
    mean = average(torch.cat([count.double().flatten() for count in process_counts]))
    means = torch.split(mean, [count.numel() for count in process_counts])
    averaged: T = pytree.tree_unflatten(
        [mean.view_as(count).to(count.dtype) for mean, count in zip(means, process_counts, strict=True)], spec
    )
    return averaged


def mean_counts(parts: Sequence[T]) -> T:
    """Return the mean of the loss's denominators over the accumulated parts of a batch.

    Each element of `parts` has the denominators of one part, for example as a tuple with the `Counts` of each stream.
    The result has the same structure as one element. The parts must have equally many samples.
    """
    counts: T = pytree.tree_map(lambda *each: torch.stack(each).mean(0), *parts)
    return counts
