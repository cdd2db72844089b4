"""Flags of a build, as build-teacher-cache and plan share them: teachers, views, what is stored."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.progress import note_line
from kdcache.settings import names, read, read_values
from kdcache.settings.building import STORED, VIEWS, BuildSettings, TeacherSettings
from kdcache.settings.shared import DataSettings, ImageSettings, MachineSettings
from kdcache_cli.console import ERRORS

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.data import Split
    from kdcache.teacher import BuildOptions
    from kdcache.teacher import Teacher as LoadedTeacher

SHORTER = {"scale": "view-scale", "flip": "view-flip", "no-flip": "no-view-flip"}
"""Other names of the flags of views; a training has flags of these names for what it draws."""
ALSO_SHORTER = {"token_normalize_func": lambda token: SHORTER.get(token, token)}
Out = Annotated[
    str, typer.Option("--out", help="Store to write, a folder or s3://BUCKET/PREFIX; an interrupted one is continued.")
]
ORDER = (
    *("teacher_weights", "tta", "folds", "folds_by", "teacher_size", "teacher_grid", "class_map", "mean", "std"),
    "precision",
    *names(BuildSettings, panel=STORED),
    *names(BuildSettings, panel=VIEWS),
    *("batch_size", "render_threads"),
)
"""Flags that build-teacher-cache and plan share, by their panels."""
COMMON = (
    *("data", "teacher", "out", "split", "size", "fit", "tta", "top_k", "features", "statistics", "pixels", "codec"),
    *("views", "crop", "view_scale", "batch_size", "threads", "device"),
)
"""Those of them that -h shows."""


def prepare(settings: Mapping[str, Any], out: str | None = None) -> "tuple[Split, LoadedTeacher, BuildOptions]":
    """The split, the teacher and the options of a build, from the settings that build-teacher-cache and plan share.

    Args:
        out: the store; None where none is written.
    Raises: RecipeError without a size, where the teachers have none of their own.
    """
    from kdcache.data import open_split
    from kdcache.verbs.build import check_views, plan_build

    check_views(settings)
    images, teacher = read(ImageSettings, settings), read(TeacherSettings, settings)
    options = read_values(settings, BuildSettings)
    source = open_split(read(DataSettings, settings).data, images.split)
    values = {
        **vars(read(MachineSettings, settings)),
        **vars(teacher),
        **options,
        "size": images.size,
        "fit": images.fit,
    }
    return plan_build(source, teacher.teacher, values, out, lambda note: ERRORS.print(note_line(note), markup=False))
