"""The denominators of a loss, as a value that the processes and accumulated parts of one batch share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Denominators:
    """Denominators of a batch on its device, or their mean over the parts of a larger batch. A pytree.

    If losses of n parts are divided by the mean denominator, their average is the whole batch's loss.
    """

    def averaged(self, average: Callable[[Tensor], Tensor]) -> Self:
        """Return the mean over processes by one exchange. `average` averages a tensor over the processes."""
        own, spec = pytree.tree_flatten(self)
        mean = average(torch.cat([count.double().flatten() for count in own]))
        means = torch.split(mean, [count.numel() for count in own])
        counts: Self = pytree.tree_unflatten(
            [mean.view_as(count).to(count.dtype) for mean, count in zip(means, own, strict=True)], spec
        )
        return counts

    @classmethod
    def mean(cls, parts: Sequence[Self]) -> Self:
        """Return the mean over the equal parts of a batch."""
        counts: Self = pytree.tree_map(lambda *each: torch.stack(each).mean(0), *parts)
        return counts


@dataclass(frozen=True)
class Counts(Denominators):
    """Denominators of the terms of one loss.

    Attributes:
        ce: sum of the class weights of labelled pixels, 0-dimensional.
        kl: pixels that KL counts, 0-dimensional.
        terms: `Term.count` of each further term, in the order of `DistillLoss.further`.
    """

    ce: Tensor
    kl: Tensor
    terms: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class StreamCounts(Denominators):
    """Denominators of the losses of several streams, in their order."""

    streams: tuple[Counts, ...]


pytree.register_dataclass(Counts)
pytree.register_dataclass(StreamCounts)
