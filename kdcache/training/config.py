"""The settings of a training by owner, and the rules that involve several owners."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import tomli_w

from kdcache.data import Fold, check_folds_by, parse_fold
from kdcache.display import public_values
from kdcache.distill import parse_gate
from kdcache.errors import RecipeError
from kdcache.models.added_heads import split_auxiliary
from kdcache.run_folder import RECIPE, train_again
from kdcache.run_folder import Run as RunFolder
from kdcache.settings import entries, read_values
from kdcache.settings.methods import auto_method, parse_method
from kdcache.settings.recipe import FORMAT, to_recipe
from kdcache.settings.streams import check_rows, shares_of
from kdcache.settings.term import MASK, LossTerm, check_terms, no_effect, untaken
from kdcache.settings.terms import KL, ON_LABELS, CrossEntropy
from kdcache.settings.training import (
    DEFAULT_ITERATIONS,
    LEARNING_RATE,
    LEARNING_RATES,
    TRAINING,
    Augmentation,
    Data,
    Loss,
    Machine,
    Optimizer,
    Run,
)
from kdcache.settings.validate import check_names
from kdcache.tasks import SEGMENTATION, TASKS
from kdcache.training.streams import Stream, check_pastes, in_stream, make_stream, read_tables
from kdcache.training.term_setting import (
    check_balance,
    check_consistency,
    check_val_share,
    check_whole_batch,
    with_auxiliary,
)

_RESOLVED = ("augment", "scale", "flip", "shuffle", "labelled_share")
"""Settings that are filled in when the data of a stream are known."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a training, in one table for each subject. The run folder keeps them as `recipe.toml`.

    Sizes are (H, W) in pixels. Settings that depend on the data are None or `auto` until `resolved` fills them in.

    Attributes:
        run: verb, model, initial weights and logging.
        data: cache, data set, streams, folds and labels.
        loss: loss terms and their weights.
        augmentation: changes of the student's images.
        optimizer: batch size, length and learning rate.
        machine: device, workers and implementation.
        given: names of the settings that the user typed.
        copied: names of the settings that come from another run's recipe.toml.
        untaken: names of the settings that have no effect with these data.
    """

    run: Run
    data: Data
    loss: Loss
    augmentation: Augmentation
    optimizer: Optimizer
    machine: Machine
    given: frozenset[str] = field(default=frozenset(), compare=False)
    copied: frozenset[str] = field(default=frozenset(), compare=False)
    untaken: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        _check_run(self)
        if self.loss.balance != "fixed" or self.loss.task_weight:
            check_balance(self.loss.balance, self.loss.task_weight, self.tasks)
        if self.data.stream:  # each stream's settings were checked as those of a training
            self.rows()
            check_pastes(self.streams, self.augmentation.mix)
            return
        _check_data(self)
        _check_loss(self)
        jitter = 0 if self.augmentation.augment == "none" else self.augmentation.jitter
        check_consistency(self.terms, ema=self.optimizer.ema, jitter=jitter, mix=self.augmentation.mix)
        _check_label_teacher(self)
        check_whole_batch(self.all_terms, self.optimizer.accumulate, self.augmentation.mix)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "TrainConfig":
        """Make the settings of a training from a dict: name -> value. Raises: RecipeError that names the wrong flag."""
        settings = {name.replace("-", "_"): value for name, value in settings.items()}
        check_names(settings, entries(*TRAINING))
        settings |= _choices(settings, cls.of)
        if missing := [name for name, entry in entries(*TRAINING).items() if entry.required and name not in settings]:
            raise RecipeError(f"Missing --{missing[0]}", fix=f"Add --{missing[0]}.")
        return cls(**_by_owner(read_values(settings, *TRAINING)))

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of all tables in one dict: name -> value."""
        owners = (self.run, self.data, self.loss, self.augmentation, self.optimizer, self.machine)
        return {name: value for owner in owners for name, value in vars(owner).items()}

    def changed(self, **settings: Any) -> "TrainConfig":
        """Return a copy in which some settings (name=value) have new values. The new values are not checked."""
        return replace(self, **_by_owner(self.settings | settings))

    @property
    def streams(self) -> tuple[Stream["TrainConfig"], ...]:
        """The streams, each with complete settings. A training without streams counts as one stream, with the name "".

        Raises: RecipeError if the shares do not add up to 1, or would leave a stream without a sample in a batch.
        """
        if not self.data.stream:
            return (Stream("", 1.0, 1.0, None, None, None, self, {}),)
        streams = [make_stream(self.settings, table, TrainConfig.of) for table in read_tables(self.data.stream)]
        shares = shares_of({stream.name: stream.share for stream in streams})
        return tuple(replace(stream, share=share) for stream, share in zip(streams, shares, strict=True))

    def rows(self, parts: int = 1) -> list[int]:
        """Return the number of samples of each stream in a whole batch, in the order of the streams.

        `parts` is how many equal parts the batch is divided into: processes times `accumulate`. Each part must have
        samples of every stream.

        Raises: RecipeError if the batch is too small, or cannot be divided.
        """
        named = {stream.name: cast("float", stream.share) for stream in self.streams}
        return check_rows(named, self.optimizer.batch_size, 1 if self.augmentation.mix is None else 2, parts)

    @property
    def wants_kl(self) -> bool:
        """True if the loss includes KL."""
        return any(isinstance(term, KL) for term in self.all_terms)

    @property
    def all_terms(self) -> tuple[LossTerm, ...]:
        """All loss terms: `ce`, those of --method and --term, and `auxiliary` if the model has an auxiliary head."""
        loss = self.loss
        ce = CrossEntropy(
            weight=loss.ce_weight,
            label_smoothing=loss.label_smoothing,
            focal_gamma=loss.focal_gamma,
            class_weights=loss.class_weights,
        )
        kl = KL(weight=loss.kl_weight, temperature=loss.temperature)
        method = [kl if isinstance(term, KL) else term for term in parse_method(loss.method)]
        return (ce, *with_auxiliary((*method, *loss.term), self.run.model, loss.ce_weight))

    @property
    def active(self) -> list[LossTerm]:
        """The loss terms with a weight above 0."""
        return [term for term in self.all_terms if term.active]

    @property
    def taken(self) -> set[str]:
        """Names of the settings of loss terms, such as `temperature`, that have an effect in at least one stream."""
        if self.data.stream:
            return {name for stream in self.streams for name in stream.config.taken}
        taken = {name for term in self.active for name in term.takes}
        return taken if self.reads_targets else taken - {*MASK}

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The loss terms except `ce` and `kl`."""
        return tuple(term for term in self.all_terms if not term.fused)

    @property
    def teaches(self) -> bool:
        """True if a loss term learns from a teacher, or from labels as targets (the control)."""
        return any(term.reads_teacher for term in self.all_terms)

    @property
    def learns_unlabelled(self) -> bool:
        """True if the student also learns from samples without a label."""
        return self.reads_targets or any(not term.reads_teacher and not term.reads_labels for term in self.active)

    @property
    def learns_labels(self) -> bool:
        """True if the student learns from labels, by cross-entropy or another term.

        It is correct for a training on a single source. For several streams, use it on each stream's `config`.
        """
        on_labels = any(term.reads_labels for term in self.active)
        return self.data.labels != "none" and (on_labels or (self.teaches and self.loss.teacher == "labels"))

    @property
    def supervised(self) -> bool:
        """True if any stream learns classes or depth from labels or from a teacher."""
        if self.data.stream:
            weighed = [stream for stream in self.streams if stream.weight > 0]
            return any(stream.paste is not None or stream.config.supervised for stream in weighed)
        return self.teaches or self.learns_labels

    @property
    def reads_targets(self) -> bool:
        """True if the training reads targets or features from a cache."""
        return self.teaches and self.loss.teacher == "store"

    @property
    def reads_logits(self) -> bool:
        """True if the training reads a cache's segmentation logits, and not only its features."""
        return self.reads_targets and any(term.reads_logits for term in self.active)

    @property
    def target_heads(self) -> tuple[str, ...]:
        """Names of the teacher's heads whose targets the loss terms read. A cache may lack some of them."""
        if not self.reads_targets:
            return ()
        read = {term.task for term in self.active if term.reads_teacher} | ({SEGMENTATION} if self.wants_kl else set())
        return tuple(task for task in TASKS if task in read)

    @property
    def compares_metres(self) -> bool:
        """True if a term compares depth in metres. The term `depth-ssi` does so only if it learns from labels."""
        return any(term.in_metres and (term.reads_labels or self.reads_targets) for term in self.active)

    @property
    def label_tasks(self) -> tuple[str, ...]:
        """The tasks, `segmentation` or `depth`, whose labels are loaded with the samples.

        Depth is included only if a term reads its labels. The setting `labels` can restrict the tasks to named ones.
        Its value `none` is treated as `all` here.
        """
        used = TASKS if self.data.labels in ("all", "none") else self.data.labels.split("+")
        read = {SEGMENTATION, *(term.task for term in self.active if term.reads_labels)}
        return tuple(task for task in TASKS if task in used and task in read)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, `segmentation` or `depth`, that the training learns.

        A task counts if a stream of weight above 0 has a term of weight above 0 for it.
        """
        learnt = {term.task for term in self.active}
        if self.data.stream:
            learnt = {task for stream in self.streams if stream.weight > 0 for task in stream.config.tasks}
        return tuple(task for task in TASKS if task in learnt)

    @property
    def left_out(self) -> Fold | None:
        """The fold that the training leaves out, or None."""
        return None if self.data.fold is None else parse_fold(self.data.fold, self.data.folds_by)

    @property
    def validated_fold(self) -> Fold | None:
        """The fold of the validation data to validate on. None validates on all validation data."""
        return None if self.data.val_fold is None else parse_fold(self.data.val_fold, self.data.folds_by, "--val-fold")

    def resolved(
        self, samples: int, size: tuple[int, int], shuffle: str = "full", labelled_share: float | None = None
    ) -> "TrainConfig":
        """Return a copy in which the training data has decided the settings that the user left open.

        Lengths in epochs become iterations. Without a length, the default number of iterations is used. `val_every`
        becomes a tenth of the iterations if it is not set.

        Args:
            samples: number of samples of the training data.
            size: (H, W) to use if the user gave no size.
            shuffle: `full` or `window`, used instead of `auto`.
            labelled_share: the copy's `labelled_share`: the share of every batch that has labels. None draws all
                samples with equal probability.
        """
        optimizer, run = self.optimizer, self.run
        iterations = optimizer.iterations or DEFAULT_ITERATIONS
        if optimizer.epochs is not None:
            iterations = -(-optimizer.epochs * samples // optimizer.batch_size)
        settings: dict[str, Any] = {"iterations": iterations, "epochs": None, "labelled_share": labelled_share}
        settings["size"] = self.data.size or size
        settings["shuffle"] = shuffle if self.data.shuffle == "auto" else self.data.shuffle
        settings["val_every"] = run.val_every or max(1, iterations // 10)
        if isinstance(run.keep_every, str):
            settings["keep_every"] = -(-int(run.keep_every[:-1]) * samples // optimizer.batch_size)
        return self.changed(**settings)

    def with_streams(self, resolved: "Sequence[TrainConfig]") -> "TrainConfig":
        """Return a copy with the settings of `resolved` in its `stream` tables, one table for each stream.

        Copied are the settings that depend on a stream's data: `augment`, `scale`, `flip`, `shuffle`, `labelled_share`.

        Args:
            resolved: the settings of each stream after `TrainConfig.resolved`, in the order of the tables.
        """
        tables = []
        for table, config in zip(self.data.stream, resolved, strict=False):
            filled_in = {name: config.settings[name] for name in _RESOLVED}
            tables.append({**table, **to_recipe(filled_in)})
        return self.changed(stream=tuple(tables))

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings that took effect, as recipe.toml has them: flag without its dashes -> value."""
        return to_recipe({name: value for name, value in self.settings.items() if name not in self.untaken})

    def to_toml(self) -> str:
        """Return the text of recipe.toml, without the names of this machine's folders."""
        return tomli_w.dumps({"format": FORMAT, **public_values(self.recipe)})


