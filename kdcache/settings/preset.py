"""Presets: the settings of a training by one name. What is given beside the name wins."""

import tomllib
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError, suggest

_FOLDER = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Return the names of all presets, in order."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset by their names, as a recipe writes their values.

    Raises: RecipeError for a name that is none.
    """
    names = preset_names()
    if name not in names:
        raise RecipeError(f"Unknown preset {name}", fix=suggest(name, names, f"Choose one of {', '.join(names)}."))
    values = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    return {key.replace("-", "_"): value for key, value in values.items()}
