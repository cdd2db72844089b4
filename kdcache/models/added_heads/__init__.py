"""Heads that a model's spec adds: `MODEL+depth`, `MODEL+aux`, `MODEL+depth+aux`."""

from kdcache.models.added_heads.auxiliary import split_auxiliary
from kdcache.models.added_heads.depth import split_depth
from kdcache.run_folder import split_outputs


def base_of(spec: str) -> str:
    """Return a model spec without its options: `kdcache:tiny+depth+aux,outputs=logits` becomes `kdcache:tiny`.

    Raises: ModelError if an option is unknown.
    """
    return split_depth(split_auxiliary(split_outputs(spec)[0])[0])[0]


__all__ = ["base_of", "split_auxiliary", "split_depth"]
