"""`kdcache train-teacher` and `kdcache train-student`: one trainer, two doors."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kdcache_cli import options
from kdcache_cli.console import ERRORS, OUT, progress_bar
from kdcache_cli.ranks import shared_errors

_Option = typer.Option
Model = Annotated[str, _Option("--model", help="What to train; see [bold]kdcache models[/].")]
Out = Annotated[Path, _Option("--out", help="Run folder: new, empty, or with --resume the run itself.")]
Init = Annotated[str | None, _Option("--init", help="Start from a weights FILE, or [bold]default[/] (downloads).")]
Iterations = Annotated[int | None, _Option("--iterations", help="Optimizer steps (default: 4000).")]
Epochs = Annotated[int | None, _Option("--epochs", help="Instead of --iterations: visits of every sample.")]
BatchSize = Annotated[int, _Option("--batch-size", help="Samples per step, of all processes together.")]
Optimizer = Annotated[str, _Option("--optimizer", help="adamw, adam or sgd.")]
Lr = Annotated[float, _Option("--lr", help="Learning rate at its highest.")]
WeightDecay = Annotated[float, _Option("--weight-decay", help="Not applied to biases and normalisations.")]
Momentum = Annotated[float, _Option("--momentum", help="Of sgd.")]
Schedule = Annotated[str, _Option("--schedule", help="poly, plateau (halve when mIoU stalls) or constant.")]
Power = Annotated[float, _Option("--power", help="Of poly.")]
Warmup = Annotated[int, _Option("--warmup", help="Steps of linear warm-up.")]
ClipGrad = Annotated[float, _Option("--clip-grad", help="Largest gradient norm; 0 does not clip.")]
Amp = Annotated[str, _Option("--amp", help="auto (bf16 on a GPU), off or bf16.")]
Step = Annotated[
    str,
    _Option(
        "--step",
        help="How a training step runs: eager, compiled (torch.compile: up to a minute at first, then faster) or "
        "graphed (compiled and replayed as one CUDA graph: a small student waits for launches otherwise). "
        "auto: graphed on a GPU, eager on a CPU.",
    ),
]
Impl = Annotated[
    str,
    _Option(
        "--impl",
        help="What computes the loss: triton (a GPU), numba (a CPU) or reference (plain PyTorch: slow and large, for "
        "doubters). auto: the first that runs here.",
    ),
]
ClassWeights = Annotated[
    str, _Option("--class-weights", help="Of the cross-entropy: none, median (median frequency) or sqrt of that.")
]
Scale = Annotated[str, _Option("--scale", metavar="MIN:MAX", help="Random zoom.")]
Flip = Annotated[bool, _Option("--flip/--no-flip", help="Random horizontal flip.")]
Jitter = Annotated[float, _Option("--jitter", help="Strength of colour jitter; 0 is off.")]
Seed = Annotated[int, _Option("--seed", help="Of weights, order and augmentation.")]
Workers = Annotated[
    int | None,
    _Option(
        "--workers",
        help="Who draws ahead: threads from a store, processes from image files; 0 draws between steps (and is the "
        "default on a CPU).",
    ),
]
Shuffle = Annotated[
    str,
    _Option(
        "--shuffle",
        help="Order of an epoch: full (all records), or window (a few shards at a time, for a store that is far away). "
        "auto: window for a remote store, else full.",
    ),
]
Resident = Annotated[
    str,
    _Option(
        "--resident",
        help="Where decoded records stay: ram (after their first reading), gpu (targets) or off. "
        "auto: gpu, else ram, where they take at most half of what is free.",
    ),
]
Fold = Annotated[
    str | None,
    _Option(
        "--fold", metavar="I/K", help="Leave out fold I, from 0, of K: to teach it (--folds), or to be judged on it."
    ),
]
ValFold = Annotated[str | None, _Option("--val-fold", metavar="I/K", help="Validate on that fold of the split alone.")]
LimitSamples = Annotated[
    float | None, _Option("--limit-samples", metavar="N", help="Use so many samples, below 1 a share; always the same.")
]
Mix = Annotated[
    str | None,
    _Option("--mix", help="Paste between the samples of a batch: cutmix or classmix, with a share as cutmix:0.5."),
]
ValEvery = Annotated[
    int | None, _Option("--val-every", help="Steps between validations and checkpoints (default: a tenth).")
]
ValSplit = Annotated[str, _Option("--val-split", help="Split to validate on.")]
LogEvery = Annotated[int, _Option("--log-every", help="Steps between log lines.")]
GradientsEvery = Annotated[int, _Option("--gradients-every", help="Steps between gradient norms per term; 0 is off.")]
Resume = Annotated[bool, _Option("--resume", help="Go on from the last checkpoint.")]


def train_teacher(
    data: options.Data,
    model: Model,
    out: Out,
    size: options.Size = None,
    split: options.Split = "train",
    val_split: ValSplit = "val",
    init: Init = None,
    iterations: Iterations = None,
    epochs: Epochs = None,
    batch_size: BatchSize = 8,
    optimizer: Optimizer = "adamw",
    lr: Lr = 1e-3,
    weight_decay: WeightDecay = 0.01,
    momentum: Momentum = 0.9,
    schedule: Schedule = "poly",
    power: Power = 0.9,
    warmup: Warmup = 0,
    clip_grad: ClipGrad = 0.0,
    amp: Amp = "auto",
    step: Step = "auto",
    class_weights: ClassWeights = "none",
    scale: Scale = "0.5:2.0",
    flip: Flip = True,
    jitter: Jitter = 0.3,
    mix: Mix = None,
    limit_samples: LimitSamples = None,
    fold: Fold = None,
    val_fold: ValFold = None,
    seed: Seed = 0,
    workers: Workers = None,
    threads: options.Threads = 0,
    device: options.Device = "auto",
    val_every: ValEvery = None,
    log_every: LogEvery = 20,
    gradients_every: GradientsEvery = 500,
    resume: Resume = False,
    recipe: options.Recipe = None,
) -> None:
    """Train a model on labels alone: the teacher, or a baseline.

    Random scale, crop, flip and colour jitter; validated by mIoU at the labels'
    own size, best and last kept.

    [dim]kdcache train-teacher --data camvid --model kdcache:base --size 288x384 --iterations 8000 --out runs/teacher[/]
    """
    _train({**locals(), "verb": "train-teacher", "val": data}, out, resume)


def train_student(
    cache: Annotated[
        str, _Option("--cache", help="Store that build-teacher-cache wrote, a folder or s3://BUCKET/PREFIX.")
    ],
    model: Model,
    out: Out,
    method: Annotated[
        str,
        _Option(
            "--method",
            help="none (labels only, same pixels), or a sum such as kl or kl+at of kl, pseudo, at, sp, hint, cosine, "
            "cwd, dist, dkd.",
        ),
    ] = "kl",
    term: Annotated[
        list[str] | None,
        _Option(
            "--term",
            metavar="KIND,OPTION=X,...",
            help="One more term with options of its own, e.g. cosine,weight=0.1,teacher_tap=layer4 (in a recipe: "
            "a [[term]] each). May be repeated.",
        ),
    ] = None,
    temperature: Annotated[float, _Option("--temperature", help="Of the KL term.")] = 2.0,
    kl_weight: Annotated[float, _Option("--kl-weight", help="Weight of T^2 * KL.")] = 1.0,
    ce_weight: Annotated[float, _Option("--ce-weight", help="Weight of the cross-entropy.")] = 1.0,
    distill_void: Annotated[
        bool, _Option("--distill-void/--no-distill-void", help="Whether void pixels teach too.")
    ] = True,
    distill_on: Annotated[
        str, _Option("--distill-on", help="all: images without a label teach through their targets; or labelled.")
    ] = "all",
    gate: Annotated[
        str,
        _Option(
            "--gate",
            help="Which pixels teach: none (all), correct (not where the label says otherwise) or confidence:X.",
        ),
    ] = "none",
    class_trust: Annotated[
        str | None,
        _Option(
            "--class-trust",
            metavar="FILE|auto",
            help="Weight of each class that the teacher says: from a file, or by how far it beats --trust-against.",
        ),
    ] = None,
    trust_against: Annotated[
        str | None, _Option("--trust-against", metavar="RUN", help="A run without a teacher that left out a --fold.")
    ] = None,
    class_balance: Annotated[
        str,
        _Option("--class-balance", help="Weigh what the teacher says by how rare its class is: none, median or sqrt."),
    ] = "none",
    limit_labels: Annotated[
        float | None, _Option("--limit-labels", metavar="N", help="Of the samples, use the labels of so many.")
    ] = None,
    limit_views: Annotated[
        int | None, _Option("--limit-views", min=1, metavar="N", help="Replay the first so many views of a sample.")
    ] = None,
    augment: Annotated[
        str, _Option("--augment", help="warp (zoom, crop, flip pixels and targets alike), replay (as stored) or none.")
    ] = "warp",
    val: Annotated[str | None, _Option("--val", help="Labelled data folder to validate on.")] = None,
    val_split: ValSplit = "val",
    data: options.OptionalData = None,
    split: options.Split = "train",
    size: options.Size = None,
    init: Init = None,
    iterations: Iterations = None,
    epochs: Epochs = None,
    batch_size: BatchSize = 8,
    optimizer: Optimizer = "adamw",
    lr: Lr = 1e-3,
    weight_decay: WeightDecay = 0.01,
    momentum: Momentum = 0.9,
    schedule: Schedule = "poly",
    power: Power = 0.9,
    warmup: Warmup = 0,
    clip_grad: ClipGrad = 0.0,
    amp: Amp = "auto",
    step: Step = "auto",
    impl: Impl = "auto",
    class_weights: ClassWeights = "none",
    scale: Scale = "0.5:2.0",
    flip: Flip = True,
    jitter: Jitter = 0.3,
    mix: Mix = None,
    limit_samples: LimitSamples = None,
    fold: Fold = None,
    val_fold: ValFold = None,
    seed: Seed = 0,
    workers: Workers = None,
    cache_dir: options.CacheDir = None,
    cache_bytes: options.CacheBytes = None,
    shuffle: Shuffle = "auto",
    resident: Resident = "auto",
    threads: options.Threads = 0,
    device: options.Device = "auto",
    val_every: ValEvery = None,
    log_every: LogEvery = 20,
    gradients_every: GradientsEvery = 500,
    resume: Resume = False,
    recipe: options.Recipe = None,
) -> None:
    """Train a student from a store: no teacher is loaded or run.

    With --method none and kl the student sees identical pixels in identical
    order, so that two runs differ by what the teacher said alone.

    Several processes share every batch and train as one would: torchrun
    --nproc-per-node 2 -m kdcache_cli train-student and the same flags.

    [dim]kdcache train-student --cache camvid.zarr --model kdcache:tiny --val camvid --out runs/student[/]
    """
    _train({**locals(), "verb": "train-student"}, out, resume)


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """The flags as settings of a training."""
    settings = {name: value for name, value in given.items() if name not in ("out", "resume", "recipe")}
    settings["size"] = options.parse_size(settings["size"])
    settings["term"] = settings.get("term") or ()
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
        f"[bold]{out}[/]: {score}; {result['iterations']} iterations in {result['seconds']:.0f} s, "
        f"{result['images_per_second']:.1f} images/s, {100 * result['wait_share']:.1f} % of it waiting for data"
    )
