"""The outputs of a student as a loss reads them, and the loss's results."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from kdcache.tasks import SEGMENTATION


class Outputs(Protocol):
    """The interface of a student's outputs for a batch of B images.

    A loss reads `logits` if there is a `segmentation` head, or if `heads` and `features` are empty.
    """

    @property
    def logits(self) -> Tensor:
        """The segmentation logits (B, C, h, w)."""

    @property
    def heads(self) -> Mapping[str, Tensor]:
        """The outputs of all heads: name of the head -> (B, c, h, w) with the c channels of the head."""

    @property
    def features(self) -> Mapping[str, Tensor]:
        """The features that were asked for: name of the tap -> (B, c, h, w)."""


class StudentOutputs(NamedTuple):
    """A student's outputs for the rows of one stream, as a loss reads them.

    Attributes:
        logits: segmentation logits (B, C, h, w), or an empty (B, 0, 1, 1) for a student without a segmentation head.
        heads: name of a head -> its output (B, c, h, w).
        features: name of a tap -> its features (B, c, h, w).
        others: name of another stream of the batch -> the student's outputs for its rows.
    """

    logits: Tensor
    heads: Mapping[str, Tensor] = {}
    features: Mapping[str, Tensor] = {}
    others: Mapping[str, "StudentOutputs"] = {}


class Losses(NamedTuple):
    """The result of a loss. All values are 0-dimensional, float32. Only `loss` has a gradient.

    Attributes:
        loss: the weighted sum of the terms.
        terms: name -> the term's value before weighting: `ce`, `kl` and the further terms. With named streams the name
            is STREAM/TERM, and STREAM/loss is the stream's weighted sum.
        tasks: task -> the weighted sum of its terms, before the balance of tasks. Empty without a balance.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    tasks: Mapping[str, Tensor] = {}

    @property
    def ce(self) -> Tensor:
        """The cross-entropy before weighting. Raises: KeyError if streams have names, as `terms` then has STREAM/ce."""
        return self.terms["ce"]

    @property
    def kl(self) -> Tensor:
        """The KL divergence before weighting. Raises: KeyError if streams have names, as `terms` then has STREAM/kl."""
        return self.terms["kl"]


def unpacked(outputs: Outputs | StudentOutputs | Tensor) -> StudentOutputs:
    """Convert a student's outputs to `StudentOutputs`. A bare tensor becomes its logits.

    Without a segmentation head, the logits are empty, (B, 0, 1, 1).
    """
    if isinstance(outputs, StudentOutputs):
        return outputs
    if isinstance(outputs, Tensor):
        return StudentOutputs(outputs)
    named = {**outputs.features, **outputs.heads}
    if named and SEGMENTATION not in outputs.heads:
        any_output = next(iter(named.values()))
        return StudentOutputs(any_output.new_empty((len(any_output), 0, 1, 1)), outputs.heads, outputs.features)
    return StudentOutputs(outputs.logits, outputs.heads, outputs.features)
