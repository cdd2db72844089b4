"""The recipe.toml of a run: its format, and the settings that it leaves out."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from kdcache.errors import RecipeError
from kdcache.settings.removed import without_removed
from kdcache.settings.setting import entries
from kdcache.settings.training import TRAINING
from kdcache.settings.validate import dump_values

FORMAT = 2
"""The format of recipe.toml. Since format 2, it holds only the settings that the training uses."""


def to_recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a training as recipe.toml holds them: flag without its dashes -> TOML value.

    `settings` has names with underscores. Settings that are None are left out, because TOML has no null.
    """
    written = dump_values({name: value for name, value in settings.items() if value is not None}, *TRAINING)
    return {name.replace("_", "-"): value for name, value in written.items()}


def settings_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe.toml, without the key `format`. Names and values stay as in the file.

    If an earlier version wrote a setting that no longer exists, it is left out if its value has no effect. Otherwise it
    is returned.

    Raises: RecipeError if a later version of kdcache wrote the recipe.
    """
    number = recipe.get("format", 1)
    if number not in (1, FORMAT):
        raise RecipeError(
            f"Unknown format of recipe.toml: {number} (this version reads 1 and {FORMAT})",
            fix="Use the version of kdcache that wrote it, or a later one.",
        )
    return {name: value for name, value in without_removed(recipe).items() if name != "format"}


def source_of(settings: Mapping[str, Any]) -> str | None:
    """Return where the samples of a training or a stream come from: its caches, joined by ' + ', or its data set.

    Return None if the settings name neither.
    """
    named = settings.get("cache") or settings.get("data")
    return " + ".join(map(str, named)) if isinstance(named, list | tuple) else named


def with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with the defaults of all missing settings, so that recipes can be compared.

    A recipe without the key `verb` is returned unchanged.
    """
    return {**_defaults(), **recipe} if "verb" in recipe else dict(recipe)


@cache
def _defaults() -> dict[str, Any]:
    return to_recipe({name: entry.default for name, entry in entries(*TRAINING).items() if not entry.required})
