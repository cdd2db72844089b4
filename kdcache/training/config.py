"""The settings of a training as one strict model, made from their tables."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import tomli_w
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

from kdcache.data import Fold, check_folds_by, parse_fold
from kdcache.display import public_values
from kdcache.distill import parse_gate
from kdcache.errors import RecipeError
from kdcache.heads import DEPTH, SEGMENTATION, TASKS
from kdcache.models.added_heads import split_auxiliary
from kdcache.run_folder import RECIPE, Run, train_again
from kdcache.settings import entries
from kdcache.settings.parse import as_typed
from kdcache.settings.removed import SETTINGS, removal, without_removed
from kdcache.settings.setting import in_words
from kdcache.settings.shared import CopySettings, ImageSettings, MachineSettings, SourceSettings
from kdcache.settings.streams import StreamSettings, check_rows, shares_of
from kdcache.settings.term import MASK, LossTerm, check_terms, no_effect, untaken
from kdcache.settings.terms import KL, CrossEntropy, auto_method, parse_method
from kdcache.settings.training import DEFAULT_ITERATIONS, LEARNING_RATE, LEARNING_RATES, TRAINING, TrainSettings
from kdcache.training.streams import Stream, StreamOwn, check_pastes, flag_of, in_stream, make_stream, read_tables
from kdcache.training.term_setting import (
    Terms,
    check_balance,
    check_consistency,
    check_val_share,
    check_whole_batch,
    with_auxiliary,
)

_RESOLVED = ("augment", "scale", "flip", "shuffle", "labelled_share")
"""Settings that are filled in when the data of a stream are known."""


class TrainConfig(BaseModel, MachineSettings, CopySettings, ImageSettings, SourceSettings, TrainSettings, frozen=True):
    """Everything that decides a training. Written whole into the run folder as `recipe.toml`.

    Its fields are those of the tables. Sizes are (H, W) in pixels; `iterations` are optimizer steps; a recipe file has
    the same keys with dashes and values as one types them. What depends on the data (None here) is filled in by
    `resolved`.
    """

    model_config = ConfigDict(extra="forbid", alias_generator=flag_of, populate_by_name=True)

    term: Terms

    _given: frozenset[str] = PrivateAttr(default=frozenset())
    """Names of the settings that somebody typed."""

    @model_validator(mode="before")
    @classmethod
    def _choices(cls, settings: Any) -> Any:
        """Fill in what depends on other settings alone: the learning rate, and the method `auto`."""
        if not isinstance(settings, dict):
            return settings
        settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
        choices: dict[str, Any] = {}
        if settings.get("stream"):
            tables = read_tables(settings["stream"])
            choices["stream"] = tuple(make_stream(settings, table, cls, _refused).table for table in tables)
        if settings.get("lr") is None:
            rates = {} if settings.get("optimizer") == "sgd" else LEARNING_RATES
            choices["lr"] = rates.get(split_auxiliary(str(settings.get("model")))[0], LEARNING_RATE)
        if settings.get("stream"):  # each has its own by now: the training's is a summary of what they learn by
            kinds = [kind.strip() for table in choices["stream"] for kind in table["method"].split("+")]
            choices["method"] = "+".join(dict.fromkeys(kind for kind in kinds if kind != "none")) or "none"
        elif settings.get("method", "auto") == "auto":
            parted = settings.get("mix") is not None or settings.get("accumulate") not in (None, 1)
            choices["method"] = auto_method(parted=parted) if settings.get("verb") == "train-student" else "none"
        return settings | choices

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        _check_run(self)
        if self.balance != "fixed" or self.task_weight:
            check_balance(self.balance, self.task_weight, self.tasks)
        if self.stream:  # each stream's settings were checked as those of a training
            self.rows()
            check_pastes(self.streams, self.mix)
            return self
        _check_data(self)
        _check_loss(self)
        jitter = 0 if self.augment == "none" else self.jitter
        check_consistency(self.terms, ema=self.ema, jitter=jitter, mix=self.mix)
        _check_teaching(self)
        _check_label_teacher(self)
        check_whole_batch(self.loss, self.accumulate, self.mix)
        return self

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings that somebody typed, of a config that `make_config` made."""
        return self._given

    @property
    def streams(self) -> tuple[Stream["TrainConfig"], ...]:
        """The streams, each with settings as of a training of its own; without `stream` the training is the only one.

        Raises: RecipeError for shares that do not sum up to 1, or leave a stream without a row of a batch.
        """
        if not self.stream:
            return (Stream("", 1.0, 1.0, None, None, None, self, {}),)
        training = self.model_dump(exclude={"stream"})
        made = [make_stream(training, table, TrainConfig, _refused) for table in read_tables(self.stream)]
        shares = shares_of({stream.name: stream.share for stream in made})
        return tuple(replace(stream, share=share) for stream, share in zip(made, shares, strict=True))

    def rows(self, parts: int = 1) -> list[int]:
        """Rows of every batch that each stream has, which `parts` processes and parts share. Raises: RecipeError."""
        named = {stream.name: cast("float", stream.share) for stream in self.streams}
        return check_rows(named, self.batch_size, 1 if self.mix is None else 2, parts)

    @property
    def wants_kl(self) -> bool:
        """Whether KL is a part of the loss."""
        return any(isinstance(term, KL) for term in self.loss)

    @property
    def loss(self) -> tuple[LossTerm, ...]:
        """All terms: `ce`, those of the method, those listed one by one, and of an auxiliary head."""
        ce = CrossEntropy(
            weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            focal_gamma=self.focal_gamma,
            class_weights=self.class_weights,
        )
        kl = KL(weight=self.kl_weight, temperature=self.temperature)
        method = [kl if isinstance(term, KL) else term for term in parse_method(self.method)]
        return (ce, *with_auxiliary((*method, *self.term), self.model, self.ce_weight))

    @property
    def active(self) -> list[LossTerm]:
        """The terms that have a weight."""
        return [term for term in self.loss if term.active]

    @property
    def taken(self) -> set[str]:
        """The settings of terms that set one of the loss, of any stream."""
        if self.stream:
            return {name for stream in self.streams for name in stream.config.taken}
        taken = {name for term in self.active for name in term.takes}
        return taken if self.reads_targets else taken - {*MASK}

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """The terms beside CE and KL, which are fused."""
        return tuple(term for term in self.loss if not term.fused)

    @property
    def teaches(self) -> bool:
        """Whether anything is learnt from a teacher, or from labels in its place."""
        return any(term.reads_teacher for term in self.loss)

    @property
    def learns_unlabelled(self) -> bool:
        """Whether samples without a label teach: by a store's targets, or by a term on predictions alone."""
        return self.reads_targets or any(not term.reads_teacher and not term.reads_labels for term in self.active)

    @property
    def learns_labels(self) -> bool:
        """Whether a training of one source learns from labels, by cross-entropy or terms."""
        on_labels = any(term.reads_labels for term in self.active)
        return self.labels != "none" and (on_labels or (self.teaches and self.teacher == "labels"))

    @property
    def supervised(self) -> bool:
        """Whether classes or depth are learnt from labels or from a teacher, by any stream."""
        if self.stream:
            weighed = [stream for stream in self.streams if stream.weight > 0]
            return any(stream.paste is not None or stream.config.supervised for stream in weighed)
        return self.teaches or self.learns_labels

    @property
    def reads_targets(self) -> bool:
        """Whether a store's targets are read."""
        return self.teaches and self.teacher == "store"

    @property
    def reads_logits(self) -> bool:
        """Whether a store's targets of classes are read, and not its features alone."""
        return self.reads_targets and any(term.reads_logits for term in self.active)

    @property
    def reads_depth(self) -> bool:
        """Whether labels of depth are read."""
        return any(term.of_depth and term.reads_labels for term in self.active)

    @property
    def target_heads(self) -> tuple[str, ...]:
        """The heads of a store whose targets are read, where it has them."""
        if not self.reads_targets:
            return ()
        read = {term.task for term in self.active if term.reads_teacher} | ({SEGMENTATION} if self.wants_kl else set())
        return tuple(task for task in TASKS if task in read)

    @property
    def compares_metres(self) -> bool:
        """Whether metres are compared, of labels or of a teacher; `depth-ssi` of a teacher sees neither its scale."""
        return any(term.in_metres and (term.reads_labels or self.reads_targets) for term in self.active)

    @property
    def label_tasks(self) -> tuple[str, ...]:
        """The tasks whose labels are used."""
        used = (SEGMENTATION, DEPTH) if self.labels in ("all", "none") else self.labels.split("+")
        return tuple(task for task in (SEGMENTATION, DEPTH) if task in used and (task != DEPTH or self.reads_depth))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are learnt, by any stream of weight above 0: those with a part of weight above 0."""
        learnt = {term.task for term in self.active}
        if self.stream:
            learnt = {task for stream in self.streams if stream.weight > 0 for task in stream.config.tasks}
        return tuple(task for task in TASKS if task in learnt)

    @property
    def left_out(self) -> Fold | None:
        """The fold of the samples that the training does not see."""
        return None if self.fold is None else parse_fold(self.fold, self.folds_by)

    @property
    def validated_fold(self) -> Fold | None:
        """The fold of the validation data that the training is validated on; None for all of it."""
        return None if self.val_fold is None else parse_fold(self.val_fold, self.folds_by)

    def resolved(
        self, samples: int, size: tuple[int, int], shuffle: str = "full", labelled_share: float | None = None
    ) -> "TrainConfig":
        """Return the settings with size, iterations, val_every, shuffle and labelled_share filled in, in iterations.

        Args:
            samples: number of samples of the training data, for epochs.
            size: (H, W) to use when none was given.
            shuffle: full or window, in place of auto; a run keeps it, also where its store moves.
            labelled_share: share of every batch that has labels; None draws all samples alike.
        """
        iterations = self.iterations or DEFAULT_ITERATIONS
        if self.epochs is not None:
            iterations = -(-self.epochs * samples // self.batch_size)
        val_every = self.val_every or max(1, iterations // 10)
        settings = self.model_dump() | {"size": self.size or size, "iterations": iterations, "epochs": None}
        settings["shuffle"] = shuffle if self.shuffle == "auto" else self.shuffle
        settings["labelled_share"] = labelled_share
        if isinstance(self.keep_every, str):
            settings["keep_every"] = -(-int(self.keep_every[:-1]) * samples // self.batch_size)
        return TrainConfig(**settings | {"val_every": val_every})

    def with_streams(self, resolved: "Sequence[TrainConfig]") -> "TrainConfig":
        """Return the settings whose streams have what `resolved` filled in; without streams they are resolved alone."""
        tables = []
        for table, own in zip(self.stream, resolved, strict=False):
            chosen = own.model_dump(mode="json", by_alias=True, exclude_none=True, include=set(_RESOLVED))
            tables.append({**table, **chosen})
        return self.model_copy(update={"stream": tuple(tables)})

    def to_toml(self) -> str:
        """Return the recipe file, without folders of this machine; None is left out, for TOML has no null."""
        return tomli_w.dumps(public_values(self.model_dump(mode="json", by_alias=True, exclude_none=True)))


def make_config(*, given: Collection[str] = (), **settings: Any) -> TrainConfig:
    """Make a config from settings by name. Raises: RecipeError that names the flag at fault.

    Args:
        given: names of the settings that somebody typed, which must have an effect.
    """
    try:
        config = TrainConfig(**settings)
    except ValidationError as error:
        raise _refused(error, settings) from error
    _check_given(config, {name: settings[name] for name in given})
    cast("Any", config)._given = frozenset(given)
    return config


def _check_given(config: TrainConfig, given: Mapping[str, Any]) -> None:
    """Check that a term takes each setting of terms that somebody typed. Raises: RecipeError that names all others."""
    if idle := untaken(given, config.taken):
        raise no_effect(idle, f"--method {config.method}, --ce-weight {config.ce_weight:g}, --teacher {config.teacher}")
    for stream in config.streams if "stream" in given else ():
        if idle := untaken(stream.table, stream.config.taken):
            raise in_stream(stream.name, no_effect(idle, f"--method {stream.config.method}"))


def _refused(error: ValidationError, settings: Mapping[str, Any]) -> RecipeError:
    """Return the error for the first setting that is wrong, with its flag and the values it takes."""
    first = error.errors()[0]
    name = str(first["loc"][0]).replace("-", "_") if first["loc"] else ""
    flag, value = "--" + flag_of(name), settings.get(name, first["input"])
    fields = StreamOwn.model_fields | TrainConfig.model_fields
    if first["type"] == "extra_forbidden":
        if (gone := removal(flag, SETTINGS)) is not None:
            return gone
        near = difflib.get_close_matches(name, fields, n=1)
        remedy = f"did you mean --{flag_of(near[0])}?" if near else "leave it out: --help lists those there are"
        return RecipeError("every setting is one that a training has", received=f"{flag} {value}", remedy=remedy)
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return RecipeError("a training is given all that it needs", received=f"no {flag}", remedy=f"give {flag}")
    field = fields[name]
    entry, default = entries(*TRAINING, StreamSettings).get(name), field.get_default()
    rule = first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else in_words(field)
    instance = None if default in (None, ()) or field.is_required() else str(default)
    if entry is not None and entry.spelling is not None:
        rule, instance = entry.spelling.rule or rule, entry.spelling.example
    return RecipeError(
        f"{flag} is {rule}",
        received=f"{flag} {as_typed(value)}",
        remedy=f"give one of these, for instance {flag} {instance}" if instance else "correct it, or leave it out",
    )


def read_config(run: Path) -> TrainConfig:
    """Read the resolved recipe of a run. Raises: RecipeError when it is missing or malformed."""
    path, recipe = run / RECIPE, Run(run).recipe
    if recipe is None:
        raise RecipeError(
            "a run has a resolved recipe",
            received=f"{path}, which is not there",
            remedy="give the --out of a training that was begun with this version",
        )
    try:
        # The first runs have no fit. Loggers may change on a resume, and an earlier version had others.
        return TrainConfig.model_validate({"fit": "squash", **without_removed(recipe), "log": ()})
    except ValidationError as error:
        wrong = _refused(error, {})
        raise RecipeError(
            "a run has a resolved recipe of this version",
            received=f"{path}: {wrong.received}; {wrong.rule}" if recipe else f"{path} is empty",
            remedy=train_again(run),
        ) from error


def _check_run(config: TrainConfig) -> None:
    """Check what concerns all streams."""
    if config.val_fold is not None and config.val is None:
        raise RecipeError(
            "--val-fold is a part of the validation data",
            received=f"--val-fold {config.val_fold} without --val",
            remedy="add --val DATA, or leave it out",
        )
    if config.schedule == "plateau" and config.val is None and config.val_share is None:
        raise RecipeError(
            "--schedule plateau follows the validations",
            received="--schedule plateau without --val",
            remedy="add --val DATA, or use --schedule poly",
        )
    reads_taps = config.reads_targets and any(term.reads_taps for term in config.active)
    check_val_share(config.val_share, config.val, bool(config.stream), config.method, reads_taps=reads_taps)
    if config.iterations is not None and config.epochs is not None:
        raise RecipeError(
            "a training's length is given once",
            received=f"--iterations {config.iterations} and --epochs {config.epochs}",
            remedy="leave one of them out",
        )


def _check_depth(config: TrainConfig) -> None:
    terms = ", ".join(term.kind for term in config.loss if term.of_depth)
    if not config.compares_metres:
        return
    if config.reads_depth and config.labels != "all" and "depth" not in config.labels.split("+"):
        raise RecipeError(
            "a term of depth on labels reads labels of depth",
            received=f"{terms} with --labels {config.labels}",
            remedy="use --labels all or segmentation+depth, or compare with a store: --term depth-silog,"
            "reference=teacher",
        )
    if config.depth_zoom == "none" and config.scale not in (None, (1.0, 1.0)):
        raise RecipeError(
            "a zoomed image looks nearer than it is: metric depth is drawn without zoom",
            received=f"{terms} with --scale {config.scale[0]:g}:{config.scale[1]:g}",
            remedy="leave --scale out; or divide the labels by the zoom, --depth-zoom divide",
        )


def _check_data(config: TrainConfig) -> None:
    _check_depth(config)
    low, high = config.scale or (1.0, 1.0)
    if low > high:
        raise RecipeError(
            "--scale runs from small to large", received=f"{low}:{high}", remedy=f"use --scale {high}:{low}"
        )
    check_folds_by(config.folds_by, folds=any((config.left_out, config.validated_fold)))
    if config.cache is None and config.data is None:
        raise RecipeError(
            "there must be something to train on",
            received="no --cache and no --data" if config.verb == "train-student" else "no --data and no --stream",
            remedy="give --cache STORE; or --data DATA, to learn from its labels alone"
            if config.verb == "train-student"
            else "give --data DATA, or --stream NAME,data=DATA for each of several data sets",
        )
    if config.verb == "train-teacher" and config.reads_targets and config.cache is not None:
        raise RecipeError(
            "train-teacher learns from labels alone",
            received=f"--method {config.method} with the store {config.cache}",
            remedy="leave the method out, so that the labels of the store teach; or use train-student",
        )
    if config.cache is None and config.reads_targets:
        kinds = [term.kind for term in config.loss if term.reads_teacher]
        raise RecipeError(
            "the terms of a teacher learn from a store",
            received=f"{', '.join(kinds)}, and no --cache",
            remedy="give --cache STORE; or learn from labels alone, by --method none or --teacher labels"
            + ("; or from the student's own, by=student or by=ema" if "consistency" in kinds else "")
            if config.verb == "train-student"
            else "use terms on labels, dice or lovasz; or train-student, with --cache STORE",
        )


def _check_loss(config: TrainConfig) -> None:
    parse_gate(config.gate)
    if not config.active:
        raise RecipeError(
            "something must weigh more than 0",
            received="every loss weight is 0: nothing would be learnt",
            remedy="raise --ce-weight, --kl-weight or the weight of a --term",
        )


def _check_teaching(config: TrainConfig) -> None:
    if (config.class_trust == "auto") != (config.trust_against is not None):
        raise RecipeError(
            "--class-trust auto compares the teacher with a plain run",
            received=f"--class-trust {config.class_trust or 'left out'} and --trust-against "
            f"{config.trust_against or 'left out'}",
            remedy="give both: --class-trust auto --trust-against RUN, of a train-student --method none --fold 0/5",
        )


def _check_label_teacher(config: TrainConfig) -> None:
    if config.teacher == "store":
        return
    if not config.teaches:
        raise RecipeError(
            "--teacher labels puts labels in the place of a teacher's logits",
            received=f"--method {config.method}, which reads none",
            remedy="leave --teacher out, or choose another --method",
        )
    check_terms(config.loss, None)
