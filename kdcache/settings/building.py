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
    """Settings for the teacher of a build: one model, an ensemble, or a model for each fold. Each field is a flag."""

    teacher: tuple[str, ...] = setting(
        REQUIRED,
        "RUN, RUN@best-ema, SPEC@FILE or SPEC@default. Repeat it for an ensemble.",
        repeated=True,
    )
    teacher_weights: Numbers | None = _teacher(None, "Weights of several teachers (default: equal).", metavar="W,W")
    tta: str | None = _teacher(
        None, "Targets are the mean over mirrored and rescaled images, e.g. flip,scales=0.75:1:1.25.", metavar="WORDS"
    )
    folds: int | None = _teacher(
        None,
        "Cross-fitting: teacher I predicts fold I of K, which it left out.",
    )
    folds_by: str | None = _teacher(None, FOLDS_BY, metavar="PATTERN")
    class_map: Path | None = _teacher(None, "Which class of the data each teacher class becomes.")
    mean: Colour | None = _teacher(None, "Normalisation, if not the model's own.", metavar="R,G,B")
    std: Colour | None = _teacher(None, "Normalisation, if not the model's own.", metavar="R,G,B")


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Settings for the views that a build renders, and for what it stores. Each field is a flag.

    `kdcache.teacher.BuildOptions` documents the fields.
    """

    teacher_size: Size | None = _teacher(
        None, "Size of the teacher's input for the same window; free in training.", metavar="HxW"
    )
    teacher_grid: Literal["own", "view"] = _teacher(
        "own",
        "own: native grid of --teacher-size and --tta. view: averaged to the view's.",
    )
    precision: Literal["float32", "bf16", "fp16"] = _teacher("float32", "float32, bf16 or fp16.")

    top_k: TopK | None = _stored(None, "Classes kept per pixel: a number, or auto (all up to 32).")
    heads: Words = _stored(
        (),
        "Heads to store, separated by commas (default: all that it learnt).",
    )
    features_only: bool = _stored(False, "Store only the taps of --features, without a head.")
    features: Words = _stored((), "Comma-separated taps to store; see kdcache models.")
    feature_dtype: Literal["fp16", "uint8"] = _stored(
        "fp16", "fp16, or uint8 at half the bytes. Docs: Choose what to store."
    )
    statistics: Words = _stored((), "Comma-separated at:TAP (attention) or similarity:TAP (between tokens).")
    raw_logits: bool = _stored(False, "Keep every pixel's largest logit too, for terms over positions (cwd).")
    pixels: Literal["stored", "source"] = _stored(
        "stored", "stored: images and labels go into the cache. source: they stay outside."
    )
    codec: Literal["default", "small", "none"] = _stored(
        "default",
        "default: lz4. small: rounded targets in zstd, half the bytes. none: uncompressed.",
    )
    shard_records: Annotated[int, Ge(1), Le(65536)] = _stored(64, "Records per shard file.", ranged=True)

    views: Views = _view(
        4,
        "Views per sample: the whole image, then seeded crops. full: one view.",
        metavar="N|full",
    )
    crop: Size | None = _view(
        None,
        "Cut views of this size from the zoomed image (default: --size).",
        metavar="HxW",
    )
    view_seed: Annotated[int, Ge(0)] = _view(0, "Seed of the crops.", ranged=True)
    view_scale: Zoom | None = _view(
        None,
        "Zoom of the crops (default: 1:2, or 1:1 with metric depth).",
        metavar="LOW:HIGH",
    )
    depth_zoom: Literal["none", "divide", "keep"] = _view(
        "none",
        "Metric depth in zoomed views: none zooms nothing, divide or keep metres.",
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
