"""Flags of a build, as build-teacher-cache and extend share them: teachers, views, what is stored."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcache.errors import RecipeError

_Option = typer.Option
teacher_option = partial(typer.Option, rich_help_panel="What the teacher looks at")
view_option = partial(typer.Option, rich_help_panel="Views of an image")
store_option = partial(typer.Option, rich_help_panel="What is stored")
Teachers = Annotated[
    list[str],
    _Option(
        "--teacher",
        help="A run folder, SPEC@FILE (weights trained elsewhere) or SPEC@default (downloads). Given several times, "
        "all speak together: the mean of their probabilities.",
    ),
]
Out = Annotated[
    str, _Option("--out", help="Store to write, a folder or s3://BUCKET/PREFIX; an interrupted one is continued.")
]
ClassMap = Annotated[
    Path | None, teacher_option("--class-map", help="Which class of the data each teacher class becomes.")
]
Views = Annotated[
    str | None,
    view_option(
        "--views",
        metavar="N|full",
        help="Per sample: the whole image (full, or 1) and seeded crops of it, for replay; with --crop, crops alone.",
    ),
]
ViewSeed = Annotated[int | None, view_option("--view-seed", min=0, help="Of the crops.")]
ViewScale = Annotated[
    str | None,
    view_option(
        "--view-scale",
        metavar="LOW:HIGH",
        help="Zoom of the crops: 2 shows a quarter of the image, 0.5 all of it at half its size amid grey, which "
        "teaches nothing.",
    ),
]
ViewFlip = Annotated[
    bool | None,
    view_option("--view-flip/--no-view-flip", help="Mirror half of the crops.", show_default=False),
]
Statistics = Annotated[
    str,
    store_option(
        "--statistics",
        help="Comma-separated maps to store: at:TAP (attention), confidence, entropy, agreement (of several teachers).",
    ),
]
RenderThreads = Annotated[
    int | None,
    _Option("--render-threads", min=0, help="Threads that decode and resize (default: the cores, at most 8)."),
]


def view_options(
    views: str | None, seed: int | None, scale: str | None, flip: bool | None, crop: str | None = None
) -> dict[str, Any]:
    """Options of a build; what is None is left out."""
    chosen = {"views": _views(views, crop), "view_seed": seed, "view_scale": _scale(scale), "view_flip": flip}
    return {name: value for name, value in chosen.items() if value is not None}


def comma_separated(text: str) -> tuple[str, ...]:
    """The words of a list, once each."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _views(text: str | None, crop: str | None) -> int | None:
    if text is None:
        return None
    if text == "full" and crop is None:
        return 1
    if not text.isdecimal() or not int(text):
        raise RecipeError(
            "--views is a number of views per sample, from 1, or full for the whole image, which is no crop",
            received=f"--views {text}" + (f" --crop {crop}" if crop else ""),
            remedy="for instance --views 4",
        )
    return int(text)


def _scale(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise RecipeError(
            "--view-scale is LOW:HIGH, 1 for the whole image at --size",
            received=repr(text),
            remedy="for instance --view-scale 1:2",
        ) from error
    return low, high


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """'2,1' as (2.0, 1.0)."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(
            "--teacher-weights is one number per teacher, with commas between",
            received=repr(text),
            remedy="for instance --teacher-weights 2,1",
        ) from error


def parse_top_k(text: str) -> int | None:
    """A number of classes, or None for auto."""
    if text == "auto":
        return None
    if not text.isdigit():
        raise RecipeError("--top-k is auto or a number of classes", received=repr(text), remedy="use --top-k auto")
    return int(text)
