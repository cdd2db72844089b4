"""`kdcache train-teacher`: a model on labels alone."""

from typing import Any

import typer

from kdcache.settings import names
from kdcache.settings.training import LOGGING, OPTIMIZATION, TRAINING
from kdcache_cli.help import common
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.signature import takes
from kdcache_cli.training import Out, Resume, run_training

_ORDER = (
    "context",
    *("model", "out", "init", "name", "resume", "recipe"),
    *("data", "split", "val", "val_split", "stream", "size", "fit"),
    *names(*TRAINING, panel=OPTIMIZATION),
    *("term", "label_smoothing", "focal_gamma", "class_weights"),
    *("scale", "flip", "jitter", "mix", "labels_from", "limit_samples", "fold", "val_fold", "folds_by"),
    *names(*TRAINING, panel=LOGGING),
    *("amp", "step", "workers", "threads", "device"),
)

_TERM = "One more term on labels, e.g. dice,weight=0.5. May be repeated."
_VAL = "Labelled data to validate on (default: --data)."
_STREAM = "One of several data sets: NAME,data=DIR,share=0.5. May be repeated."
_WORDING = {"term": {"help": _TERM}, "val": {"help": _VAL}, "stream": {"help": _STREAM}}


@common(
    *("data", "model", "out", "val", "size", "stream", "init", "term", "class_weights"),
    *("iterations", "batch_size", "lr", "scale", "flip", "mix", "seed", "device", "threads", "resume", "recipe"),
)
@takes(*TRAINING, order=_ORDER, wording=_WORDING)
def train_teacher(
    settings: dict[str, Any],
    context: typer.Context,
    out: Out,
    resume: Resume = False,
    recipe: shared_flags.Recipe = None,
) -> None:
    """Train a model on labels only: the teacher, or a baseline.

    Trains with random scale, crop, flip and colour jitter. Validates by mIoU at the
    labels' own size. Keeps the best and the last weights.

    [dim]kdcache train-teacher --data camvid --model kdcache:base --size 288x384 --iterations 8000 --out runs/teacher[/]
    """
    val = settings["val"] or settings["data"]
    run_training({**settings, "verb": "train-teacher", "val": val}, context, out, resume)
