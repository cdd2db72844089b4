"""Flags of a build, as build-teacher-cache and extend share them: teachers, views, what is stored."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.errors import RecipeError
from kdcache_cli import options
from kdcache_cli.console import ERRORS

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.data import Split
    from kdcache.teacher import BuildOptions
    from kdcache.teacher import Teacher as LoadedTeacher

_Option = typer.Option
teacher_option = partial(typer.Option, rich_help_panel="What the teacher looks at")
view_option = partial(typer.Option, rich_help_panel="Views of an image")
store_option = partial(typer.Option, rich_help_panel="What is stored")
SHORTER = {"scale": "view-scale", "flip": "view-flip", "no-flip": "no-view-flip"}
"""What options of views are also called: at training, these names are of what is drawn there."""
ALSO_SHORTER = {"token_normalize_func": lambda token: SHORTER.get(token, token)}
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
        help="Per sample: the whole image (full, or 1) and seeded crops of it, for replay; with --crop, crops alone. "
        "full takes a quarter of the time and bytes of 4, but students then see crops of which the teacher said "
        "nothing: what it said of the whole is moved.",
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


def prepare(given: dict[str, Any]) -> "tuple[Split, LoadedTeacher, BuildOptions]":
    """What a build works on, from the flags that build-teacher-cache and plan share, by name."""
    import torch

    from kdcache.data import open_split
    from kdcache.models import Tta
    from kdcache.teacher import BuildOptions, check_cross_fit, load_teachers
    from kdcache.train import pick_device

    flags = SimpleNamespace(**given)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    source = open_split(flags.data, flags.split)
    loaded = load_teachers(
        flags.teacher,
        source.classes,
        weights=parse_weights(flags.teacher_weights),
        tta=None if flags.tta is None else Tta.parse(flags.tta),
        folds=flags.folds,
        class_map=flags.class_map,
        mean=options.parse_rgb(flags.mean, "--mean"),
        std=options.parse_rgb(flags.std, "--std"),
    )
    if flags.folds is not None:
        check_cross_fit(flags.teacher, source)
    for note in loaded.notes:
        ERRORS.print(f"note: {note}", markup=False)
    chosen = options.parse_size(flags.size) or loaded.size
    if chosen is None:
        raise RecipeError(
            "teachers that are no run of kdcache, or runs of several sizes, need the size of their images",
            received="no --size",
            remedy="add --size HxW, for instance --size 288x384",
        )
    threads = {} if flags.render_threads is None else {"render_threads": flags.render_threads}
    return (
        source,
        loaded,
        BuildOptions(
            size=chosen,
            top_k=parse_top_k(flags.top_k),
            features=comma_separated(flags.features),
            statistics=comma_separated(flags.statistics),
            raw_logits=flags.raw_logits,
            crop=options.parse_size(flags.crop, "--crop"),
            teacher_size=options.parse_size(flags.teacher_size, "--teacher-size"),
            teacher_grid=options.one_of("--teacher-grid", flags.teacher_grid, ("own", "view")),  # type: ignore[arg-type]
            **view_options(flags.views, flags.view_seed, flags.view_scale, flags.view_flip, flags.crop),
            pixels=options.one_of("--pixels", flags.pixels, ("stored", "source")),  # type: ignore[arg-type]
            codec=options.one_of("--codec", flags.codec, ("default", "small", "none")),  # type: ignore[arg-type]
            batch_size=flags.batch_size,
            shard_records=flags.shard_records,
            precision=options.one_of("--precision", flags.precision, ("float32", "bf16", "fp16")),  # type: ignore[arg-type]
            device=pick_device(flags.device),
            **threads,
        ),
    )
