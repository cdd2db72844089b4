"""`kdcache train-teacher` and `kdcache train-student`: one trainer, two doors."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kdcache.settings import names
from kdcache.settings.shared import DataSettings, ImageSettings, MachineSettings
from kdcache.settings.training import GATE, LOSS, OPTIMIZATION, PART, RUN, TRAINING, VIEW, TrainSettings
from kdcache_cli.console import ERRORS, OUT, progress_bar
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.signature import takes
from kdcache_cli.torchrun import shared_errors

Out = Annotated[Path, typer.Option("--out", help="Run folder: new, empty, or with --resume the run itself.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run in --out.")]
_TEACHER = (
    *("data", "model", "out", "size", "split", "val_split", "name", "init", "threads", "device", "resume", "recipe"),
    *names(TrainSettings, OPTIMIZATION),
    *("amp", "step", "workers", "val_every", "log_every", "gradients_every", "keep_every", "log"),
    *("class_weights", "scale", "flip", "jitter", "mix", "limit_samples", "fold", "val_fold"),
)
_STUDENT = (
    *("cache", "model", "out", "val", "val_split", "data", "split", "size", "name", "init"),
    *("cache_dir", "cache_bytes", "threads", "device", "resume", "recipe"),
    *(name for panel in (LOSS, GATE, PART, VIEW, OPTIMIZATION, RUN) for name in names(TrainSettings, panel)),
)


@takes(TrainSettings, DataSettings, ImageSettings, MachineSettings, order=_TEACHER)
def train_teacher(
    settings: dict[str, Any], out: Out, resume: Resume = False, recipe: shared_flags.Recipe = None
) -> None:
    """Train a model on labels alone: the teacher, or a baseline.

    Random scale, crop, flip and colour jitter; validated by mIoU at the labels'
    own size, best and last kept.

    [dim]kdcache train-teacher --data camvid --model kdcache:base --size 288x384 --iterations 8000 --out runs/teacher[/]
    """
    _train({**settings, "verb": "train-teacher", "val": settings["data"]}, out, resume)


@takes(*TRAINING, order=_STUDENT, required=("cache",))
def train_student(
    settings: dict[str, Any], out: Out, resume: Resume = False, recipe: shared_flags.Recipe = None
) -> None:
    """Train a student from a store: no teacher is loaded or run.

    With --method none the student sees identical pixels in identical order, so
    that two runs differ by what the teacher said alone.

    Several processes share every batch and train as one would: torchrun
    --nproc-per-node 2 -m kdcache_cli train-student and the same flags.

    [dim]kdcache train-student --cache camvid.zarr --model kdcache:tiny --val camvid --out runs/student[/]
    """
    _train({**settings, "verb": "train-student"}, out, resume)


def _train(settings: dict[str, Any], out: Path, resume: bool) -> None:
    from kdcache.metrics import percent
    from kdcache.train import Interrupted, make_config, pick_device, train
    from kdcache.train.distributed import default_workers
    from kdcache_cli.progress import TrainingProgress

    try:
        with shared_errors(), progress_bar() as bar:
            if settings["workers"] is None:
                settings["workers"] = default_workers(pick_device(settings["device"]))
            config = make_config(**settings)
            result = train(config, out, resume=resume, observer=TrainingProgress(bar, settings["verb"]))
    except Interrupted as stop:
        ERRORS.print(f"Stopped after {stop.step} iterations; the state is saved. Add --resume to go on.")
        raise typer.Exit(130) from None
    best = result["best_miou"]
    score = "not validated" if best is None else f"best mIoU {percent(best)} at iteration {result['best_step']}"
    OUT.print(
        f"[bold]{escape(str(out))}[/]: {score}; {result['iterations']} iterations in {result['seconds']:.0f} s, "
        f"{result['images_per_second']:.1f} images/s, {100 * result['wait_share']:.1f} % of it waiting for data"
    )
