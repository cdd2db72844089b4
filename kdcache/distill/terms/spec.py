"""The terms of a recipe: by kind, weight and taps, or by a method such as `kl+at`."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

from kdcache.errors import RecipeError
from kdcache.heads import AUXILIARY, DEPTH, SEGMENTATION

_TAPS = ("student_tap", "teacher_tap")
KINDS: dict[str, tuple[str, ...]] = {
    "pseudo": ("threshold", "quantile", "normalise", "class_weights"),
    "at": _TAPS,
    "sp": _TAPS,
    "hint": (*_TAPS, "standardise", "projector", "distance"),
    "cosine": (*_TAPS, "standardise", "projector"),
    "cwd": (*_TAPS, "temperature"),
    "dist": ("temperature", "beta", "gamma"),
    "dkd": ("temperature", "alpha", "beta"),
    "dice": (),
    "lovasz": (),
    "auxiliary": (),
    "entropy": (),
    "consistency": ("by", "threshold", "quantile", "normalise"),
    "adversarial": ("against", "loss", "head"),
    "depth-l1": ("reference",),
    "depth-berhu": ("reference",),
    "depth-silog": ("reference",),
    "depth-ssi": ("reference", "alpha"),
    "depth-gradient": ("reference",),
}
"""Kind of term -> its options beside its weight. `ce` and `kl` are parts of DistillLoss itself."""
CHOICES = {
    "normalise": ("kept", "all", "share"),
    "class_weights": ("none", "median", "sqrt"),
    "standardise": ("none", "channels"),
    "projector": ("linear", "mlp"),
    "distance": ("mse", "smooth-l1"),
    "reference": ("labels", "teacher"),
    "loss": ("vanilla", "least-squares"),
    "by": ("student", "ema", "store"),
    "head": (SEGMENTATION, AUXILIARY),
}
"""Option -> the words that it takes, the first of them the default (but teacher for the `reference` of `depth-ssi`, and
all for the `normalise` of `consistency`)."""
FUSED = ("ce", "kl")
ON_LABELS = ("dice", "lovasz", "auxiliary")
"""Kinds of terms that learn from labels alone, without a teacher."""
ON_PREDICTIONS = ("entropy", "adversarial", "consistency")
"""Kinds of terms that learn from the student's predictions alone, without a teacher or a label (but for `by=store`)."""


@dataclass(frozen=True)
class TermSpec:
    """One term of a recipe; an option that is None gets its default from the kind, the store and the student.

    Attributes:
        kind: one of KINDS.
        weight: at least 0.
        student_tap, teacher_tap: features to compare. `cwd` without taps compares logits.
        temperature: above 0, dimensionless.
        alpha, beta, gamma: weights of the parts of `dkd` (alpha, beta) and `dist` (beta, gamma); alpha of gradient
            matching in `depth-ssi`.
        threshold: the least probability of a pseudo label (`pseudo`, `consistency`), in (0, 1).
        quantile: instead of `threshold`, the share of each class's pixels with a pseudo label, the most confident ones
            of the batch.
        normalise: what `pseudo` and `consistency` are divided by; one of CHOICES.
        class_weights: of `pseudo`, by how rare a class is among the targets; one of CHOICES.
        standardise, projector, distance: of features: the teacher's channels, the student's projection and how both are
            compared; each one of CHOICES.
        reference: what a term of depth compares with; one of CHOICES.
        against: the stream whose predictions those of `adversarial` are to pass for; None is the only other one.
        loss: of `adversarial`; one of CHOICES.
        by: who makes the pseudo labels of `consistency`; one of CHOICES.
        head: whose predictions `adversarial` compares; one of CHOICES.
    Raises: RecipeError for anything else.
    """

    kind: str
    weight: float | None = None
    student_tap: str | None = None
    teacher_tap: str | None = None
    temperature: float | None = None
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    threshold: float | None = None
    quantile: float | None = None
    normalise: str | None = None
    class_weights: Literal["none", "median", "sqrt"] | None = None
    standardise: str | None = None
    projector: str | None = None
    distance: str | None = None
    reference: str | None = None
    against: str | None = None
    loss: str | None = None
    by: str | None = None
    head: str | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        for option, value in self.options().items():
            if option not in ("weight", *KINDS[self.kind]):
                _refuse_option(self.kind, option)
            _check_value(self.kind, option, value)
        if self.threshold is not None and self.quantile is not None:
            raise RecipeError(
                "pseudo labels are chosen by a threshold or by a quantile",
                received=f"threshold {self.threshold} and quantile {self.quantile}",
                remedy="leave one of them out",
            )

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "TermSpec":
        """Make a term from a `[[term]]` of a recipe; keys may have dashes. Raises: RecipeError for a malformed one."""
        named = {key.replace("-", "_"): value for key, value in table.items()}
        kind = named.get("kind")
        if not isinstance(kind, str):
            raise RecipeError(
                "a term says its kind", received=f"{dict(table)}", remedy=f"add kind, one of {', '.join(KINDS)}"
            )
        check_kind(kind)
        for option in named:
            if option not in {part.name for part in fields(cls)}:
                _refuse_option(kind, option)
        return cls(**named)

    def options(self) -> dict[str, Any]:
        """The options that are set, without the kind."""
        return {key: value for key, value in asdict(self).items() if key != "kind" and value is not None}

    def table(self) -> dict[str, Any]:
        """The table of a recipe that `of` takes."""
        return {"kind": self.kind, **self.options()}


