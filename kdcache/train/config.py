"""The settings of a training: one strict model, whose keys are the command line's flags."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from kdcache.distill.terms import TermSpec, parse_method
from kdcache.errors import RecipeError
from kdcache.run_folder import RECIPE, Run
from kdcache.store.mirror import parse_bytes
from kdcache.train.consistent import check_consistent
from kdcache.train.loggers import parse_logs
from kdcache.train.ranges import in_words

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
_SPELLED = {
    "size": "HEIGHTxWIDTH in pixels, two whole numbers from 1",
    "scale": "MIN:MAX, two numbers above 0",
    "cache_bytes": "a size from 1 byte on, such as 50GiB or 200MB",
}
"""What settings take whose values are written together."""
_SHOWN = {"size": "288x384", "scale": "0.5:2.0", "cache_bytes": "50GiB", "keep_every": "500", "log": "tensorboard"}
DEFAULT_ITERATIONS = 4000
LEARNING_RATE = 1e-3
LEARNING_RATES = {"kdcache:tiny": 6e-3, "kdcache:base": 2e-3}
"""Of Adam and AdamW, where others want their own: the best of 1e-3 to 8e-3 on CamVid for tiny (`effect-cpu.json`), and
what taught there for base. From 1e-3, tiny ends 8 points of mIoU lower.
"""


def parse_size(value: Any) -> Any:
    """'144x192' as (144, 192): height, then width; anything else is left for the type check."""
    return tuple(value.lower().split("x")) if isinstance(value, str) else value


def parse_range(value: Any) -> Any:
    """'0.5:2' as (0.5, 2.0)."""
    return tuple(value.split(":")) if isinstance(value, str) else value


def parse_term(value: Any) -> Any:
    """'cosine,weight=0.1,teacher_tap=layer4' or a table of a recipe as a term."""
    if isinstance(value, str):
        kind, *options = value.split(",")
        value = {"kind": kind, **dict(map(_option, options))}
    return TermSpec.of(value) if isinstance(value, dict) else value


def parse_every(value: Any) -> Any:
    """'500' as 500 steps; '5e', epochs, stays as it is until the data is known."""
    if isinstance(value, bool) or not re.fullmatch(r"[1-9][0-9]*e?", str(value)):
        raise ValueError("a number of iterations such as 500, or of epochs such as 5e")
    text = str(value)
    return text if text.endswith("e") else int(text)


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key.strip(), float(value)
    except ValueError:
        return key.strip(), value.strip()


Size = Annotated[tuple[Count, Count], BeforeValidator(parse_size), PlainSerializer(lambda size: f"{size[0]}x{size[1]}")]
Range = Annotated[
    tuple[Positive, Positive], BeforeValidator(parse_range), PlainSerializer(lambda ends: f"{ends[0]}:{ends[1]}")
]
Terms = Annotated[tuple[TermSpec, ...], BeforeValidator(lambda terms: tuple(map(parse_term, terms)))]
Logs = Annotated[tuple[str, ...], BeforeValidator(parse_logs)]
Every = Annotated[int | str, BeforeValidator(parse_every)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1)]


def _flag(name: str) -> str:
    return name.replace("_", "-")


class TrainConfig(BaseModel):
    """Everything that decides a training. Written whole into the run folder as `recipe.toml`.

    Sizes are (H, W) in pixels; `iterations` are optimizer steps; a recipe file has the same keys with dashes and
    values as one types them. What depends on the data (None here) is filled in by `resolved`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=_flag, populate_by_name=True)

    # what
    verb: Literal["train-teacher", "train-student"]
    name: str | None = None
    model: str
    data: str | None = None
    split: str = "train"
    val: str | None = None
    val_split: str = "val"
    cache: str | None = None
    cache_dir: str | None = None
    cache_bytes: Bytes | None = None
    method: str = "none"
    term: Terms = ()
    size: Size | None = None
    init: str | None = None

    # the loss
    ce_weight: Weight = 1.0
    kl_weight: Weight = 0.3
    temperature: Positive = 2.0
    distill_void: bool = True
    distill_on: Literal["labelled", "all"] = "all"
    distill_schedule: Literal["constant", "fade"] = "constant"
    gate: str = "none"
    class_trust: str | None = None
    trust_against: str | None = None
    class_balance: Literal["none", "median", "sqrt"] = "none"
    class_weights: Literal["none", "median", "sqrt"] = "sqrt"

    # the optimization
    iterations: Count | None = None
    epochs: Count | None = None
    batch_size: Count = 8
    accumulate: Count = 1
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Positive = LEARNING_RATE
    weight_decay: Weight = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["poly", "plateau", "constant"] = "poly"
    power: Positive = 0.9
    warmup: Annotated[int, Field(ge=0)] = 0
    clip_grad: Weight = 0.0
    amp: Literal["auto", "off", "bf16"] = "auto"
    step: Literal["auto", "eager", "compiled", "graphed"] = "auto"
    impl: Literal["auto", "triton", "numba", "reference"] = "auto"

    # the pixels
    augment: Literal["auto", "warp", "replay", "none"] = "auto"
    scale: Range = (0.5, 2.0)
    flip: bool | None = None
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.3
    mix: str | None = None

    # the samples
    limit_samples: Positive | None = None
    limit_labels: Positive | None = None
    limit_views: Count | None = None
    labelled_share: Annotated[float, Field(ge=0.001, le=0.999)] | None = None
    fold: str | None = None
    val_fold: str | None = None

    # the machine
    shuffle: Literal["auto", "full", "window"] = "auto"
    resident: Literal["auto", "ram", "gpu", "off"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    threads: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    val_every: Count | None = None
    log_every: Count = 20
    gradients_every: Annotated[int, Field(ge=0)] = 500
    keep_every: Every | None = None
    log: Logs = ()

    @model_validator(mode="before")
    @classmethod
    def _choices(cls, given: Any) -> Any:
        """What depends on other settings alone: the learning rate, and the method `auto`."""
        if not isinstance(given, dict):
            return given
        chosen: dict[str, Any] = {}
        if given.get("lr") is None:
            known = {} if given.get("optimizer") == "sgd" else LEARNING_RATES
            chosen["lr"] = known.get(str(given.get("model")), LEARNING_RATE)
        auto = given.get("verb") == "train-student"
        if (
            given.get("method", "auto" if auto else "none") == "auto"
        ):  # `dist` helps more and compares a whole batch of own pixels
            parted = given.get("mix") is not None or given.get("accumulate") not in (None, 1)
            chosen["method"] = "kl" if parted else "dist"
        return given | chosen

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        check_consistent(self)
        return self

    @property
    def wants_kl(self) -> bool:
        """Whether KL is a part of the loss."""
        return parse_method(self.method).kl

    @property
    def terms(self) -> tuple[TermSpec, ...]:
        """The terms beside CE and KL: those of the method, then those listed one by one."""
        return (*parse_method(self.method).terms, *self.term)

    @property
    def whole_batch(self) -> tuple[str, ...]:
        """Kinds of terms whose value is no mean over the samples of a batch."""
        return tuple(term.kind for term in self.terms if term.kind in ("sp", "dist") or term.quantile is not None)

    @property
    def teaches(self) -> bool:
        """Whether anything is learnt from a teacher."""
        return self.wants_kl or bool(self.terms)

    def resolved(
        self, samples: int, size: tuple[int, int], shuffle: str = "full", labelled_share: float | None = None
    ) -> "TrainConfig":
        """With size, iterations, val_every, shuffle and labelled_share filled in, and all counted in iterations.

        Args:
            samples: of the training data, for epochs.
            size: (H, W) to use when none was given.
            shuffle: what auto means for the data; a run keeps it, also where its store moves.
            labelled_share: what was chosen for the data; None draws all samples alike.
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

    def to_toml(self) -> str:
        """As a recipe file; what is not set is left out, for TOML has no null."""
        return tomli_w.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True))


def make_config(**settings: Any) -> TrainConfig:
    """Check settings. Raises RecipeError naming the flag."""
    try:
        return TrainConfig(**settings)
    except ValidationError as error:
        raise _refused(error, settings) from error


def _refused(error: ValidationError, settings: Mapping[str, Any]) -> RecipeError:
    """The first thing that is wrong, by its flag and what that takes."""
    first = error.errors()[0]
    name = str(first["loc"][0]).replace("-", "_") if first["loc"] else ""
    flag, given = "--" + _flag(name), settings.get(name, first["input"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, TrainConfig.model_fields, n=1)
        return RecipeError(
            "every setting is one that a training has",
            received=f"{flag} {given}",
            remedy=f"did you mean --{_flag(near[0])}?" if near else "leave it out: --help lists those there are",
        )
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return RecipeError(f"a training needs {flag}", received=f"no {flag}", remedy=f"give {flag}")
    field = TrainConfig.model_fields[name]
    rule = _SPELLED.get(name) or (
        first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else in_words(field)
    )
    default = field.get_default()
    told = _SHOWN.get(name, None if default in (None, ()) or field.is_required() else str(default))
    return RecipeError(
        f"{flag} is {rule}",
        received=f"{flag} {given if isinstance(given, str | int | float) else repr(given)}",
        remedy=f"give one of these, for instance {flag} {told}" if told else "correct it, or leave it out",
    )


def read_config(run: Path) -> TrainConfig:
    """The resolved recipe of a run. Raises RecipeError when it is missing or malformed."""
    path, recipe = run / RECIPE, Run(run).recipe
    if recipe is None:
        raise RecipeError(
            "a run has a resolved recipe",
            received=f"{path}, which is not there",
            remedy="give the --out of a training that was begun with this version",
        )
    try:
        return TrainConfig.model_validate(recipe)
    except ValidationError as error:
        wrong = _refused(error, {})
        raise RecipeError(
            "a run has a resolved recipe of this version",
            received=f"{path}: {wrong.received}; {wrong.rule}" if recipe else f"{path} is empty",
            remedy="restore it from a copy, or begin again in another --out",
        ) from error
