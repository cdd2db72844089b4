"""Convert a network's return value to heads and features."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.heads import CategoricalHead, HeadKind, head_kind
from kdcache.models.foreign.tokens import maps_of
from kdcache.tasks import SEGMENTATION

DECLARED = "kdcache_heads"
"""The attribute in which a network declares its heads."""


class Reading:
    """An adapter that calls a network from outside kdcache, and finds heads and features in its return value.

    Args:
        declared: the heads that the network's attribute `kdcache_heads` declares: name -> kind, such as "categorical".
            {} declares a backbone without heads. None means that the network returns logits only.

    Attributes:
        lists_modules: True if the network's direct children are listed as taps.
    """

    lists_modules = True

    def __init__(self, declared: Mapping[str, Any] | None = None) -> None:
        self.declared = declared

    def call(self, network: nn.Module, x_B3HW: Tensor) -> object:
        """Return the network's return value for normalised images (B, 3, H, W)."""
        return network(x_B3HW)

    def heads(self, spec: str, answer: object) -> dict[str, Tensor]:
        """Return the heads' outputs in a network's return value: name -> (B, C, h, w), before any nonlinearity.

        Args:
            spec: the model's spec, for messages.
            answer: the network's return value, from `Reading.call`.
        Raises: ModelError if a head is missing.
        """
        return _heads(spec, self.declared, answer)

    def kinds(self, spec: str, heads: Mapping[str, Tensor]) -> dict[str, HeadKind]:
        """Return the kind of each head, by name: `CategoricalHead` or `RegressionHead`.

        Args:
            spec: the model's spec, for messages.
            heads: name -> the head's output (B, C, h, w), from the method `heads`.
        Raises: ModelError if the declared heads do not fit these outputs.
        """
        return _kinds(spec, self.declared, heads)

    def features(self, answer: object, size: tuple[int, int], patch: int | None) -> dict[str, Tensor]:
        """Return the features in a network's return value: tap -> (B, c, h, w).

        Args:
            answer: the result of `call`.
            size: (H, W) of the images.
            patch: the side in pixels of a transformer's patches. None if it has no patches.
        """
        return {} if self.declared != {} else maps_of(answer, size, patch)


def _heads(spec: str, declared: Mapping[str, Any] | None, answer: object) -> dict[str, Tensor]:
    """Return the outputs of the declared heads. Raises: ModelError if one is missing or is not (B, C, h, w)."""
    if declared is None:
        return {SEGMENTATION: _logits(spec, answer)}
    heads = {}
    for name in declared:
        head = answer.get(name) if isinstance(answer, Mapping) else None
        if not isinstance(head, Tensor) or head.ndim != 4:
            problem = f"{name!r} of shape {tuple(head.shape)}" if isinstance(head, Tensor) else f"no tensor {name!r}"
            raise ModelError(
                f"{spec} returned {type(answer).__name__} with {problem}, and {DECLARED} names other heads",
                fix=f'Return {{"{name}": ...}} with a tensor (B, C, h, w), or leave that name out of {DECLARED}.',
            )
        heads[name] = head
    return heads


def _kinds(spec: str, declared: Mapping[str, Any] | None, heads: Mapping[str, Tensor]) -> dict[str, HeadKind]:
    """Return the kind of each head. Raises: ModelError if a declaration is wrong or does not fit the output."""
    if declared is None:
        return {SEGMENTATION: CategoricalHead(heads[SEGMENTATION].shape[1])}
    kinds: dict[str, HeadKind] = {}
    for name, declaration in declared.items():
        try:
            kinds[name] = head_kind(declaration, heads[name].shape[1])
            if isinstance(kinds[name], CategoricalHead) != (name == SEGMENTATION):
                raise ValueError(f"{SEGMENTATION} is categorical, and all others are regressions")
        except ValueError as error:
            raise ModelError(
                f"Invalid {name!r} in {DECLARED} of {spec}: {error}",
                fix='Write categorical, regression, or a mapping such as {"depth": {"kind": "regression", '
                '"parameterisation": "exp", "max_depth": 80.0}}',
            ) from error
    return kinds


def _logits(spec: str, answer: object) -> Tensor:
    while isinstance(answer, tuple | list) and answer:  # what follows are auxiliary outputs
        answer = answer[0]
    if isinstance(answer, Mapping):
        logits = answer.get("out", answer.get("logits"))
    else:
        logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 4:
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise ModelError(
            f"{spec} returned {type(answer).__name__}{shape}, which holds no logits (B, C, h, w)",
            fix="Return the class scores of every cell, without softmax or argmax: a tensor, under 'out' or 'logits', "
            "as .logits, or first in a tuple.",
        )
    return logits
