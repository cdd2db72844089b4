"""Flags that several verbs share, and recipe files as their defaults."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.bounded import parse_toml, read_text
from kdcache.errors import RecipeError, suggest
from kdcache.settings import entries
from kdcache.settings.preset import preset_names, read_preset
from kdcache.settings.recipe import settings_of
from kdcache.settings.removed import SETTINGS, removal
from kdcache.settings.shared import (
    CopySettings,
    DataSettings,
    ImageSettings,
    JudgeSettings,
    MachineSettings,
    SourceSettings,
)
from kdcache.settings.streams import term_line, to_line
from kdcache.settings.training import TRAINING
from kdcache_cli.settings.signature import COPIED, UNTYPED, flag

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch and zarr
    pass


def parse_numbers(text: str, flag: str) -> tuple[int, ...]:
    """Return the whole numbers in a text without repetitions: '0,1,2' becomes (0, 1, 2).

    `flag` names the flag in the error. Raises: RecipeError for other text.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise RecipeError(
            f"Invalid value of {flag}: {text!r}", fix=f"Give whole numbers from 0, for example {flag} 0,1"
        )
    return tuple(dict.fromkeys(map(int, words)))


def _load_recipe(context: typer.Context, path: Path | None) -> Path | None:
    """Use the keys of a TOML file as defaults of flags. Flags in the command have priority."""
    if path is None:
        return None
    from kdcache.run_folder import RECIPE, VERBS, Run

    try:
        recipe: dict[str, Any] = parse_toml(read_text(path))
        if path.name == RECIPE:  # a run's, whose places are those of this machine
            recipe = dict(Run(path.parent).recipe or recipe)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"Cannot read the recipe {path}: {error}", fix="Correct the file: TOML whose keys are the flags."
        ) from error
    if "verb" in recipe:
        recipe = settings_of(recipe)
    # A run's own recipe names its verb, and may have settings that this verb has no flag for.
    resolved = "verb" in recipe
    verb = recipe.pop("verb", context.info_name)
    if verb != context.info_name:
        raise RecipeError(
            f"Cannot use {path}, a recipe of {verb}, with {context.info_name}",
            fix=f"Run kdcache {verb} --recipe {path}" if verb in VERBS else f"Set verb to one of {', '.join(VERBS)}.",
        )
    flags = {parameter.name: parameter for parameter in context.command.params if parameter.name}
    values = {}
    for key, value in recipe.items():
        name = key.replace("-", "_")
        if name not in flags:
            if resolved and name in entries(*TRAINING):
                continue
            if (gone := removal(key, SETTINGS)) is not None:
                raise gone

            raise RecipeError(
                f"Unknown key {key!r} in {path}",
                fix=suggest(
                    key, (flag.replace("_", "-") for flag in flags), f"Leave it out. See kdcache {verb} --help"
                ),
            )
        if isinstance(value, dict):
            raise RecipeError(
                f"[{key}] in {path} is a single table, but there may be several",
                fix=f"Write [[{key}]] above each table.",
            )
        if getattr(flags[name], "multiple", False) and not isinstance(value, list):
            value = [value]
        line = to_line if name == "stream" else term_line
        values[name] = (
            [line(table) if isinstance(table, dict) else table for table in value] if isinstance(value, list) else value
        )
    untyped: frozenset[str] = context.meta.get(UNTYPED, frozenset())
    context.meta[UNTYPED] = untyped | values.keys() if resolved else untyped - values.keys()
    context.meta[COPIED] = frozenset(values) if resolved else frozenset()
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _load_preset(context: typer.Context, name: str | None) -> str | None:
    """Use the settings of a preset as defaults of flags. Flags in the command and in a recipe have priority."""
    if name is None or context.resilient_parsing:
        return name
    begun = dict(context.default_map or {})
    values = {setting: value for setting, value in read_preset(name).items() if setting not in begun}
    context.meta[UNTYPED] = context.meta.get(UNTYPED, frozenset()) | values.keys()
    context.default_map = {**values, **begun}
    return name


Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        callback=_load_recipe,
        is_eager=True,
        help="TOML file with these flags as keys; a flag given here wins.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        callback=_load_preset,
        is_eager=True,
        autocompletion=lambda incomplete: [name for name in preset_names() if name.startswith(incomplete)],
        help=f"Settings by a name: {', '.join(preset_names())}.",
    ),
]
Data = Annotated[str, flag(DataSettings, "data")]
OptionalData = Annotated[str | None, flag(SourceSettings, "data")]
Split = Annotated[str, flag(ImageSettings, "split")]
Size = Annotated[str | None, flag(ImageSettings, "size")]
Fit = Annotated[str, flag(ImageSettings, "fit")]
SlidingWindow = Annotated[str | None, flag(JudgeSettings, "window")]
Stride = Annotated[str | None, flag(JudgeSettings, "stride")]
Device = Annotated[str, flag(MachineSettings, "device")]
Threads = Annotated[int, flag(MachineSettings, "threads")]
Worker = Annotated[
    str | None,
    typer.Option(
        "--worker",
        metavar="I/N",
        help="Number I of N processes, from 0. auto: as the scheduler says.",
    ),
]
TakeOver = Annotated[
    bool,
    typer.Option("--take-over", help="Then write the shards that other workers have not finished."),
]
Fold = Annotated[
    str | None,
    typer.Option("--fold", metavar="I/K", help="Only fold I of K, from 0, which a training left out."),
]
FoldsBy = Annotated[
    str | None,
    typer.Option("--folds-by", metavar="PATTERN", help="Of the folds of sequences that train --folds-by made."),
]
CacheDir = Annotated[str | None, flag(CopySettings, "cache_dir")]
CacheBytes = Annotated[str | None, flag(CopySettings, "cache_bytes")]
