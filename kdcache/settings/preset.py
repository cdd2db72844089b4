"""Presets: settings of a training under one name. Settings that are also given explicitly have priority."""

import tomllib
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError, suggest

_FOLDER = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Return the names of all presets, sorted. A preset is a group of training settings with one name."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset: name of the setting, with underscores -> value.

    Raises: RecipeError for an unknown preset.
    """
    names = preset_names()
    if name not in names:
        raise RecipeError(f"Unknown preset {name}", fix=suggest(name, names, f"Choose one of {', '.join(names)}."))
    values = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    return {key.replace("-", "_"): value for key, value in values.items()}
