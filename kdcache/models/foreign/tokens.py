"""Convert outputs of backbones to maps: tokens, lists of stages, the output objects of transformers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kdcache.errors import ModelError

_MOST_PREFIX = 16
"""Class and register tokens that may come before the patches' tokens."""
_MERGES = (1, 2, 4, 8)
"""The number of patches, on a side, that one token may stand for."""
SUMMARY = "summary"
"""The tap of one vector per image, (B, c, 1, 1)."""


def token_map(tokens_BNc: Tensor, size: tuple[int, int], patch: int | None) -> Tensor | None:
    """Return a transformer's tokens as a feature (B, c, h, w), or None if their number does not fit the image.

    Up to 16 class and register tokens at the start are left out. Each other token must stand for a square of 1, 2 x 2,
    4 x 4 or 8 x 8 patches.

    Args:
        tokens_BNc: the N tokens of each image, with c numbers each.
        size: (H, W) of the image in pixels.
        patch: the side in pixels of the network's patches. None gives None.
    """
    count = tokens_BNc.shape[1]
    height, width = (side // (patch or max(size) + 1) for side in size)
    for merge in _MERGES if patch is not None else ():
        h, w = -(-height // merge), -(-width // merge)
        if 0 <= count - h * w <= _MOST_PREFIX:
            return tokens_BNc[:, count - h * w :].transpose(1, 2).reshape(len(tokens_BNc), -1, h, w)
    return None


def as_map(feature: object, size: tuple[int, int], patch: int | None, where: str) -> Tensor:
    """Return a module's output as a feature (B, c, h, w). Tokens (B, N, c) are arranged as the image's patches.

    Args:
        feature: the output.
        size: (H, W) of the image.
        patch: the side in pixels of the network's patches. None if it has no patches.
        where: names the module in the error.
    Raises: ModelError for any other output.
    """
    if isinstance(feature, Tensor) and feature.ndim == 4:
        return feature
    if isinstance(feature, Tensor) and feature.ndim == 3:
        if (laid := token_map(feature, size, patch)) is not None:
            return laid
        patches = "no patches of the image" if patch is None else f"{size[0] // patch}x{size[1] // patch} patches"
        raise ModelError(
            f"Cannot lay {feature.shape[1]} tokens of {where} over an image of {size[0]}x{size[1]}: they are not a "
            "grid",
            fix="Tap a module whose output is (B, c, h, w), or wrap the network so that it returns such a map.",
            rule=f"The image has {patches}, with up to {_MOST_PREFIX} tokens before them.",
        )
    kind = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
    raise ModelError(
        f"Cannot tap {where}: it gave {kind}, and no (B, c, h, w) or tokens (B, N, c)",
        fix="Tap another module, for example a convolution or a block.",
    )


def maps_of(answer: Any, size: tuple[int, int], patch: int | None) -> dict[str, Tensor]:
    """Return the features in a backbone's return value: tap -> (B, c, h, w).

    The last tap is usually the best for distillation.

    Args:
        answer: one feature, a list or a mapping of features, tokens (B, N, c), or an object of transformers with
            `feature_maps` or `last_hidden_state`. Anything else gives {}.
        size: (H, W) of the image.
        patch: the side in pixels of the network's patches. None if it has no patches.
    """
    named = any(hasattr(answer, name) for name in ("feature_maps", "last_hidden_state"))
    if isinstance(answer, Mapping) and not named:
        return {
            name: y for name, y in answer.items() if isinstance(name, str) and isinstance(y, Tensor) and y.ndim == 4
        }
    stages = getattr(answer, "feature_maps", answer)
    if isinstance(stages, tuple | list) and stages and all(isinstance(y, Tensor) and y.ndim == 4 for y in stages):
        return {f"stage{number}": y for number, y in enumerate(stages, start=1)}
    last = getattr(answer, "last_hidden_state", answer)
    if not isinstance(last, Tensor):
        return {}
    pooled, blocks = getattr(answer, "pooler_output", None), getattr(answer, "hidden_states", None) or ()
    tokens = {f"stage{number}": y for number, y in enumerate(blocks[1:], start=1) if y.ndim == last.ndim == 3}
    found = {name: token_map(y, size, patch) for name, y in tokens.items()}
    found["last"] = last if last.ndim == 4 else token_map(last, size, patch) if last.ndim == 3 else None
    summary = {SUMMARY: pooled.flatten(1)[..., None, None]} if isinstance(pooled, Tensor) else {}
    return summary | {name: y for name, y in found.items() if y is not None}
