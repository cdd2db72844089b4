"""The command to run after a check of a data set."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

from kdcache.data.checks.check import CheckReport
from kdcache.data.layouts.base import VALIDATION
from kdcache.data.layouts.registry import LAYOUTS, convert_command

MOST_SIDE, MULTIPLE = 384, 32
"""The shorter side of the images that are suggested, at most, and what both sides are multiples of."""


def next_step(report: CheckReport) -> str:
    """Return one line that names the user's next step after a check: fixing problems, or a `kdcache` command to run."""
    data = shlex.quote(report.data)
    if report.problems:
        return (
            f"fix the {'problem' if len(report.problems) == 1 else 'problems'} above, then: kdcache data check {data}"
        )
    labelled = {name for name, split in report.splits.items() if split.labelled or split.depth.labelled}
    if not labelled:
        feature_flags = "" if report.classes.names else " --features-only --features TAP --size HxW"
        return f"kdcache build-teacher-cache --data {data} --teacher RUN{feature_flags} --out {_name(report)}.zarr"
    if report.layout in LAYOUTS and not LAYOUTS[report.layout].live:
        return convert_command(report.data)
    if "train" not in labelled:
        return f"kdcache evaluate RUN --data {data} --split {min(labelled)}"
    classes = any(split.labelled for split in report.splits.values())
    model = "kdcache:base" if classes else "kdcache:base+depth"
    folds = "" if labelled & {*VALIDATION} else " --fold 0/5 --val-split train --val-fold 0/5"
    return (
        f"kdcache train-teacher --data {data} --model {model} --size {suggested_size(report)}{folds} --out runs/teacher"
    )


def suggested_size(report: CheckReport) -> str:
    """Return a training size for the checked data set as text, such as "288x384" (height x width).

    It is the most frequent image size among the images of split "train" with the most frequent aspect ratio. A size
    with a shorter side above 384 is scaled down to 384. Both sides are then rounded to multiples of 32. The result is
    "HxW" if no image of split "train" could be read.
    """
    shapes: dict[float, Counter[tuple[int, int]]] = {}
    for size, images in report.splits["train"].sizes.items():
        height, width = map(int, size.split("x"))
        shapes.setdefault(round(height / width, 1), Counter())[height, width] += images
    if not shapes:
        return "HxW"
    ((height, width), _), *_ = max(shapes.values(), key=Counter.total).most_common(1)
    scale = min(1.0, MOST_SIDE / min(height, width))
    return "x".join(str(max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE)) for side in (height, width))


def _name(report: CheckReport) -> str:
    return shlex.quote(Path(report.folder or report.data).name or "data")
