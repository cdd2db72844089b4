"""The outputs of a student as a loss reads them, and the loss's results."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from kdcache.tasks import SEGMENTATION


class Outputs(Protocol):
    """A student's outputs for a batch. `logits` are read from a `segmentation` head, or if no head has a name."""

    @property
    def logits(self) -> Tensor:
        """Logits (B, C, h, w) of segmentation."""

    @property
    def heads(self) -> Mapping[str, Tensor]:
        """The outputs (B, c, h, w) by head."""

    @property
    def features(self) -> Mapping[str, Tensor]:
        """The features (B, c, h, w) by tap."""


class StudentOutputs(NamedTuple):
    """Logits (B, C, h, w), or (B, 0, 1, 1) for a student without logits; heads and features by name.

    Attributes:
        others: outputs for the rows of other streams of the batch, by the stream's name.
    """

    logits: Tensor
    heads: Mapping[str, Tensor] = {}
    features: Mapping[str, Tensor] = {}
    others: Mapping[str, "StudentOutputs"] = {}


class Losses(NamedTuple):
    """Scalars, float32: the loss, which is the only one with a gradient, and its terms before weighting.

    Attributes:
        terms: every term's loss by its name: ce, kl and the further terms. With named streams the name is STREAM/TERM,
            and STREAM/loss is a stream's weighted sum.
        tasks: the weighted sum of each task's terms, before the balance. Empty without a balance.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    tasks: Mapping[str, Tensor] = {}

    @property
    def ce(self) -> Tensor:
        """The cross-entropy. Raises: KeyError with named streams."""
        return self.terms["ce"]

    @property
    def kl(self) -> Tensor:
        """The KL divergence. Raises: KeyError with named streams."""
        return self.terms["kl"]


def unpacked(outputs: Outputs | StudentOutputs | Tensor) -> StudentOutputs:
    """Return the outputs of a student, or bare logits, as a loss reads them."""
    if isinstance(outputs, StudentOutputs):
        return outputs
    if isinstance(outputs, Tensor):
        return StudentOutputs(outputs)
    named = {**outputs.features, **outputs.heads}
    if named and SEGMENTATION not in outputs.heads:
        other = next(iter(named.values()))
        return StudentOutputs(other.new_empty((len(other), 0, 1, 1)), outputs.heads, outputs.features)
    return StudentOutputs(outputs.logits, outputs.heads, outputs.features)
