"""The table of a training: train-teacher, train-student, their recipes and `TrainConfig` are made from it."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from kdcache.model_table import listed_specs
from kdcache.settings.parse import (
    Count,
    Decay,
    DistillSchedule,
    Every,
    Jitter,
    Logs,
    LrScales,
    Positive,
    Range,
    Sampling,
    Tasks,
    TaskWeights,
    Weight,
)
from kdcache.settings.setting import REQUIRED, setting
from kdcache.settings.shared import FOLDS_BY, CopySettings, ImageSettings, MachineSettings, SourceSettings
from kdcache.settings.term import TERMS, LossTerm, entries_of
from kdcache.settings.terms import KL, METHODS, CrossEntropy

DEFAULT_ITERATIONS = 4000
_TERMS = [TERMS[kind]() for kind in METHODS]
_TAUGHT = [term.kind for term in _TERMS if term.reads_teacher and not term.of_depth]
_UNTAUGHT = [term.kind for term in _TERMS if not term.reads_teacher and not term.of_depth]
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

_loss = partial(setting, panel=LOSS)


def _of(term: type[LossTerm], option: str) -> Any:
    """The setting of the whole training that sets an option of a term."""
    entry = entries_of(term)[option]
    return _loss(entry.default, entry.setting.help)


_gate = partial(setting, panel=GATE)
_part = partial(setting, panel=PART)
_view = partial(setting, panel=VIEW)
_step = partial(setting, panel=OPTIMIZATION)
_run = partial(setting, panel=RUN)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a training beside its images and the machine; lengths are optimizer steps."""

    verb: Literal["train-teacher", "train-student"]
    cache: str | None = setting(None, "Store that build-teacher-cache wrote, a folder or s3://BUCKET/PREFIX.")
    model: str = setting(
        REQUIRED,
        "What to train; see [bold]kdcache models[/]. MODEL+depth adds a depth head, MODEL+aux an auxiliary head of "
        "classes that serves the training alone.",
        metavar="SPEC",
        code=True,
        words=listed_specs,
    )
    val: str | None = setting(
        None, "Labelled data to validate on; best weights have the best mIoU, of depth alone the smallest rmse."
    )
    val_split: str = setting("val", "Split to validate on.")
    name: str | None = setting(
        None,
        "Name in tables and pictures (default: in tables the settings in which it differs, in pictures its folder).",
    )
    init: str | None = setting(None, "Start from a weights FILE, or [bold]default[/] (downloads).")

    stream: tuple[Any, ...] = setting(
        (),
        "One of several sources that share every batch: a name, then its settings, e.g. kitti,cache=kitti.zarr,"
        "share=0.5,weight=1,labels=none,method=kl; paste=classmix,paste-from=NAME pastes another's samples into its "
        "own. May be repeated; in a recipe, each is a table named stream. Other flags are those of all streams.",
        metavar="NAME,X=Y",
        repeated=True,
    )

    method: str = _loss(
        "auto",
        f"none (labels only, same pixels), or a sum such as kl or kl+at of {', '.join(_TAUGHT)}, and of "
        f"{', '.join(_UNTAUGHT)}, which need no teacher. auto is dist; kl with --mix or --accumulate, which dist "
        "cannot follow.",
        metavar="KIND+KIND",
        words=("auto", "none", *_TAUGHT, *_UNTAUGHT),
    )
    teacher: Literal["store", "labels"] = _loss(
        "store",
        "What the teacher terms learn from: the store's targets; or labels, averaged over the same cells in their "
        "place, the control that shows what a loss does without a teacher (--cache or --data).",
    )
    term: tuple[Any, ...] = _loss(
        (),
        "One more term with options of its own, e.g. cosine,weight=0.1,teacher_tap=layer4, or "
        "dkd,beta=0.5,temperature=1 (ImageNet's; its defaults 8 and 4 are CIFAR's). May be repeated; in a recipe, each "
        "is a table named term.",
        metavar="KIND,X=Y",
        repeated=True,
    )
    temperature: Positive = _of(KL, "temperature")
    kl_weight: Weight = _of(KL, "weight")
    ce_weight: Weight = _of(CrossEntropy, "weight")
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = _of(CrossEntropy, "label_smoothing")
    focal_gamma: Weight = _of(CrossEntropy, "focal_gamma")
    balance: Literal["fixed", "uncertainty"] = _loss(
        "fixed",
        "How the losses of two tasks become one: fixed weights (--task-weight), or weights that are learnt from each "
        "task's uncertainty (Kendall 2018).",
    )
    task_weight: TaskWeights = _loss(
        (),
        "Weight of a task where two are learnt, e.g. depth=0.7 (default: 0.5 each). May be repeated.",
        metavar="TASK=X",
        repeated=True,
    )
    impl: Literal["auto", "triton", "numba", "reference"] = _loss(
        "auto",
        "Implementation of the loss: triton (a GPU), numba (a CPU) or reference (plain PyTorch: slow and large, "
        "for comparison). auto: the first that runs here.",
    )
    class_weights: Literal["none", "median", "sqrt"] = _of(CrossEntropy, "class_weights")

    distill_void: bool = _gate(True, "Whether teacher terms count void pixels.")
    distill_on: Literal["labelled", "all"] = _gate(
        "all", "all: images without a label are distilled from their targets; or labelled."
    )
    distill_schedule: DistillSchedule = _gate(
        "constant",
        "Weight of the teacher terms, and of consistency: constant; fade: falls linearly to 0; warmup:N: rises "
        "linearly over the first N iterations.",
    )
    gate: str = _gate(
        "none", "Which pixels are distilled: none (all), correct (not where the label differs) or confidence:X."
    )
    class_trust: str | None = _gate(
        None,
        "Weight of each class that the teacher predicts: from a file, or by how far it beats --trust-against.",
        metavar="FILE|auto",
    )
    trust_against: str | None = _gate(None, "A run without a teacher that left out a --fold.", metavar="RUN")
    class_balance: Literal["none", "median", "sqrt"] = _gate(
        "none", "Weights of the targets by how rare their class is: none, median or sqrt."
    )

    labels: Tasks = _part(
        "all", "Which labels are used: all, none (a teacher's targets alone), or tasks as segmentation+depth."
    )
    limit_labels: Positive | None = _part(
        None, "Use the labels of so many samples. A store whose teacher had others of them is refused.", metavar="N"
    )
    labelled_share: Annotated[float, Ge(0.001), Le(0.999)] | None = _part(
        None,
        "Where only some samples have a label: their share of every batch (default: as many as there are, at "
        "least 0.5).",
        metavar="SHARE",
    )
    sampling: Sampling = _part(
        "even",
        "even: every sample once an epoch; rare: a rare class first, then a sample that shows it, so that most batches "
        "have some (needs labels); rare:T with another temperature than 0.01, of which a higher one is milder.",
        metavar="even|rare[:T]",
    )
    limit_views: Count | None = _part(None, "Replay the first so many views of a sample.", metavar="N", ranged=True)
    limit_samples: Positive | None = _part(None, "Use so many samples, below 1 a share; always the same.", metavar="N")
    fold: str | None = _part(
        None, "Leave out fold I, from 0, of K: for cross-fitting (--folds), or to evaluate on it.", metavar="I/K"
    )
    val_fold: str | None = _part(None, "Validate on this fold of the split alone.", metavar="I/K")
    folds_by: str | None = _part(None, FOLDS_BY, metavar="PATTERN")

    augment: Literal["auto", "warp", "replay", "none"] = _view(
        "auto",
        "warp (zoom, crop, flip pixels and targets alike), replay (as stored) or none. "
        "auto: replay where the store has several views, else warp.",
    )
    scale: Range | None = _view(
        None, "Random zoom (default: 0.5:2; where metric depth is compared 1:1).", metavar="MIN:MAX"
    )
    depth_zoom: Literal["none", "divide", "keep"] = _view(
        "none",
        "Metric depth in a zoomed image: none draws no zoom, divide divides it by the zoom, as what "
        "is twice as large looks half as far; or keep it.",
    )
    flip: bool | None = _view(
        None,
        "Random horizontal flip: yes, except where warp would mirror stored features, which needs --flip.",
        default_shown=False,
    )
    jitter: Jitter = _view(
        0.3,
        "Strength of colour jitter, 0 is off; or randaugment:N,M: N of RandAugment's colour operations, of magnitude M "
        "of 0 to 30.",
        metavar="X|randaugment:N,M",
    )
    mix: str | None = _view(
        None, "Paste between the samples of a batch: cutmix or classmix, with a share as cutmix:0.5."
    )

    iterations: Count | None = _step(None, f"Optimizer steps (default: {DEFAULT_ITERATIONS}).")
    epochs: Count | None = _step(None, "Instead of --iterations: passes over all samples.")
    batch_size: Count = _step(8, "Samples per step, of all processes together.")
    accumulate: Count = _step(
        1,
        "Process a batch in N parts, one after the other, in about an Nth of the memory: gradients add up to "
        "those of the whole batch, except that BatchNorm sees each part alone.",
        metavar="N",
        ranged=True,
    )
    optimizer: Literal["adamw", "adam", "sgd"] = _step("adamw", "adamw, adam or sgd.")
    lr: Positive = _step(
        LEARNING_RATE,
        "Learning rate at its highest (default: 6e-3 for kdcache:tiny, 2e-3 for kdcache:base, else 1e-3).",
        automatic=True,
    )
    lr_scale: LrScales = _step(
        (),
        "Factor on the learning rate of parameters whose name begins with PREFIX, e.g. encoder=0.1 where that is "
        "pretrained. May be repeated; the longest prefix counts.",
        metavar="PREFIX=X",
        repeated=True,
    )
    weight_decay: Weight = _step(0.01, "Weight decay, not of biases and normalisations.")
    schedule: Literal["poly", "plateau", "constant"] = _step(
        "poly", "poly, plateau (halve when mIoU stalls) or constant."
    )
    warmup: Annotated[int, Ge(0)] = _step(0, "Steps of linear warm-up.")
    ema: Decay | None = _step(
        None,
        "Also keep an exponential moving average of the weights with this decay, e.g. 0.999: it is validated and "
        "saved beside them, as best-ema and last-ema (default: none).",
        metavar="DECAY",
    )
    clip_grad: Weight = _step(0.0, "Largest gradient norm; 0 does not clip.")
    seed: Annotated[int, Ge(0), Lt(2**63)] = _step(0, "Seed of weights, order and augmentation.")

    amp: Literal["auto", "off", "bf16"] = _run("auto", "auto (bf16 on a GPU), off or bf16.")
    step: Literal["auto", "eager", "compiled", "graphed"] = _run(
        "auto",
        "How a training step runs: eager, compiled (torch.compile: up to a minute at first, then faster) or "
        "graphed (compiled and replayed as one CUDA graph: a small student waits for launches otherwise). "
        "auto: graphed on a GPU, eager on a CPU.",
    )
    workers: Annotated[int, Ge(0), Le(256)] = _run(
        0,
        "Workers that load ahead: threads from a store, processes from image files; 0 loads between steps (and is "
        "the default on a CPU).",
        automatic=True,
    )
    shuffle: Literal["auto", "full", "window"] = _run(
        "auto",
        "Order of an epoch: full (all records), or window (a few shards at a time, for a store that is far away). "
        "auto: window for a remote store, else full.",
    )
    resident: Literal["auto", "ram", "gpu", "off"] = _run(
        "auto",
        "Where decoded records stay: ram (after their first reading), gpu (targets) or off. "
        "auto: gpu, else ram, where they take at most half of what is free.",
    )
    val_every: Count | None = _run(None, "Steps between validations and checkpoints (default: a tenth).")
    log_every: Count = _run(20, "Steps between log lines.")
    gradients_every: Annotated[int, Ge(0)] = _run(500, "Steps between gradient norms per term; 0 is off.")
    keep_every: Every | None = _run(
        None,
        "Also keep the full state every N iterations (500), or N epochs (5e), as checkpoints/step-000500.pt; "
        "--resume continues from one that is renamed to checkpoint.pt.",
        metavar="N|Ne",
    )
    log: Logs = _run(
        (),
        "Also send metrics to tensorboard or wandb, as a list (a,b) or repeated. wandb sends where you configured it.",
        metavar="WHERE",
        repeated=True,
    )


TRAINING = (TrainSettings, SourceSettings, ImageSettings, CopySettings, MachineSettings)
"""All tables of a training, in the order of its recipe."""
