"""The tables of a build: build-teacher-cache, plan, extend and `BuildOptions` are made from them."""

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from kdcache.settings.setting import Setting
from kdcache.settings.shared import FOLDS_BY, DataSettings, ImageSettings, MachineSettings
from kdcache.settings.spelling import Colour, Count, Numbers, Size, TopK, Views, Words, Zoom

VIEWS = "Views of an image"
STORED = "What is stored"

_teacher = partial(Setting, panel="Teacher")
_view = partial(Setting, panel=VIEWS)
_stored = partial(Setting, panel=STORED)


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """The teacher of a build: one model, an ensemble, or one per fold."""

    teacher: Annotated[
        tuple[str, ...],
        Setting(
            "A run folder, RUN@best-ema, SPEC@FILE (weights from elsewhere) or SPEC@default (downloads). Given several "
            "times, they are an ensemble: the mean of their probabilities.",
            repeated=True,
        ),
    ]
    teacher_weights: Annotated[
        Numbers | None, _teacher("Weights of several teachers (default: equal).", metavar="W,W")
    ] = None
    tta: Annotated[
        str | None,
        _teacher(
            "Targets are the mean over mirrored and rescaled images, e.g. flip,scales=0.75:1:1.25.",
            metavar="WORDS",
        ),
    ] = None
    folds: Annotated[
        int | None,
        _teacher(
            "Cross-fitting: of K teachers, number I was trained with --fold I/K and predicts fold I, which it "
            "has not seen."
        ),
    ] = None
    folds_by: Annotated[str | None, _teacher(FOLDS_BY, metavar="PATTERN")] = None
    class_map: Annotated[Path | None, _teacher("Which class of the data each teacher class becomes.")] = None
    mean: Annotated[Colour | None, _teacher("Normalisation, if not the model's own.", metavar="R,G,B")] = None
    std: Annotated[Colour | None, _teacher("Normalisation, if not the model's own.", metavar="R,G,B")] = None


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Which views a build renders and what it stores; `kdcache.teacher.BuildOptions` documents each field."""

    teacher_size: Annotated[
        Size | None, _teacher("Size of the teacher's input for the same window; free in training.", metavar="HxW")
    ] = None
    teacher_grid: Annotated[
        Literal["own", "view"],
        _teacher(
            "own: targets on the grid that comes of --teacher-size and --tta. view: averaged to that of the view, "
            "which takes no more room than without them."
        ),
    ] = "own"
    precision: Annotated[Literal["float32", "bf16", "fp16"], _teacher("float32, bf16 or fp16.")] = "float32"

    top_k: Annotated[
        TopK | None, _stored("Classes kept per pixel: auto (all up to 32, else as many as it takes) or a number.")
    ] = None
    features: Annotated[Words, _stored("Comma-separated taps to store; see kdcache models.")] = ()
    statistics: Annotated[
        Words,
        _stored(
            "Comma-separated maps to store: at:TAP (attention), confidence, entropy, agreement (of several teachers)."
        ),
    ] = ()
    raw_logits: Annotated[bool, _stored("Keep every pixel's largest logit too, for terms over positions (cwd).")] = (
        False
    )
    pixels: Annotated[
        Literal["stored", "source"],
        _stored("stored: images and labels go into the store, which then needs no data set; or source."),
    ] = "stored"
    codec: Annotated[
        Literal["default", "small", "none"],
        _stored(
            "default: lz4, float16 as it is. small: targets rounded to 5 bits of mantissa, zstd; half the bytes "
            "of targets, 3 to 5 times the CPU per read, gradients off by 1 to 3 % (more for a student very near its "
            "teacher). none: uncompressed; a quarter more, a third of the CPU. The build measures what storing loses."
        ),
    ] = "default"
    shard_records: Annotated[int, Ge(1), Le(65536), _stored("Records per shard file.", ranged=True)] = 64

    views: Annotated[
        Views,
        _view(
            "Per sample: the whole image (full, or 1) and seeded crops of it, for replay; with --crop, crops alone. "
            "full takes a quarter of the time and bytes of 4, but students then see crops without targets of their "
            "own: those of the whole image are moved.",
            metavar="N|full",
        ),
    ] = 4
    crop: Annotated[
        Size | None,
        _view(
            "Views are crops of so many pixels out of the image at zoom times --size (default: views of --size).",
            metavar="HxW",
        ),
    ] = None
    view_seed: Annotated[int, Ge(0), _view("Seed of the crops.", ranged=True)] = 0
    view_scale: Annotated[
        Zoom,
        _view(
            "Zoom of the crops: 2 shows a quarter of the image, 0.5 all of it at half its size amid grey, which "
            "teaches nothing.",
            metavar="LOW:HIGH",
        ),
    ] = (1.0, 2.0)
    view_flip: Annotated[bool, _view("Mirror half of the crops.", default_shown=False)] = True

    batch_size: Annotated[Count, Setting("Images per forward pass.", ranged=True)] = 8
    render_threads: Annotated[
        int,
        Ge(0),
        Setting("Threads that decode and resize (default: the cores, at most 8).", ranged=True, automatic=True),
    ] = field(default_factory=lambda: min(8, os.cpu_count() or 1))


BUILD = (DataSettings, ImageSettings, TeacherSettings, BuildSettings, MachineSettings)
"""All tables of a build."""
