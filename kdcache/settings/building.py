"""The tables of a build: build-teacher-cache, plan and `BuildOptions` are made from them."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from kdcache.settings.parse import Colour, Count, Numbers, Size, TopK, Views, Words, Zoom
from kdcache.settings.setting import REQUIRED, setting
from kdcache.settings.shared import FOLDS_BY, DataSettings, ImageSettings, MachineSettings

VIEWS = "Views of an image"
STORED = "What is stored"

_teacher = partial(setting, panel="Teacher")
_view = partial(setting, panel=VIEWS)
_stored = partial(setting, panel=STORED)


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """The teacher of a build: one model, an ensemble, or one per fold."""

    teacher: tuple[str, ...] = setting(
        REQUIRED,
        "A run folder, RUN@best-ema, SPEC@FILE (weights from elsewhere) or SPEC@default (downloads). Given several "
        "times, they are an ensemble: the mean of their probabilities. HEAD=TEACHER takes that head from a teacher of "
        "its own, such as depth=runs/depth.",
        repeated=True,
    )
    teacher_weights: Numbers | None = _teacher(None, "Weights of several teachers (default: equal).", metavar="W,W")
    tta: str | None = _teacher(
        None, "Targets are the mean over mirrored and rescaled images, e.g. flip,scales=0.75:1:1.25.", metavar="WORDS"
    )
    folds: int | None = _teacher(
        None,
        "Cross-fitting: of K teachers, number I was trained with --fold I/K and predicts fold I, which it "
        "has not seen.",
    )
    folds_by: str | None = _teacher(None, FOLDS_BY, metavar="PATTERN")
    class_map: Path | None = _teacher(None, "Which class of the data each teacher class becomes.")
    mean: Colour | None = _teacher(None, "Normalisation, if not the model's own.", metavar="R,G,B")
    std: Colour | None = _teacher(None, "Normalisation, if not the model's own.", metavar="R,G,B")


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Which views a build renders and what it stores; `kdcache.teacher.BuildOptions` documents each field."""

    teacher_size: Size | None = _teacher(
        None, "Size of the teacher's input for the same window; free in training.", metavar="HxW"
    )
    teacher_grid: Literal["own", "view"] = _teacher(
        "own",
        "own: targets on the grid that comes of --teacher-size and --tta. view: averaged to that of the view, "
        "which takes no more room than without them.",
    )
    precision: Literal["float32", "bf16", "fp16"] = _teacher("float32", "float32, bf16 or fp16.")

    top_k: TopK | None = _stored(
        None, "Classes kept per pixel: auto (all up to 32, else as many as it takes) or a number."
    )
    heads: Words = _stored(
        (),
        "Comma-separated heads of the teacher to store, such as segmentation,depth (default: all that it has learnt).",
    )
    features_only: bool = _stored(False, "Store no head, but the taps of --features alone.")
    features: Words = _stored((), "Comma-separated taps to store; see kdcache models.")
    statistics: Words = _stored((), "Comma-separated attention maps to store, as at:TAP.")
    raw_logits: bool = _stored(False, "Keep every pixel's largest logit too, for terms over positions (cwd).")
    pixels: Literal["stored", "source"] = _stored(
        "stored", "stored: images and labels go into the store, which then needs no data set; or source."
    )
    codec: Literal["default", "small", "none"] = _stored(
        "default",
        "default: lz4, float16 as it is. small: targets rounded to 5 bits of mantissa, zstd; half the bytes "
        "of targets, 3 to 5 times the CPU per read, gradients off by 1 to 3 % (more for a student very near its "
        "teacher). none: uncompressed; a quarter more, a third of the CPU. The build measures what storing loses.",
    )
    shard_records: Annotated[int, Ge(1), Le(65536)] = _stored(64, "Records per shard file.", ranged=True)

    views: Views = _view(
        4,
        "Per sample: the whole image (full, or 1) and seeded crops of it, for replay; with --crop, crops alone. "
        "full takes a quarter of the time and bytes of 4, but students then see crops without targets of their "
        "own: those of the whole image are moved.",
        metavar="N|full",
    )
    crop: Size | None = _view(
        None,
        "Views are crops of so many pixels out of the image at zoom times --size (default: views of --size).",
        metavar="HxW",
    )
    view_seed: Annotated[int, Ge(0)] = _view(0, "Seed of the crops.", ranged=True)
    view_scale: Zoom | None = _view(
        None,
        "Zoom of the crops: 2 shows a quarter of the image, 0.5 all of it at half its size amid grey, which "
        "teaches nothing (default: 1:2; with depth in metres 1:1).",
        metavar="LOW:HIGH",
    )
    depth_zoom: Literal["none", "divide", "keep"] = _view(
        "none",
        "Labels of depth in a zoomed view: none zooms no view, divide divides metres by the zoom, as what is twice as "
        "large looks half as far; or keep them.",
    )
    view_flip: bool = _view(True, "Mirror half of the crops.", default_shown=False)

    batch_size: Count = setting(8, "Images per forward pass.", ranged=True)
    render_threads: Annotated[int, Ge(0)] = setting(
        min(8, os.cpu_count() or 1),
        "Threads that decode and resize (default: the cores, at most 8).",
        ranged=True,
        automatic=True,
    )


BUILD = (DataSettings, ImageSettings, TeacherSettings, BuildSettings, MachineSettings)
"""All tables of a build."""
