"""`kdcache train-teacher` and `kdcache train-student`: one trainer, two doors."""

from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from kdcache_cli import flags, options
from kdcache_cli.console import ERRORS, OUT, progress_bar
from kdcache_cli.ranks import shared_errors


def train_teacher(
    data: options.Data,
    model: flags.Model,
    out: flags.Out,
    size: options.Size = None,
    split: options.Split = "train",
    val_split: flags.ValSplit = "val",
    name: flags.Name = None,
    init: flags.Init = None,
    iterations: flags.Iterations = None,
    epochs: flags.Epochs = None,
    batch_size: flags.BatchSize = 8,
    accumulate: flags.Accumulate = 1,
    optimizer: flags.Optimizer = "adamw",
    lr: flags.Lr = None,
    weight_decay: flags.WeightDecay = 0.01,
    momentum: flags.Momentum = 0.9,
    schedule: flags.Schedule = "poly",
    power: flags.Power = 0.9,
    warmup: flags.Warmup = 0,
    clip_grad: flags.ClipGrad = 0.0,
    amp: flags.Amp = "auto",
    step: flags.Step = "auto",
    class_weights: flags.ClassWeights = "sqrt",
    scale: flags.Scale = "0.5:2.0",
    flip: flags.Flip = None,
    jitter: flags.Jitter = 0.3,
    mix: flags.Mix = None,
    limit_samples: flags.LimitSamples = None,
    fold: flags.Fold = None,
    val_fold: flags.ValFold = None,
    seed: flags.Seed = 0,
    workers: flags.Workers = None,
    threads: options.Threads = 0,
    device: options.Device = "auto",
    val_every: flags.ValEvery = None,
    log_every: flags.LogEvery = 20,
    gradients_every: flags.GradientsEvery = 500,
    keep_every: flags.KeepEvery = None,
    log: flags.Log = None,
    resume: flags.Resume = False,
    recipe: options.Recipe = None,
) -> None:
    """Train a model on labels alone: the teacher, or a baseline.

    Random scale, crop, flip and colour jitter; validated by mIoU at the labels'
    own size, best and last kept.

    [dim]kdcache train-teacher --data camvid --model kdcache:base --size 288x384 --iterations 8000 --out runs/teacher[/]
    """
    _train({**locals(), "verb": "train-teacher", "val": data}, out, resume)


def train_student(
    cache: flags.Cache,
    model: flags.Model,
    out: flags.Out,
    method: flags.Method = "auto",
    term: flags.Term = None,
    temperature: flags.Temperature = 2.0,
    kl_weight: flags.KlWeight = 0.3,
    ce_weight: flags.CeWeight = 1.0,
    distill_void: flags.DistillVoid = True,
    distill_on: flags.DistillOn = "all",
    distill_schedule: flags.DistillSchedule = "constant",
    gate: flags.Gate = "none",
    class_trust: flags.ClassTrust = None,
    trust_against: flags.TrustAgainst = None,
    class_balance: flags.ClassBalance = "none",
    limit_labels: flags.LimitLabels = None,
    labelled_share: flags.LabelledShare = None,
    limit_views: flags.LimitViews = None,
    augment: flags.Augment = "auto",
    val: flags.Val = None,
    val_split: flags.ValSplit = "val",
    data: options.OptionalData = None,
    split: options.Split = "train",
    size: options.Size = None,
    name: flags.Name = None,
    init: flags.Init = None,
    iterations: flags.Iterations = None,
    epochs: flags.Epochs = None,
    batch_size: flags.BatchSize = 8,
    accumulate: flags.Accumulate = 1,
    optimizer: flags.Optimizer = "adamw",
    lr: flags.Lr = None,
    weight_decay: flags.WeightDecay = 0.01,
    momentum: flags.Momentum = 0.9,
    schedule: flags.Schedule = "poly",
    power: flags.Power = 0.9,
    warmup: flags.Warmup = 0,
    clip_grad: flags.ClipGrad = 0.0,
    amp: flags.Amp = "auto",
    step: flags.Step = "auto",
    impl: flags.Impl = "auto",
    class_weights: flags.ClassWeights = "sqrt",
    scale: flags.Scale = "0.5:2.0",
    flip: flags.Flip = None,
    jitter: flags.Jitter = 0.3,
    mix: flags.Mix = None,
    limit_samples: flags.LimitSamples = None,
    fold: flags.Fold = None,
    val_fold: flags.ValFold = None,
    seed: flags.Seed = 0,
    workers: flags.Workers = None,
    cache_dir: options.CacheDir = None,
    cache_bytes: options.CacheBytes = None,
    shuffle: flags.Shuffle = "auto",
    resident: flags.Resident = "auto",
    threads: options.Threads = 0,
    device: options.Device = "auto",
    val_every: flags.ValEvery = None,
    log_every: flags.LogEvery = 20,
    gradients_every: flags.GradientsEvery = 500,
    keep_every: flags.KeepEvery = None,
    log: flags.Log = None,
    resume: flags.Resume = False,
    recipe: options.Recipe = None,
) -> None:
    """Train a student from a store: no teacher is loaded or run.

    With --method none the student sees identical pixels in identical order, so
    that two runs differ by what the teacher said alone.

    Several processes share every batch and train as one would: torchrun
    --nproc-per-node 2 -m kdcache_cli train-student and the same flags.

    [dim]kdcache train-student --cache camvid.zarr --model kdcache:tiny --val camvid --out runs/student[/]
    """
    _train({**locals(), "verb": "train-student"}, out, resume)


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """The flags as settings of a training."""
    settings = {name: value for name, value in given.items() if name not in ("out", "resume", "recipe")}
    settings["size"] = options.parse_size(settings["size"])
    settings |= {name: settings.get(name) or () for name in ("term", "log")}
    return settings


def _train(given: dict[str, Any], out: Path, resume: bool) -> None:
    from kdcache.evaluate import percent
    from kdcache.train import Interrupted, make_config, pick_device, train
    from kdcache.train.distributed import default_workers
    from kdcache_cli.progress import TrainingProgress

    try:
        with shared_errors(), progress_bar() as bar:
            settings = _settings(given)
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
