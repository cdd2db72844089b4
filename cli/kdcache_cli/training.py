"""The shared part of train-teacher and train-student: the run folder, and the training on the terminal."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from kdcache.progress import progress_bar
from kdcache_cli.console import ERRORS, OUT
from kdcache_cli.settings.signature import copied, given
from kdcache_cli.torchrun import shared_errors

Out = Annotated[Path, typer.Option("--out", help="Run folder: new, empty, or with --resume the run itself.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run in --out.")]


def run_training(settings: dict[str, Any], context: typer.Context, out: Path, resume: bool) -> None:
    """Train with these settings, and show progress and result. On Ctrl-C, save the state and exit with code 130.

    Args:
        settings: name with underscores -> value. The setting `verb` is `train-teacher` or `train-student`.
        context: Typer's context of the verb, which knows what the user typed.
        out: the run folder.
        resume: True continues the run in `out`.
    """
    from kdcache.metrics import percent
    from kdcache.training import Interrupted, make_config, pick_device, train
    from kdcache.training.distributed import default_workers
    from kdcache.training.run.training_progress import TrainingProgress

    try:
        # Not by kdcache.verbs, whose builds import teachers: a student's process never loads that room.
        with shared_errors(), progress_bar() as bar:
            if settings["workers"] is None:
                settings["workers"] = default_workers(pick_device(settings["device"]))
            config = make_config(given=given(settings, context), copied=copied(context), **settings)
            result = train(config, out, resume=resume, observer=TrainingProgress(bar, settings["verb"]))
    except Interrupted as stop:
        ERRORS.print(f"Stopped after {stop.step} iterations; the state is saved. Add --resume to go on.")
        raise typer.Exit(130) from None
    best = result["best_miou"]
    score = "not validated" if best is None else f"best mIoU {percent(best)} at iteration {result['best_step']}"
    if (rmse := result.get("best_depth_rmse")) is not None:
        score = f"best depth rmse {rmse:.3g} m at iteration {result['best_step']}"
    if (loss := result.get("best_feature_loss")) is not None:
        score = f"least feature loss {loss:.4g} at iteration {result['best_step']}"
    if (ema := result.get("ema_best_miou")) is not None:
        score += f", of the EMA {percent(ema)} at iteration {result['ema_best_step']}"
    OUT.print(
        f"[bold]{escape(str(out))}[/]: {score}; {result['iterations']} iterations in {result['seconds']:.0f} s, "
        f"{result['images_per_second']:.1f} images/s, {100 * result['wait_share']:.1f} % of it waiting for data"
    )
