"""The outputs of a student, as a loss reads them, and what it makes of them."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from kdcache.heads import SEGMENTATION


class Outputs(Protocol):
    """A student's outputs for a batch; `logits` are read of one with a head `segmentation`, or with nothing by name."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def heads(self) -> Mapping[str, Tensor]: ...
    @property
    def features(self) -> Mapping[str, Tensor]: ...


class StudentOutputs(NamedTuple):
    """Logits (B, C, h, w), of no class, (B, 0, 1, 1), where the student has none; heads and features by name.

    Attributes:
        others: outputs for the rows of other streams of the batch, by the stream's name.
    """

    logits: Tensor
    heads: Mapping[str, Tensor] = {}
    features: Mapping[str, Tensor] = {}
    others: Mapping[str, "StudentOutputs"] = {}


class Losses(NamedTuple):
    """Scalars, float32: the loss, which alone carries a gradient, and its parts before weighting.

    Attributes:
        terms: in the order of DistillLoss.further.
        tasks: the weighted sum of each task's parts, before the balance; empty where no tasks are balanced.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    terms: tuple[Tensor, ...] = ()
    tasks: tuple[Tensor, ...] = ()


def unpacked(outputs: Outputs | StudentOutputs | Tensor) -> StudentOutputs:
    """The outputs of a student, or logits alone, as a loss reads them."""
    if isinstance(outputs, StudentOutputs):
        return outputs
    if isinstance(outputs, Tensor):
        return StudentOutputs(outputs)
    named = {**outputs.features, **outputs.heads}
    if named and SEGMENTATION not in outputs.heads:
        other = next(iter(named.values()))
        return StudentOutputs(other.new_empty((len(other), 0, 1, 1)), outputs.heads, outputs.features)
    return StudentOutputs(outputs.logits, outputs.heads, outputs.features)
