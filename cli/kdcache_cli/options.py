"""Flags that several verbs share, and recipe files as their defaults."""

import difflib
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.errors import RecipeError
from kdcache.settings import entries
from kdcache.settings.spelling import parse_bytes
from kdcache.settings.training import TRAINING

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for zarr
    from kdcache.store.place import Place


def parse_size(text: str | None, flag: str = "--size") -> tuple[int, int] | None:
    """'288x384' as (288, 384): height, then width."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RecipeError(
            f"{flag} is HEIGHTxWIDTH in pixels", received=repr(text), remedy=f"for instance {flag} 288x384"
        )
    return int(parts[0]), int(parts[1])


def parse_rgb(text: str | None, flag: str) -> tuple[float, float, float] | None:
    """'0.485,0.456,0.406' as three floats."""
    if text is None:
        return None
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(
            f"{flag} is three numbers for R,G,B in 0..1", received=repr(text), remedy=f"for instance {flag} 0.5,0.5,0.5"
        ) from error
    return red, green, blue


def parse_numbers(text: str, flag: str) -> tuple[int, ...]:
    """'0,1,2' as three whole numbers from 0, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise RecipeError(
            f"{flag} is whole numbers from 0, with commas between",
            received=repr(text),
            remedy=f"for instance {flag} 0,1",
        )
    return tuple(dict.fromkeys(map(int, words)))


def one_of(flag: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value`, when it is one of those allowed."""
    if value not in allowed:
        raise RecipeError(
            f"{flag} is one of {', '.join(allowed)}", received=repr(value), remedy=f"use {flag} {allowed[0]}"
        )
    return value


def open_place(store: str, cache_dir: str | None, cache_bytes: str | None) -> "Place":
    """Where a store is, with the folder for copies when that is elsewhere."""
    from kdcache.store.backend.open import open_place

    return open_place(store, None if cache_dir is None else Path(cache_dir), parse_bytes(cache_bytes))


def _load_recipe(context: typer.Context, path: Path | None) -> Path | None:
    """Let the keys of a TOML file stand for flags that are not given: the flag wins."""
    if path is None:
        return None
    try:
        recipe: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(
            "a recipe is a TOML file whose keys are the flags", received=f"{path}: {error}", remedy="correct the file"
        ) from error
    # A run's own recipe names its verb and every setting there is, also those that this verb has no flag for.
    resolved = "verb" in recipe
    verb = recipe.pop("verb", context.info_name)
    if verb != context.info_name:
        raise RecipeError(
            "a recipe is used with its own verb",
            received=f"{path} is for {verb}, the command is {context.info_name}",
            remedy=f"run kdcache {verb} --recipe {path}",
        )
    known = {parameter.name for parameter in context.command.params if parameter.name}
    values = {}
    for key, value in recipe.items():
        name = key.replace("-", "_")
        if name not in known:
            if resolved and name in entries(*TRAINING):
                continue
            near = difflib.get_close_matches(name, known, n=1)
            raise RecipeError(
                "a recipe's keys are the verb's flags",
                received=f"{key!r} in {path}",
                remedy=f"did you mean {near[0].replace('_', '-')!r}?" if near else f"see kdcache {verb} --help",
            )
        values[name] = list(map(_one_line, value)) if isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _one_line(table: Any) -> Any:
    """A table of a recipe, such as [[term]], as its flag takes it: the kind first, then the options."""
    if not isinstance(table, dict):
        return table
    options = [f"{key.replace('-', '_')}={value}" for key, value in table.items() if key != "kind"]
    return ",".join([str(table.get("kind", "")), *options])


Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        callback=_load_recipe,
        is_eager=True,
        help="TOML file with these flags as keys; a flag given here wins.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Data folder: your own, CamVid, VOC, Cityscapes, GTA5 or ADE20K (found by what lies in it, or named as in "
        "[bold]voc:DIR[/]); or [bold]scenes[/] for the built-in procedural set.",
    ),
]
OptionalData = Annotated[
    str | None, typer.Option("--data", help="Data folder; needed for a store built with --pixels source.")
]
Split = Annotated[str, typer.Option("--split", help="Which split of it.")]
Size = Annotated[
    str | None, typer.Option("--size", metavar="HxW", help="Height and width of the pixels, e.g. 288x384.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads; 0 lets torch choose.")]
Worker = Annotated[
    str | None,
    typer.Option(
        "--worker",
        metavar="I/N",
        help="This process is number I, from 0, of N that write the store together, on any machines.",
    ),
]
CacheDir = Annotated[
    str | None,
    typer.Option(
        "--cache-dir",
        help="Where copies of a remote store's shards are kept (default: $KDCACHE_CACHE_DIR, or kdcache in your cache "
        "folder).",
    ),
]
CacheBytes = Annotated[
    str | None,
    typer.Option(
        "--cache-bytes",
        metavar="SIZE",
        help="How much they may take, e.g. 50GiB or 200MB; what was not used for longest makes room (default: half of "
        "what is free there).",
    ),
]
