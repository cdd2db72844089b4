"""Flags of a build, as build-teacher-cache and plan share them: teachers, views, what is stored."""

from typing import Annotated

import typer

from kdcache.settings import names
from kdcache.settings.building import STORED, VIEWS, BuildSettings

SHORTER = {"scale": "view-scale", "flip": "view-flip", "no-flip": "no-view-flip"}
"""Short names of flags for views. In a training, flags of these names are about the images that it draws."""
ALSO_SHORTER = {"token_normalize_func": lambda token: SHORTER.get(token, token)}
Out = Annotated[
    str, typer.Option("--out", help="Cache to write: a folder or s3://BUCKET/PREFIX. Continues an interrupted build.")
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