class Method(NamedTuple):
    """A parsed `--method`: whether KL is on, and the terms beside it."""

    kl: bool
    terms: tuple[TermSpec, ...]


def parse_method(text: str) -> Method:
    """Parse `none`, or a sum of `kl` and kinds of terms such as `kl+at`, in any order.

    Raises: RecipeError for an unknown kind (with the nearest name), a kind twice, or `none` beside another.
    """
    kinds = [part.strip() for part in text.split("+")]
    if kinds == ["none"]:
        return Method(False, ())
    names = ("none", "kl", *KINDS)
    for kind in kinds:
        if kind not in names:
            near = difflib.get_close_matches(kind, names, n=1)
            raise RecipeError(
                f"--method is none or a sum of {', '.join(names[1:])}",
                received=repr(text),
                remedy=f"did you mean {near[0]}?" if near else "write for example kl or kl+at",
            )
    if len(set(kinds)) < len(kinds) or "none" in kinds:
        raise RecipeError(
            "--method names each of its terms once, and none stands alone",
            received=repr(text),
            remedy="several terms of a kind, with taps of their own, are written as [[term]] in a recipe",
        )
    return Method("kl" in kinds, tuple(TermSpec(kind) for kind in kinds if kind != "kl"))


def compares_features(spec: TermSpec) -> bool:
    """Whether a term compares taps, not logits."""
    if spec.kind == "cwd":
        return spec.teacher_tap is not None or spec.student_tap is not None
    return "teacher_tap" in KINDS[spec.kind]


def of_depth(spec: TermSpec) -> bool:
    """Whether a term compares depth."""
    return spec.kind.startswith("depth-")


def head_of(spec: TermSpec) -> str:
    """The head of the student that a term compares; segmentation for one of features, too."""
    if of_depth(spec):
        return DEPTH
    return AUXILIARY if spec.kind == "auxiliary" else spec.head or SEGMENTATION


def reads_teacher(spec: TermSpec) -> bool:
    """Whether a term learns from a teacher."""
    if of_depth(spec):
        # What aligns scale and shift is for teachers whose depth has none of its own.
        default = "teacher" if spec.kind == "depth-ssi" else "labels"
        return (spec.reference or default) == "teacher"
    return spec.kind not in (*ON_LABELS, *ON_PREDICTIONS) or spec.by == "store"


def reads_labels(spec: TermSpec) -> bool:
    """Whether a term learns from labels."""
    return not reads_teacher(spec) and spec.kind not in ON_PREDICTIONS


def needs_labels(spec: TermSpec) -> bool:
    """Whether a term of weight needs labels: `auxiliary` reads them, and counts nothing without, as cross-entropy."""
    return reads_labels(spec) and spec.kind != "auxiliary" and spec.weight != 0


def labels_itself(spec: TermSpec) -> bool:
    """Whether the pseudo labels of a term of weight are made in training, by the student or its moving average."""
    return spec.kind == "consistency" and spec.by != "store" and spec.weight != 0


def reads_logits(spec: TermSpec) -> bool:
    """Whether a term reads the teacher's logits of segmentation."""
    return reads_teacher(spec) and not compares_features(spec) and not of_depth(spec)


def check_kind(kind: str) -> None:
    """Check the name of a kind of term. Raises: RecipeError with the nearest name for any other."""
    if kind in KINDS:
        return
    near = difflib.get_close_matches(kind, KINDS, n=1)
    if kind in FUSED:
        remedy = f"its weight is a flag: --{kind}-weight"
    else:
        remedy = f"did you mean {near[0]}?" if near else "pick one of these"
    raise RecipeError(f"a term is one of {', '.join(KINDS)}", received=repr(kind), remedy=remedy)


def _refuse_option(kind: str, option: str) -> None:
    options = ("weight", *KINDS[kind])
    near = difflib.get_close_matches(option, options, n=1)
    raise RecipeError(
        f"the options of {kind} are {', '.join(options)}",
        received=repr(option),
        remedy=f"did you mean {near[0]}?" if near else "leave it out",
    )


def _check_value(kind: str, option: str, value: Any) -> None:
    if option in (*_TAPS, "against"):
        what = "stream" if option == "against" else "tap"
        good, rule = isinstance(value, str) and bool(value), f"the name of a {what}"
    elif option in CHOICES:
        good, rule = value in CHOICES[option], f"one of {', '.join(CHOICES[option])}"
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        good, rule = False, "a finite number"
    elif option in ("threshold", "quantile"):
        good, rule = 0 < value < 1, "above 0 and below 1"
    elif option == "temperature":
        good, rule = value > 0, "above 0"
    else:
        good, rule = value >= 0, "at least 0"
    if not good:
        raise RecipeError(
            f"{option} of a term is {rule}",
            received=f"{option} = {value!r} of {kind}",
            remedy="correct it",
        )
