"""`kdcache train-student`: a model from a cache."""

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
    """Train a student from a cache, without loading or running the teacher.

    --method none trains on labels only. It sees the same pixels in the same order, so
    the two runs differ only in the targets. --teacher labels is the control: the same
    terms learn from the labels.

    Several processes share every batch and train the same student as one process:
    torchrun --nproc-per-node 2 -m kdcache_cli train-student and the same flags.

    [dim]kdcache train-student --cache camvid.zarr --model kdcache:tiny --val camvid --out runs/student[/]
    """
    run_training({**settings, "verb": "train-student"}, context, out, resume)
