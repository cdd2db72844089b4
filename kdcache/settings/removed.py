"""What earlier versions had, and what takes its place. A removed name fails with its replacement."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdcache.errors import RecipeError


@dataclass(frozen=True)
class Removed:
    """One removed name.

    Attributes:
        fix: what to do instead, in the imperative.
        unused: of a setting, the value that a recipe.toml holds where nobody gave one. It is read as absent.
    """

    fix: str
    unused: Any = None


VERBS: Mapping[str, Removed] = {}
"""Verbs by their words after `kdcache`."""

SETTINGS: Mapping[str, Removed] = {}
"""Flags of any verb, which are also keywords and keys of recipes. Keys have underscores."""

KEYS: Mapping[str, Removed] = {}
"""Keys of a recipe that are no flags."""

STATISTICS: Mapping[str, Removed] = {}
"""Values of --statistics."""


def removal(name: str, *tables: Mapping[str, Removed]) -> RecipeError | None:
    """Return the error for a removed name; None if it was never there.

    Args:
        name: as its table has it, or with hyphens, or as a flag.
    """
    key = name.removeprefix("--").replace("-", "_")
    for table in tables:
        row = table.get(name) or table.get(key)
        if row is not None:
            return RecipeError(f"{name} was removed", entry="name was removed", received=name, remedy=row.fix)
    return None


def without_removed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe.toml of an earlier version without the removed keys that nobody had set."""
    return {k: v for k, v in recipe.items() if k not in SETTINGS or v not in (SETTINGS[k].unused, None)}
