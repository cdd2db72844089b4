"""Flags of trainings, in the panels of their help."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kdcache_cli import options

_Option = typer.Option
_loss = partial(typer.Option, rich_help_panel="What the loss is")
_gate = partial(typer.Option, rich_help_panel="Where the teacher is listened to")
_view = partial(typer.Option, rich_help_panel="What the student sees")
_part = partial(typer.Option, rich_help_panel="A part of the data")
_step = partial(typer.Option, rich_help_panel="Optimization")
_run = partial(typer.Option, rich_help_panel="How it runs")

Model = Annotated[
    str, _Option("--model", callback=options.check_model, help="What to train; see [bold]kdcache models[/].")
]
Name = Annotated[str | None, _Option("--name", help="What tables and pictures call it (default: what it does).")]
Out = Annotated[Path, _Option("--out", help="Run folder: new, empty, or with --resume the run itself.")]
Init = Annotated[str | None, _Option("--init", help="Start from a weights FILE, or [bold]default[/] (downloads).")]
ValSplit = Annotated[str, _Option("--val-split", help="Split to validate on.")]
Resume = Annotated[bool, _Option("--resume", help="Go on from the last checkpoint of the run in --out.")]
Cache = Annotated[str, _Option("--cache", help="Store that build-teacher-cache wrote, a folder or s3://BUCKET/PREFIX.")]
Val = Annotated[str | None, _Option("--val", help="Labelled data folder to validate on.")]

Method = Annotated[
    str,
    _loss(
        "--method",
        help="none (labels only, same pixels), or a sum such as kl or kl+at of kl, pseudo, at, sp, hint, cosine, "
        "cwd, dist, dkd. auto is dist; kl with --mix or --accumulate, which dist cannot follow.",
    ),
]
Term = Annotated[
    list[str] | None,
    _loss(
        "--term",
        metavar="KIND,X=Y",
        help="One more term with options of its own, e.g. cosine,weight=0.1,teacher_tap=layer4. May be repeated; "
        "in a recipe, each is a table named term.",
    ),
]
Temperature = Annotated[float, _loss("--temperature", help="Of the KL term.")]
KlWeight = Annotated[
    float, _loss("--kl-weight", help="Weight of T^2 * KL. At 1 its gradient is several times that of the labels.")
]
CeWeight = Annotated[float, _loss("--ce-weight", help="Weight of the cross-entropy.")]
ClassWeights = Annotated[
    str,
    _loss(
        "--class-weights",
        help="Of the cross-entropy: median (median frequency), the milder sqrt of that, or none. Unweighted, rare "
        "classes are learnt late.",
    ),
]
Impl = Annotated[
    str,
    _loss(
        "--impl",
        help="What computes the loss: triton (a GPU), numba (a CPU) or reference (plain PyTorch: slow and large, for "
        "doubters). auto: the first that runs here.",
    ),
]

DistillVoid = Annotated[bool, _gate("--distill-void/--no-distill-void", help="Whether void pixels teach too.")]
DistillOn = Annotated[
    str, _gate("--distill-on", help="all: images without a label teach through their targets; or labelled.")
]
DistillSchedule = Annotated[
    str,
    _gate("--distill-schedule", help="constant, or fade: the teacher's weight goes to nothing, on a line."),
]
Gate = Annotated[
    str,
    _gate(
        "--gate",
        help="Which pixels teach: none (all), correct (not where the label says otherwise) or confidence:X.",
    ),
]
ClassTrust = Annotated[
    str | None,
    _gate(
        "--class-trust",
        metavar="FILE|auto",
        help="Weight of each class that the teacher says: from a file, or by how far it beats --trust-against.",
    ),
]
TrustAgainst = Annotated[
    str | None, _gate("--trust-against", metavar="RUN", help="A run without a teacher that left out a --fold.")
]
ClassBalance = Annotated[
    str,
    _gate("--class-balance", help="Weigh what the teacher says by how rare its class is: none, median or sqrt."),
]

Augment = Annotated[
    str,
    _view(
        "--augment",
        help="warp (zoom, crop, flip pixels and targets alike), replay (as stored) or none. "
        "auto: replay where the store has several views, else warp.",
    ),
]
Scale = Annotated[str, _view("--scale", metavar="MIN:MAX", help="Random zoom.")]
Flip = Annotated[
    bool | None,
    _view(
        "--flip/--no-flip",
        help="Random horizontal flip: yes, except where warp would mirror stored features, which must be asked for.",
        show_default=False,
    ),
]
Jitter = Annotated[float, _view("--jitter", help="Strength of colour jitter; 0 is off.")]
Mix = Annotated[
    str | None,
    _view("--mix", help="Paste between the samples of a batch: cutmix or classmix, with a share as cutmix:0.5."),
]

LimitSamples = Annotated[
    float | None, _part("--limit-samples", metavar="N", help="Use so many samples, below 1 a share; always the same.")
]
LimitLabels = Annotated[
    float | None, _part("--limit-labels", metavar="N", help="Of the samples, use the labels of so many.")
]
LabelledShare = Annotated[
    float | None,
    _part(
        "--labelled-share",
        metavar="SHARE",
        help="Where only some samples have a label: what part of every batch is taken from these (default: as many as "
        "there are, at least 0.5).",
    ),
]
LimitViews = Annotated[
    int | None, _part("--limit-views", min=1, metavar="N", help="Replay the first so many views of a sample.")
]
Fold = Annotated[
    str | None,
    _part(
        "--fold", metavar="I/K", help="Leave out fold I, from 0, of K: to teach it (--folds), or to be judged on it."
    ),
]
ValFold = Annotated[str | None, _part("--val-fold", metavar="I/K", help="Validate on that fold of the split alone.")]

Iterations = Annotated[int | None, _step("--iterations", help="Optimizer steps (default: 4000).")]
Epochs = Annotated[int | None, _step("--epochs", help="Instead of --iterations: visits of every sample.")]
BatchSize = Annotated[int, _step("--batch-size", help="Samples per step, of all processes together.")]
Accumulate = Annotated[
    int,
    _step(
        "--accumulate",
        min=1,
        metavar="N",
        help="Learn from a batch in N parts, one after the other, in about an Nth of the memory: gradients add up to "
        "those of the whole batch, except that BatchNorm sees each part alone.",
    ),
]
Optimizer = Annotated[str, _step("--optimizer", help="adamw, adam or sgd.")]
Lr = Annotated[
    float | None,
    _step(
        "--lr", help="Learning rate at its highest (default: 6e-3 for kdcache:tiny, 2e-3 for kdcache:base, else 1e-3)."
    ),
]
WeightDecay = Annotated[float, _step("--weight-decay", help="Not applied to biases and normalisations.")]
Momentum = Annotated[float, _step("--momentum", help="Of sgd.")]
Schedule = Annotated[str, _step("--schedule", help="poly, plateau (halve when mIoU stalls) or constant.")]
Power = Annotated[float, _step("--power", help="Of poly.")]
Warmup = Annotated[int, _step("--warmup", help="Steps of linear warm-up.")]
ClipGrad = Annotated[float, _step("--clip-grad", help="Largest gradient norm; 0 does not clip.")]
Seed = Annotated[int, _step("--seed", help="Of weights, order and augmentation.")]

Amp = Annotated[str, _run("--amp", help="auto (bf16 on a GPU), off or bf16.")]
Step = Annotated[
    str,
    _run(
        "--step",
        help="How a training step runs: eager, compiled (torch.compile: up to a minute at first, then faster) or "
        "graphed (compiled and replayed as one CUDA graph: a small student waits for launches otherwise). "
        "auto: graphed on a GPU, eager on a CPU.",
    ),
]
Workers = Annotated[
    int | None,
    _run(
        "--workers",
        help="Who draws ahead: threads from a store, processes from image files; 0 draws between steps (and is the "
        "default on a CPU).",
    ),
]
Shuffle = Annotated[
    str,
    _run(
        "--shuffle",
        help="Order of an epoch: full (all records), or window (a few shards at a time, for a store that is far away). "
        "auto: window for a remote store, else full.",
    ),
]
Resident = Annotated[
    str,
    _run(
        "--resident",
        help="Where decoded records stay: ram (after their first reading), gpu (targets) or off. "
        "auto: gpu, else ram, where they take at most half of what is free.",
    ),
]
ValEvery = Annotated[
    int | None, _run("--val-every", help="Steps between validations and checkpoints (default: a tenth).")
]
LogEvery = Annotated[int, _run("--log-every", help="Steps between log lines.")]
GradientsEvery = Annotated[int, _run("--gradients-every", help="Steps between gradient norms per term; 0 is off.")]
KeepEvery = Annotated[
    str | None,
    _run(
        "--keep-every",
        metavar="N|Ne",
        help="Also keep the full state every N iterations (500), or N epochs (5e), as checkpoints/step-000500.pt; one "
        "that is renamed to checkpoint.pt is gone on from by --resume.",
    ),
]
Log = Annotated[
    list[str] | None,
    _run(
        "--log",
        metavar="WHERE",
        help="Beside metrics.jsonl: tensorboard, wandb or trackio, as a list (a,b) or repeated. Nothing is sent unless "
        "you have configured that with wandb or trackio.",
    ),
]