def _by_owner(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return name of a table of `TrainConfig` -> the table with its settings."""
    return {
        table.__name__.lower(): table(**{name: settings[name] for name in entries(table) if name in settings})
        for table in TRAINING
    }


def _choices(settings: Mapping[str, Any], make: Callable[[Mapping[str, Any]], TrainConfig]) -> dict[str, Any]:
    """Return the settings that only depend on other settings: the learning rate, and the method for `auto`."""
    choices: dict[str, Any] = {}
    if settings.get("lr") is None:
        rates = {} if settings.get("optimizer") == "sgd" else LEARNING_RATES
        choices["lr"] = rates.get(split_auxiliary(str(settings.get("model")))[0], LEARNING_RATE)
    if settings.get("stream"):  # each has its own method: the training's is a summary
        tables = [make_stream(settings, table, make).table for table in read_tables(settings["stream"])]
        kinds = [kind.strip() for table in tables for kind in table["method"].split("+")]
        choices["stream"] = tuple(tables)
        choices["method"] = "+".join(dict.fromkeys(kind for kind in kinds if kind != "none")) or "none"
    elif settings.get("method", "auto") == "auto":
        parted = settings.get("mix") is not None or settings.get("accumulate") not in (None, 1)
        choices["method"] = auto_method(parted=parted) if settings.get("verb") == "train-student" else "none"
    return choices


def make_config(*, given: Collection[str] = (), copied: Collection[str] = (), **settings: Any) -> TrainConfig:
    """Make the settings of a training from keyword arguments. Raises: RecipeError that names the wrong flag.

    Args:
        given: names of the settings that the user typed. Each of them must have an effect.
        copied: names of the settings that come from another run's recipe. They may be without effect.
        settings: the settings by name.
    """
    config = TrainConfig.of(settings)
    _check_given(config, {name: settings[name] for name in given})
    return replace(config, given=frozenset(given), copied=frozenset(copied))


def _check_given(config: TrainConfig, given: Mapping[str, Any]) -> None:
    """Raise RecipeError if a setting of loss terms that the user typed has no effect."""
    loss = config.loss
    if idle := untaken(given, config.taken):
        raise no_effect(idle, f"--method {loss.method}, --ce-weight {loss.ce_weight:g}, --teacher {loss.teacher}")
    for stream in config.streams if "stream" in given else ():
        if idle := untaken(stream.table, stream.config.taken):
            raise in_stream(stream.name, no_effect(idle, f"--method {stream.config.loss.method}"))


def read_config(run: Path) -> TrainConfig:
    """Read the settings of a run from its recipe.toml. Raises: RecipeError if the file is missing or invalid."""
    path, recipe = run / RECIPE, RunFolder(run).recipe
    if recipe is None:
        raise RecipeError(
            f"Recipe not found: {path}", fix="Give the --out of a training that was begun with this version."
        )
    try:
        # The first runs have no fit. Loggers may change on a resume, and an earlier version had others.
        return TrainConfig.of({"fit": "squash", **recipe, "log": ()})
    except RecipeError as wrong:
        raise RecipeError(
            f"Cannot read {path}: {wrong.problem}" if recipe else f"The recipe {path} is empty", fix=train_again(run)
        ) from wrong


def _check_run(config: TrainConfig) -> None:
    """Check the settings that all streams share. Raises: RecipeError."""
    if config.data.val_fold is not None and config.data.val is None:
        raise RecipeError(
            f"Cannot use --val-fold {config.data.val_fold} without --val", fix="Add --val DATA, or leave it out."
        )
    if config.optimizer.schedule == "plateau" and config.data.val is None and config.data.val_share is None:
        raise RecipeError(
            "Cannot use --schedule plateau without --val: it follows the validations",
            fix="Add --val DATA, or use --schedule poly.",
        )
    reads_taps = config.reads_targets and any(term.reads_taps for term in config.active)
    data = config.data
    check_val_share(data.val_share, data.val, bool(data.stream), config.loss.method, reads_taps=reads_taps)
    if config.optimizer.iterations is not None and config.optimizer.epochs is not None:
        raise RecipeError(
            f"Use either --iterations {config.optimizer.iterations} or --epochs {config.optimizer.epochs}, not both",
            fix="Leave one of them out.",
        )


def _check_depth(config: TrainConfig) -> None:
    terms = ", ".join(term.kind for term in config.all_terms if term.numeric)
    if not config.compares_metres:
        return
    read = {term.task for term in config.active if term.numeric and term.reads_labels}
    if config.data.labels != "all" and not read <= set(config.data.labels.split("+")):
        raise RecipeError(
            f"Cannot learn {terms} with --labels {config.data.labels}: they read labels of depth",
            fix="Use --labels all or segmentation+depth, or compare with a cache: --term depth-silog,reference=teacher",
        )
    if config.augmentation.depth_zoom == "none" and config.augmentation.scale not in (None, (1.0, 1.0)):
        raise RecipeError(
            f"Cannot learn {terms} with --scale {config.augmentation.scale[0]:g}:{config.augmentation.scale[1]:g}: a "
            "zoomed image looks nearer than it is",
            fix="Leave --scale out, or divide the labels by the zoom: --depth-zoom divide",
        )


def _check_data(config: TrainConfig) -> None:
    _check_depth(config)
    low, high = config.augmentation.scale or (1.0, 1.0)
    if low > high:
        raise RecipeError(f"Invalid --scale {low}:{high}: it runs from small to large", fix=f"Use --scale {high}:{low}")
    check_folds_by(config.data.folds_by, folds=any((config.left_out, config.validated_fold)))
    if config.data.cache is None and config.data.data is None:
        raise RecipeError(
            "Nothing to train on: "
            + ("no --cache and no --data" if config.run.verb == "train-student" else "no --data and no --stream"),
            fix="Give --cache CACHE. Or give --data DATA, to learn from its labels only."
            if config.run.verb == "train-student"
            else "Give --data DATA, or --stream NAME,data=DATA for each of several data sets.",
        )
    if config.run.verb == "train-teacher" and config.reads_targets and config.data.cache is not None:
        raise RecipeError(
            f"Cannot use --method {config.loss.method} with the cache {', '.join(config.data.cache)} in train-teacher: "
            "it learns from labels only",
            fix="Leave the method out, so that the labels of the cache teach, or use train-student.",
        )
    if config.data.cache is None and config.reads_targets:
        kinds = [term.kind for term in config.all_terms if term.reads_teacher]
        raise RecipeError(
            f"Cannot learn {', '.join(kinds)} without --cache",
            fix="Give --cache CACHE. Or learn from labels only, by --method none or --teacher labels"
            + (", or from the student's own predictions, by=student or by=ema." if "consistency" in kinds else ".")
            if config.run.verb == "train-student"
            else f"Use terms on labels, {' or '.join(ON_LABELS)}. Or use train-student with --cache CACHE.",
        )


def _check_loss(config: TrainConfig) -> None:
    parse_gate(config.loss.gate)
    if not config.active:
        raise RecipeError(
            "Nothing to learn: every loss weight is 0", fix="Raise --ce-weight, --kl-weight or the weight of a --term."
        )
    if (config.loss.class_trust == "auto") != (config.loss.trust_against is not None):
        raise RecipeError(
            "Use --class-trust auto and --trust-against together: --class-trust is "
            f"{config.loss.class_trust or 'left out'}, and --trust-against {config.loss.trust_against or 'left out'}",
            fix="Give both: --class-trust auto --trust-against RUN, of a train-student --method none --fold 0/5",
        )


def _check_label_teacher(config: TrainConfig) -> None:
    if config.loss.teacher == "store":
        return
    if not config.teaches:
        raise RecipeError(
            f"Cannot use --teacher labels with --method {config.loss.method}: it reads no logits of a teacher",
            fix="Leave --teacher out, or choose another --method.",
        )
    check_terms(config.all_terms, None)
