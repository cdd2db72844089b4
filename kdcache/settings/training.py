"""The table of a training: train-teacher, train-student, their recipes and `TrainConfig` are made from it."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from kdcache.settings.setting import Setting
from kdcache.settings.shared import FOLDS_BY, CopySettings, ImageSettings, MachineSettings, SourceSettings
from kdcache.settings.spelling import Count, Decay, Every, Logs, LrScales, Positive, Range, Weight

DEFAULT_ITERATIONS = 4000
LEARNING_RATE = 1e-3
LEARNING_RATES = {"kdcache:tiny": 6e-3, "kdcache:base": 2e-3}
"""Learning rates of Adam and AdamW for models that need their own: for tiny the best of 1e-3 to 8e-3 on CamVid
(`effect-cpu.json`), for base that of the teacher there. From 1e-3, tiny ends 8 points of mIoU lower.
"""

LOSS = "Loss"
GATE = "Distillation masks and weights"
PART = "Part of the data"
VIEW = "Augmentation"
OPTIMIZATION = "Optimization"
RUN = "Execution"

_loss = partial(Setting, panel=LOSS)
_gate = partial(Setting, panel=GATE)
_part = partial(Setting, panel=PART)
_view = partial(Setting, panel=VIEW)
_step = partial(Setting, panel=OPTIMIZATION)
_run = partial(Setting, panel=RUN)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a training beside its images and the machine; lengths are optimizer steps."""

    verb: Literal["train-teacher", "train-student"]
    cache: Annotated[str | None, Setting("Store that build-teacher-cache wrote, a folder or s3://BUCKET/PREFIX.")] = (
        None
    )
    model: Annotated[str, Setting("What to train; see [bold]kdcache models[/].", code=True)]
    val: Annotated[str | None, Setting("Labelled data folder to validate on.")] = None
    val_split: Annotated[str, Setting("Split to validate on.")] = "val"
    name: Annotated[
        str | None,
        Setting(
            "Name in tables and pictures (default: in tables the settings in which it differs, in pictures its folder)."
        ),
    ] = None
    init: Annotated[str | None, Setting("Start from a weights FILE, or [bold]default[/] (downloads).")] = None

    method: Annotated[
        str,
        _loss(
            "none (labels only, same pixels), or a sum such as kl or kl+at of kl, pseudo, at, sp, hint, cosine, "
            "cwd, dist, dkd, and dice and lovasz, which need no teacher. auto is dist; kl with --mix or --accumulate, "
            "which dist cannot follow."
        ),
    ] = "auto"
    teacher: Annotated[
        Literal["store", "labels"],
        _loss(
            "What the teacher terms learn from: the store's targets; or labels, averaged over the same cells in their "
            "place, the control that shows what a loss does without a teacher (--cache or --data)."
        ),
    ] = "store"
    term: Annotated[
        tuple[Any, ...],
        _loss(
            "One more term with options of its own, e.g. cosine,weight=0.1,teacher_tap=layer4. May be repeated; "
            "in a recipe, each is a table named term.",
            metavar="KIND,X=Y",
            repeated=True,
        ),
    ] = ()
    temperature: Annotated[Positive, _loss("Temperature of the KL term.")] = 2.0
    kl_weight: Annotated[
        Weight, _loss("Weight of T^2 * KL. At 1 its gradient is several times that of the labels.")
    ] = 0.3
    ce_weight: Annotated[Weight, _loss("Weight of the cross-entropy.")] = 1.0
    label_smoothing: Annotated[
        float,
        Ge(0),
        Lt(1),
        _loss("Share of every label that is spread over all classes, in the cross-entropy. Above 0 it is not fused."),
    ] = 0.0
    impl: Annotated[
        Literal["auto", "triton", "numba", "reference"],
        _loss(
            "Implementation of the loss: triton (a GPU), numba (a CPU) or reference (plain PyTorch: slow and large, "
            "for comparison). auto: the first that runs here."
        ),
    ] = "auto"
    class_weights: Annotated[
        Literal["none", "median", "sqrt"],
        _loss(
            "Class weights of the cross-entropy: median (median frequency), the milder sqrt of that, or none. "
            "Unweighted, rare classes are learnt late."
        ),
    ] = "sqrt"

    distill_void: Annotated[bool, _gate("Whether void pixels are distilled too.")] = True
    distill_on: Annotated[
        Literal["labelled", "all"], _gate("all: images without a label are distilled from their targets; or labelled.")
    ] = "all"
    distill_schedule: Annotated[
        Literal["constant", "fade"], _gate("constant, or fade: the weight of the teacher terms falls linearly to 0.")
    ] = "constant"
    gate: Annotated[
        str,
        _gate("Which pixels are distilled: none (all), correct (not where the label differs) or confidence:X."),
    ] = "none"
    class_trust: Annotated[
        str | None,
        _gate(
            "Weight of each class that the teacher predicts: from a file, or by how far it beats --trust-against.",
            metavar="FILE|auto",
        ),
    ] = None
    trust_against: Annotated[str | None, _gate("A run without a teacher that left out a --fold.", metavar="RUN")] = None
    class_balance: Annotated[
        Literal["none", "median", "sqrt"],
        _gate("Weights of the targets by how rare their class is: none, median or sqrt."),
    ] = "none"

    limit_labels: Annotated[Positive | None, _part("Use the labels of so many samples.", metavar="N")] = None
    labelled_share: Annotated[
        Annotated[float, Ge(0.001), Le(0.999)] | None,
        _part(
            "Where only some samples have a label: their share of every batch (default: as many as there are, at "
            "least 0.5).",
            metavar="SHARE",
        ),
    ] = None
    limit_views: Annotated[
        Count | None, _part("Replay the first so many views of a sample.", metavar="N", ranged=True)
    ] = None
    limit_samples: Annotated[
        Positive | None, _part("Use so many samples, below 1 a share; always the same.", metavar="N")
    ] = None
    fold: Annotated[
        str | None,
        _part("Leave out fold I, from 0, of K: for cross-fitting (--folds), or to evaluate on it.", metavar="I/K"),
    ] = None
    val_fold: Annotated[str | None, _part("Validate on this fold of the split alone.", metavar="I/K")] = None
    folds_by: Annotated[str | None, _part(FOLDS_BY, metavar="PATTERN")] = None

    augment: Annotated[
        Literal["auto", "warp", "replay", "none"],
        _view(
            "warp (zoom, crop, flip pixels and targets alike), replay (as stored) or none. "
            "auto: replay where the store has several views, else warp."
        ),
    ] = "auto"
    scale: Annotated[Range, _view("Random zoom.", metavar="MIN:MAX")] = (0.5, 2.0)
    flip: Annotated[
        bool | None,
        _view(
            "Random horizontal flip: yes, except where warp would mirror stored features, which needs --flip.",
            default_shown=False,
        ),
    ] = None
    jitter: Annotated[float, Ge(0), Le(1), _view("Strength of colour jitter; 0 is off.")] = 0.3
    mix: Annotated[
        str | None,
        _view("Paste between the samples of a batch: cutmix or classmix, with a share as cutmix:0.5."),
    ] = None

    iterations: Annotated[Count | None, _step(f"Optimizer steps (default: {DEFAULT_ITERATIONS}).")] = None
    epochs: Annotated[Count | None, _step("Instead of --iterations: passes over all samples.")] = None
    batch_size: Annotated[Count, _step("Samples per step, of all processes together.")] = 8
    accumulate: Annotated[
        Count,
        _step(
            "Process a batch in N parts, one after the other, in about an Nth of the memory: gradients add up to "
            "those of the whole batch, except that BatchNorm sees each part alone.",
            metavar="N",
            ranged=True,
        ),
    ] = 1
    optimizer: Annotated[Literal["adamw", "adam", "sgd"], _step("adamw, adam or sgd.")] = "adamw"
    lr: Annotated[
        Positive,
        _step(
            "Learning rate at its highest (default: 6e-3 for kdcache:tiny, 2e-3 for kdcache:base, else 1e-3).",
            automatic=True,
        ),
    ] = LEARNING_RATE
    lr_scale: Annotated[
        LrScales,
        _step(
            "Factor on the learning rate of parameters whose name begins with PREFIX, e.g. encoder=0.1 where that is "
            "pretrained. May be repeated; the longest prefix counts.",
            metavar="PREFIX=X",
            repeated=True,
        ),
    ] = ()
    weight_decay: Annotated[Weight, _step("Weight decay, not of biases and normalisations.")] = 0.01
    momentum: Annotated[float, Ge(0), Lt(1), _step("Momentum of sgd.")] = 0.9
    schedule: Annotated[
        Literal["poly", "plateau", "constant"], _step("poly, plateau (halve when mIoU stalls) or constant.")
    ] = "poly"
    power: Annotated[Positive, _step("Exponent of poly.")] = 0.9
    warmup: Annotated[int, Ge(0), _step("Steps of linear warm-up.")] = 0
    ema: Annotated[
        Decay | None,
        _step(
            "Also keep an exponential moving average of the weights with this decay, e.g. 0.999: it is validated and "
            "saved beside them, as best-ema and last-ema (default: none).",
            metavar="DECAY",
        ),
    ] = None
    clip_grad: Annotated[Weight, _step("Largest gradient norm; 0 does not clip.")] = 0.0
    seed: Annotated[int, Ge(0), Lt(2**63), _step("Seed of weights, order and augmentation.")] = 0

    amp: Annotated[Literal["auto", "off", "bf16"], _run("auto (bf16 on a GPU), off or bf16.")] = "auto"
    step: Annotated[
        Literal["auto", "eager", "compiled", "graphed"],
        _run(
            "How a training step runs: eager, compiled (torch.compile: up to a minute at first, then faster) or "
            "graphed (compiled and replayed as one CUDA graph: a small student waits for launches otherwise). "
            "auto: graphed on a GPU, eager on a CPU."
        ),
    ] = "auto"
    workers: Annotated[
        int,
        Ge(0),
        Le(256),
        _run(
            "Workers that load ahead: threads from a store, processes from image files; 0 loads between steps (and is "
            "the default on a CPU).",
            automatic=True,
        ),
    ] = 0
    shuffle: Annotated[
        Literal["auto", "full", "window"],
        _run(
            "Order of an epoch: full (all records), or window (a few shards at a time, for a store that is far away). "
            "auto: window for a remote store, else full."
        ),
    ] = "auto"
    resident: Annotated[
        Literal["auto", "ram", "gpu", "off"],
        _run(
            "Where decoded records stay: ram (after their first reading), gpu (targets) or off. "
            "auto: gpu, else ram, where they take at most half of what is free."
        ),
    ] = "auto"
    val_every: Annotated[Count | None, _run("Steps between validations and checkpoints (default: a tenth).")] = None
    log_every: Annotated[Count, _run("Steps between log lines.")] = 20
    gradients_every: Annotated[int, Ge(0), _run("Steps between gradient norms per term; 0 is off.")] = 500
    keep_every: Annotated[
        Every | None,
        _run(
            "Also keep the full state every N iterations (500), or N epochs (5e), as checkpoints/step-000500.pt; "
            "--resume continues from one that is renamed to checkpoint.pt.",
            metavar="N|Ne",
        ),
    ] = None
    log: Annotated[
        Logs,
        _run(
            "Beside metrics.jsonl: tensorboard, wandb or trackio, as a list (a,b) or repeated. Nothing is sent unless "
            "you have configured that with wandb or trackio.",
            metavar="WHERE",
            repeated=True,
        ),
    ] = ()


TRAINING = (TrainSettings, SourceSettings, ImageSettings, CopySettings, MachineSettings)
"""All tables of a training, in the order of its recipe."""
