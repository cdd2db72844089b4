"""Convert a network's return value to heads and features."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.heads import CategoricalHead, HeadKind, head_kind
from kdcache.models.foreign.tokens import maps_of
from kdcache.tasks import SEGMENTATION

DECLARED = "kdcache_heads"
"""The attribute in which a network says which heads it answers with."""


class Reading:
    """How to call a network, and what its return value means: logits, or the heads that it declares.

    Attributes:
        declared: its heads, as in `kdcache_heads`, or None for logits.
        lists_modules: whether the network's direct children are listed as taps.
    """

    lists_modules = True

    def __init__(self, declared: Mapping[str, Any] | None = None) -> None:
        self.declared = declared

    def call(self, network: nn.Module, x_B3HW: Tensor) -> object:
        """Call the network on images, and return its answer."""
        return network(x_B3HW)

    def heads(self, spec: str, answer: object) -> dict[str, Tensor]:
        """Return the heads' raw outputs (B, C, h, w) by name. Raises: ModelError for an answer without them."""
        return _heads(spec, self.declared, answer)

    def kinds(self, spec: str, heads: Mapping[str, Tensor]) -> dict[str, HeadKind]:
        """Return the kind of each head's output. Raises: ModelError for a declaration that does not fit."""
        return _kinds(spec, self.declared, heads)

    def features(self, answer: object, size: tuple[int, int], patch: int | None) -> dict[str, Tensor]:
        """Return the features (B, c, h, w) in an answer, by tap.

        `size` is (H, W) of the images, and `patch` the side of the network's patches.
        """
        return {} if self.declared != {} else maps_of(answer, size, patch)


def _heads(spec: str, declared: Mapping[str, Any] | None, answer: object) -> dict[str, Tensor]:
    """Return the outputs of a network by head. Raises: ModelError for one that is missing or not a map."""
    if declared is None:
        return {SEGMENTATION: _logits(spec, answer)}
    heads = {}
    for name in declared:
        head = answer.get(name) if isinstance(answer, Mapping) else None
        if not isinstance(head, Tensor) or head.ndim != 4:
            shown = f"{name!r} of shape {tuple(head.shape)}" if isinstance(head, Tensor) else f"no tensor {name!r}"
            raise ModelError(
                f"{spec} returned {type(answer).__name__} with {shown}, and {DECLARED} names other heads",
                fix=f'Return {{"{name}": ...}} with a tensor (B, C, h, w), or leave that name out of {DECLARED}.',
            )
        heads[name] = head
    return heads


def _kinds(spec: str, declared: Mapping[str, Any] | None, heads: Mapping[str, Tensor]) -> dict[str, HeadKind]:
    """Return the kind of each head. Raises: ModelError for a wrong declaration, or one that does not fit the output."""
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
