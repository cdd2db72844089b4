"""`kdcache train-student`: a model from a store."""

from typing import Any

import typer

from kdcache.settings import names
from kdcache.settings.shared import MACHINE
from kdcache.settings.training import GATE, LOGGING, LOSS, OPTIMIZATION, PART, TRAINING, VIEW
from kdcache_cli.help import common
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.signature import takes
from kdcache_cli.training import Out, Resume, run_training

_PANELS = (LOSS, GATE, PART, VIEW, OPTIMIZATION, LOGGING, MACHINE)
_ORDER = (
    "context",
    *("model", "out", "init", "name", "resume", "preset", "recipe"),
    *("cache", "val", "val_split", "val_share", "data", "split", "stream", "size", "fit"),
    *(name for panel in _PANELS for name in names(*TRAINING, panel=panel)),
)


@common(
    *("cache", "model", "out", "val", "data", "size", "stream", "init"),
    *("method", "term", "temperature", "kl_weight"),
    *("iterations", "batch_size", "lr", "augment", "mix", "seed", "device", "threads", "resume", "preset", "recipe"),
)
@takes(*TRAINING, order=_ORDER)
def train_student(
    settings: dict[str, Any],
    context: typer.Context,
    out: Out,
    resume: Resume = False,
    preset: shared_flags.Preset = None,
    recipe: shared_flags.Recipe = None,
) -> None:
    """Train a student from a store: no teacher is loaded or run.

    With --method none the student sees identical pixels in identical order, so
    that two runs differ by the targets alone; with --teacher labels it learns by
    the same terms, from the labels.

    Several processes share every batch and train as one would: torchrun
    --nproc-per-node 2 -m kdcache_cli train-student and the same flags.

    [dim]kdcache train-student --cache camvid.zarr --model kdcache:tiny --val camvid --out runs/student[/]
    """
    run_training({**settings, "verb": "train-student"}, context, out, resume)
