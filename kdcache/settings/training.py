"""The settings of a training, by their owner. Verbs, recipes and `TrainConfig` are made from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from kdcache.errors import RecipeError
from kdcache.model_table import listed_specs
from kdcache.settings.methods import parse_term
from kdcache.settings.parse import (
    Caches,
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
from kdcache.settings.setting import REQUIRED, Spelling, setting
from kdcache.settings.shared import (
    DATA,
    FOLDS_BY,
    MACHINE,
    CopySettings,
    ImageSettings,
    MachineSettings,
    SourceSettings,
)
from kdcache.settings.term import TERMS, LossTerm, Share, entries_of
from kdcache.settings.terms import KL, METHODS, CrossEntropy

DEFAULT_ITERATIONS = 4000
_TERMS = [TERMS[kind]() for kind in METHODS]
_TAUGHT = [term.kind for term in _TERMS if term.reads_teacher and not term.numeric]
_UNTAUGHT = [term.kind for term in _TERMS if not term.reads_teacher and not term.numeric]
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
LOGGING = "Logging and checkpoints"

_loss = partial(setting, panel=LOSS)


def _of(term: type[LossTerm], option: str) -> Any:
    """Return the setting of the whole training that sets an option of a term."""
    entry = entries_of(term)[option]
    return _loss(entry.default, entry.setting.help)


_gate = partial(setting, panel=GATE)
_part = partial(setting, panel=PART)
_view = partial(setting, panel=VIEW)
_step = partial(setting, panel=OPTIMIZATION)
_log = partial(setting, panel=LOGGING)
_machine = partial(setting, panel=MACHINE)
_data = partial(setting, panel=DATA)


def parse_terms(value: Any) -> tuple[LossTerm, ...]:
    """Return the loss terms of a list, or of a single term: a text, a table of a recipe, or a LossTerm.

    Raises:
        ValueError: the value is of another type.
        RecipeError: a term is invalid (see `parse_term`).
    """
    if not isinstance(value, str | Mapping | list | tuple | LossTerm):
        raise ValueError
    return tuple(map(parse_term, value if isinstance(value, list | tuple) else (value,)))


Terms = Annotated[
    tuple[Any, ...],
    Spelling(
        parse_terms,
        show=lambda terms: [term.table() for term in terms],
        rule="a list of loss terms, each KIND,OPTION=VALUE",
        example="cosine,weight=0.1",
        text_only=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings for what to train, and for logs and checkpoints. Each field is a flag."""

    verb: Literal["train-teacher", "train-student"] = setting(
        REQUIRED, "The command that trains: train-teacher or train-student."
    )
    model: str = setting(
        REQUIRED,
        "What to train, as [bold]kdcache models[/] lists it. MODEL+depth adds a head.",
        metavar="SPEC",
        code=True,
        words=listed_specs,
    )
    name: str | None = setting(
        None,
        "The run's name in tables and pictures (default: its settings or folder).",
    )
    init: str | None = setting(None, "Start from a RUN, a weights FILE, or [bold]default[/] (published weights).")
    val_every: Count | None = _log(None, "Steps between validations and checkpoints (default: a tenth of all).")
    log_every: Count = _log(20, "Steps between log lines.")
    gradients_every: Annotated[int, Ge(0)] = _log(500, "Steps between logs of each term's gradient norm; 0 is off.")
    keep_every: Every | None = _log(
        None,
        "Also keep a checkpoint every N steps (500) or epochs (5e).",
        metavar="N|Ne",
    )
    log: Logs = _log(
        (),
        "Also send metrics to tensorboard or wandb. May be repeated.",
        metavar="WHERE",
        repeated=True,
    )


