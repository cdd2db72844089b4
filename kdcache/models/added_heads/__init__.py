"""Heads that the end of a model's spec adds to it: `MODEL+depth`, `MODEL+aux`, `MODEL+depth+aux`."""

from kdcache.models.added_heads.auxiliary import split_auxiliary
from kdcache.models.added_heads.depth import split_depth


def base_of(spec: str) -> str:
    """The spec of the model that heads are added to. Raises: ModelError for a malformed one."""
    return split_depth(split_auxiliary(spec)[0])[0]


__all__ = ["base_of", "split_auxiliary", "split_depth"]
