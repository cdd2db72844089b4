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
        "Number K of folds: each teacher predicts the fold it left out.",
    )
    folds_by: str | None = _teacher(None, FOLDS_BY, metavar="PATTERN")
    class_map: Path | None = _teacher(None, "File with the data's class for each class of the teacher.")
    mean: Colour | None = _teacher(None, "Mean that normalises colours (default: the model's).", metavar="R,G,B")
    std: Colour | None = _teacher(None, "Deviation that normalises colours (default: the model's).", metavar="R,G,B")


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Settings for the views that a build renders, and for what it stores. Each field is a flag.

    `kdcache.teacher.BuildOptions` documents the fields.
    """

    teacher_size: Size | None = _teacher(
        None, "Size at which the teacher sees each view (default: the view's).", metavar="HxW"
    )
    teacher_grid: Literal["own", "view"] = _teacher(
        "own",
        "Grid of stored logits: the teacher's own, or averaged to the view's.",
    )
    precision: Literal["float32", "bf16", "fp16"] = _teacher(
        "float32", "Precision of the teacher's forward pass: float32, bf16 or fp16."
    )

    top_k: TopK | None = _stored(None, "Classes stored per pixel, or auto (all, if at most 32).")
    heads: Words = _stored(
        (),
        "Comma-separated heads of the teacher to store (default: all trained heads).",
    )
    features_only: bool = _stored(False, "Store only the taps of --features, without a head.")
    features: Words = _stored((), "Comma-separated taps whose features are stored; kdcache models lists taps.")
    feature_dtype: Literal["fp16", "uint8"] = _stored(
        "fp16", "Type of stored features: fp16, or uint8 with half the bytes."
    )
    statistics: Words = _stored(
        (), "Comma-separated statistics of taps: at:TAP (attention), similarity:TAP (between tokens)."
    )
    raw_logits: bool = _stored(False, "Also store every pixel's largest logit, which the term cwd needs.")
    pixels: Literal["stored", "source"] = _stored(
        "stored", "stored: the cache holds images and labels. source: only --data does."
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
        "Size of views cut from the zoomed image (default: views of --size).",
        metavar="HxW",
    )
    view_seed: Annotated[int, Ge(0)] = _view(0, "Seed of the crops.", ranged=True)
    view_scale: Zoom | None = _view(
        None,
        "Range of the crops' zoom (default: 1:2, with metric depth 1:1).",
        metavar="LOW:HIGH",
    )
    depth_zoom: Literal["none", "divide", "keep"] = _view(
        "none",
        "Metres in zoomed views: divide by the zoom, keep, none (no zoom).",
    )
    view_flip: bool = _view(True, "Mirror half of the crops, left to right.", default_shown=False)

    batch_size: Count = setting(8, "Images per forward pass.", ranged=True)
    render_threads: Annotated[int, Ge(0)] = setting(
        min(8, os.cpu_count() or 1),
        "Threads that decode and resize (default: the cores, at most 8).",
        ranged=True,
        automatic=True,
    )


BUILD = (DataSettings, ImageSettings, TeacherSettings, BuildSettings, MachineSettings)
"""All tables of a build."""