@dataclass(frozen=True, kw_only=True)
class Data(SourceSettings, ImageSettings, CopySettings):
    """Settings for the samples that a training uses, and for the validation data. Each field is a flag."""

    cache: Caches | None = _data(
        None,
        "Cache of build-teacher-cache. Repeat it as NAME=CACHE to join another.",
        metavar="[NAME=]CACHE",
        repeated=True,
    )
    stream: tuple[Any, ...] = _data(
        (),
        "A stream, one of several data sources: NAME,cache=CACHE,share=0.5. May be repeated.",
        metavar="NAME,X=Y",
        repeated=True,
    )
    val: str | None = _data(None, "Labelled data to validate on.")
    val_split: str = _data("val", "Split to validate on.")
    val_share: Share | None = _data(
        None, "Validate without labels: hold out this share, measure its feature loss.", metavar="SHARE"
    )
    labels: Tasks = _part("all", "Which labels are used: all, none, or tasks as segmentation+depth.")
    limit_labels: Positive | None = _part(None, "Use labels of only N samples (below 1: a share).", metavar="N")
    labels_from: Path | None = _part(None, "Use labels of only the sample ids in FILE, one a line.", metavar="FILE")
    labelled_share: Annotated[float, Ge(0.001), Le(0.999)] | None = _part(
        None,
        "Share of labelled samples in every batch (default: as in the data).",
        metavar="SHARE",
    )
    sampling: Sampling = _part(
        "even",
        "even: each sample once an epoch. rare: rare classes more often.",
        metavar="even|rare[:T]",
    )
    limit_views: Count | None = _part(
        None, "Replay only the first N stored views of each sample.", metavar="N", ranged=True
    )
    limit_samples: Positive | None = _part(None, "Use only N samples (below 1: a share), always the same.", metavar="N")
    shuffle: Literal["auto", "full", "window"] = _part(
        "auto",
        "Order of an epoch: full, or window (few shards at a time).",
    )
    fold: str | None = _part(None, "Do not train on fold I of K, counted from 0.", metavar="I/K")
    val_fold: str | None = _part(None, "Validate only on fold I of K, counted from 0.", metavar="I/K")
    folds_by: str | None = _part(None, FOLDS_BY, metavar="PATTERN")

    def __post_init__(self) -> None:
        others = {"--limit-labels": self.limit_labels is not None, "--labels none": self.labels == "none"}
        if self.labels_from is not None and (flag := next((name for name, given in others.items() if given), None)):
            raise RecipeError(f"Use either --labels-from or {flag}, not both", fix="Leave one of them out.")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Settings for the loss terms, and for the pixels and samples that they count. Each field is a flag."""

    method: str = _loss(
        "auto",
        "Loss terms such as kl+at, or none (auto: dist, with --mix kl).",
        metavar="KIND+KIND",
        words=("auto", "none", *_TAUGHT, *_UNTAUGHT),
    )
    teacher: Literal["store", "labels"] = _loss(
        "store",
        "Targets of teacher terms: store (the cache's), or labels as a control.",
    )
    term: Terms = _loss(
        (),
        "One more term, e.g. cosine,weight=0.1,teacher_tap=layer4. May be repeated.",
        metavar="KIND,X=Y",
        repeated=True,
    )
    temperature: Positive = _of(KL, "temperature")
    kl_weight: Weight = _of(KL, "weight")
    ce_weight: Weight = _of(CrossEntropy, "weight")
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = _of(CrossEntropy, "label_smoothing")
    focal_gamma: Weight = _of(CrossEntropy, "focal_gamma")
    class_weights: Literal["none", "median", "sqrt"] = _of(CrossEntropy, "class_weights")
    balance: Literal["fixed", "uncertainty"] = _loss(
        "fixed",
        "Weights of segmentation and depth: fixed, or learnt (uncertainty).",
    )
    task_weight: TaskWeights = _loss(
        (),
        "Weight of a task, e.g. depth=0.7 (default: 0.5 each). May be repeated.",
        metavar="TASK=X",
        repeated=True,
    )
    distill_void: bool = _gate(True, "Whether teacher terms count void pixels.")
    distill_on: Literal["labelled", "all"] = _gate("all", "Images that teacher terms use: all, or only labelled ones.")
    distill_schedule: DistillSchedule = _gate(
        "constant",
        "Weight of the teacher terms over time: constant, fade or warmup:N.",
    )
    gate: str = _gate("none", "Which pixels are distilled: none (all), correct, or confidence:X.")
    class_trust: str | None = _gate(
        None,
        "Weights of the teacher's classes: a FILE, or auto (from --trust-against).",
        metavar="FILE|auto",
    )
    trust_against: str | None = _gate(
        None, "Labels-only run for --class-trust auto, trained with --fold.", metavar="RUN"
    )
    class_balance: Literal["none", "median", "sqrt"] = _gate(
        "none", "Weights of targets by how rare the teacher's class is."
    )


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Settings for random changes of images, drawn anew each time a step takes an image. Each field is a flag."""

    augment: Literal["auto", "warp", "replay", "none"] = _view(
        "auto",
        "warp (random crops), replay (stored views), none, or auto (by cache).",
    )
    scale: Range | None = _view(
        None, "Range of the random zoom (default: 0.5:2, for metric depth 1:1).", metavar="MIN:MAX"
    )
    depth_zoom: Literal["none", "divide", "keep"] = _view(
        "none",
        "Metres in zoomed images: divide by the zoom, keep, none (no zoom).",
    )
    flip: bool | None = _view(
        None,
        "Random horizontal flip (default: yes, unless features forbid it).",
        default_shown=False,
    )
    jitter: Jitter = _view(
        0.3,
        "Strength of colour jitter, 0 for none, or randaugment:N,M.",
        metavar="X|randaugment:N,M",
    )
    mix: str | None = _view(None, "Paste between samples: cutmix or classmix. For half of them: cutmix:0.5.")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Settings for the optimizer and the length of a training, in optimizer steps. Each field is a flag."""

    iterations: Count | None = _step(None, f"Optimizer steps (default: {DEFAULT_ITERATIONS}).")
    epochs: Count | None = _step(None, "Passes over all samples, instead of --iterations.")
    batch_size: Count = _step(8, "Samples per step, of all processes together.")
    accumulate: Count = _step(
        1,
        "Process a batch in N parts to save memory, with equal gradients.",
        metavar="N",
        ranged=True,
    )
    optimizer: Literal["adamw", "adam", "sgd"] = _step("adamw", "The optimizer: adamw, adam or sgd.")
    lr: Positive = _step(
        LEARNING_RATE,
        "Highest learning rate (default: 6e-3 kdcache:tiny, 2e-3 kdcache:base, else 1e-3).",
        automatic=True,
    )
    lr_scale: LrScales = _step(
        (),
        "Learning rate factor by parameter name, e.g. encoder=0.1. May be repeated.",
        metavar="PREFIX=X",
        repeated=True,
    )
    weight_decay: Weight = _step(0.01, "Weight decay, except for biases and normalisation layers.")
    schedule: Literal["poly", "plateau", "constant"] = _step(
        "poly", "How the learning rate falls: poly, plateau (halved when scores stall), constant."
    )
    warmup: Annotated[int, Ge(0)] = _step(0, "Steps over which the learning rate rises linearly at first.")
    ema: Decay | None = _step(
        None,
        "Also average the weights, with this decay per step, e.g. 0.999.",
        metavar="DECAY",
    )
    clip_grad: Weight = _step(0.0, "Largest norm of the gradient; 0 does not clip.")
    seed: Annotated[int, Ge(0), Lt(2**63)] = _step(0, "Random seed of weights, sample order and augmentation.")
    amp: Literal["auto", "off", "bf16"] = _machine("auto", "Mixed precision: bf16, off, or auto (bf16 on a GPU).")


@dataclass(frozen=True, kw_only=True)
class Machine(MachineSettings):
    """Settings for how steps run on this machine. They do not change what is learnt. Each field is a flag."""

    step: Literal["auto", "eager", "compiled", "graphed"] = _machine(
        "auto",
        "How a step runs: eager, compiled, or graphed (a CUDA graph).",
    )
    workers: Annotated[int, Ge(0), Le(256)] = _machine(
        0,
        "Processes or threads that load batches (default: by the data's source).",
        automatic=True,
    )
    resident: Literal["auto", "ram", "gpu", "off"] = _machine(
        "auto",
        "Where decoded records of the cache stay: ram, gpu or off.",
    )
    impl: Literal["auto", "triton", "numba", "reference"] = _machine(
        "auto",
        "Implementation of the loss (auto: triton on CUDA, else numba or torch).",
    )


TRAINING = (Run, Data, Loss, Augmentation, Optimizer, Machine)
"""All tables of a training, by their owner, in the order of its recipe."""
