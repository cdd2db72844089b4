"""A term of the loss as a setting: the questions that every kind answers, and checks of several terms.

The kinds are in `kdcache.settings.terms`. Free of torch.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, NamedTuple, Self, dataclass_transform

from annotated_types import Gt, Lt, MinLen

from kdcache.errors import RecipeError, suggest
from kdcache.model_table import list_models
from kdcache.settings.parse import Weight
from kdcache.settings.setting import Entry, entries, setting
from kdcache.settings.validate import Wording, read_value
from kdcache.tasks import AUXILIARY, DEPTH, SEGMENTATION, TASKS

MAXIMUM = "targets/segmentation/max"
"""The array of the teacher's largest logits, which makes stored logits raw again."""
MASK = ("gate", "distill_void", "class_trust", "class_balance")
"""The settings that weigh the pixels of a teacher's terms."""
SCHEDULE = "distill_schedule"
"""The setting that weighs the terms of a teacher, and pseudo labels of the student itself, over the training."""

Share = Annotated[float, Gt(0), Lt(1)]
Name = Annotated[str, MinLen(1)]
_ADDED = {
    DEPTH: f", for example --model MODEL+{DEPTH}",
    AUXILIARY: ": --model MODEL+aux adds it for the training.",
}


class Missing(NamedTuple):
    """What a cache lacks, and the flag of `kdcache build-teacher-cache` that adds it."""

    what: str
    flag: str


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One term of a loss. Its fields are its options, as in `[[term]]` of a recipe and in `--term`.

    Raises: RecipeError for an invalid value of an option.

    Attributes:
        kind: the term's name.
        fused: it is computed by `DistillLoss` itself, and set only by flags.
        learns_from: labels, teacher or predictions.
        compares: logits, features, similarity, or the task of a regression, such as depth.
        whole_batch: whether its value is not a mean over the samples of a batch.
        follows_mix, follows_paste: its data are pasted together with the pixels of a sample of the same stream, of
            another one.
        whole_view: it needs whole stored views, so views are replayed and no window moves them.
        head: the student's head that it compares. Terms of features also have `segmentation`.
        all_classes: it reads the teacher's logits of all classes.
        raw_logits: it reads them unnormalised.
        partly_labelled: it learns from labels, but also runs on data without labels.
        takes: settings of the training that set it, in addition to its own options.
        weight: None is automatic (`default_weight`).
        given: names of the options that were written down, including defaults.
    """

    kind: ClassVar[str]
    fused: ClassVar[bool] = False
    learns_from: ClassVar[str] = "teacher"
    compares: ClassVar[str] = "logits"
    whole_batch: ClassVar[bool] = False
    follows_mix: ClassVar[bool] = False
    follows_paste: ClassVar[bool] = False
    whole_view: ClassVar[bool] = False
    head: ClassVar[str] = SEGMENTATION
    all_classes: ClassVar[bool] = False
    raw_logits: ClassVar[bool] = False
    partly_labelled: ClassVar[bool] = False

    weight: Weight | None = setting(1.0, "Factor on the term; 0 leaves it out.")
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        if "kind" in vars(cls):
            TERMS[cls.kind] = cls

    def __post_init__(self) -> None:
        for option, entry in entries_of(type(self)).items():
            value = getattr(self, option)
            if value is not getattr(type(self), option):  # True is equal to 1.0
                read_value(entry, value, Wording(f"{{name}} of {self.kind}", "{name}={value}"), strict=True)

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the names of its options."""
        return tuple(entries_of(cls))

    def table(self) -> dict[str, Any]:
        """Return its table of a recipe, for `parse_term`: given options, and those other than the default."""
        values = {option: getattr(self, option) for option in self.options()}
        own = {k: v for k, v in values.items() if k in self.given or v != getattr(type(self), k)}
        return {"kind": self.kind, **{option: value for option, value in own.items() if value is not None}}

    @property
    def default_weight(self) -> float:
        """The weight of a term with a `weight` of None."""
        return 1.0

    @property
    def active(self) -> bool:
        """Whether its weight is above 0."""
        return self.weight != 0

    @property
    def reads_teacher(self) -> bool:
        """Whether it learns from a teacher, or from labels in its place."""
        return self.learns_from == "teacher"

    @property
    def reads_labels(self) -> bool:
        """Whether it learns from labels."""
        return self.learns_from == "labels"

    @property
    def needs_labels(self) -> bool:
        """Whether it is active and fails without any label."""
        return self.reads_labels and self.active and not self.partly_labelled

    @property
    def labels_itself(self) -> bool:
        """Whether it is active, with pseudo labels from the student or its average in training."""
        return False

    @property
    def reads_taps(self) -> bool:
        """Whether it compares features of student and teacher instead of head outputs."""
        return self.compares in ("features", "similarity")

    @property
    def reads_logits(self) -> bool:
        """Whether it reads the teacher's logits of segmentation."""
        return self.reads_teacher and self.compares == "logits"

    @property
    def task(self) -> str:
        """The task that the term belongs to."""
        return self.compares if self.compares in TASKS else SEGMENTATION

    @property
    def numeric(self) -> bool:
        """Whether it compares the numbers of a regression, such as depth."""
        return TASKS[self.task].head == "regression"

    @property
    def takes(self) -> tuple[str, ...]:
        """The settings of masks and schedules that it takes."""
        # Numbers have neither classes nor void pixels.
        mask = MASK if self.reads_teacher and not self.numeric else ()
        return (*mask, SCHEDULE) if self.reads_teacher or self.labels_itself else mask

    def arrays(self, manifest: Any) -> tuple[str, ...]:
        """Return the paths of the arrays that it reads in addition to the packed target. Its taps must be filled in.

        `manifest` is an open cache's, or None with labels in the teacher's place.
        """
        return (MAXIMUM,) if self.raw_logits and self.reads_logits and manifest is not None else ()

    def missing(self, manifest: Any) -> list[Missing]:
        """Return what a cache lacks for it."""
        if not self.reads_teacher:
            return []
        lacks = _missing_head(manifest, self.task)
        if lacks or self.numeric:
            return lacks
        head = manifest.heads[SEGMENTATION]
        if self.all_classes and head.k < head.classes:
            what = f"the logits of all {head.classes} classes, but the cache has {head.k}"
            lacks.append(Missing(what, f"--top-k {head.classes}"))
        if self.raw_logits and not getattr(head, "raw", False):
            lacks.append(Missing(f"raw logits ({MAXIMUM}), but the cache has none", "--raw-logits"))
        return lacks

    @property
    def in_metres(self) -> bool:
        """Whether it compares depth in metres, not only its shape."""
        return False

    def check_unit(self, whose: str, head: Any) -> None:
        """Check the unit of a head that it compares. Raises: RecipeError."""

    def check_student(self, heads: Mapping[str, Any]) -> None:
        """Check that `heads`, of a student in training, have the head that the term compares, with the right kind.

        Raises: RecipeError.
        """
        if self.reads_taps:
            return
        right = TASKS[self.task].head
        head = heads.get(self.head)
        if head is None or head.kind != right:
            raise RecipeError(
                f"{self.kind} needs a {right} head {self.head}, but the student has {_heads_text(heads)}",
                fix="Use a student with such a head"
                + _ADDED.get(self.head, ". Or leave it out (--ce-weight 0, --method none) next to terms of depth."),
            )
        self.check_unit("the student's", head)

    def resolved(
        self, manifest: Any, student_taps: Sequence[str], grids: Mapping[str, tuple[int, int]] | None = None
    ) -> Self:
        """Return the term with its taps filled in, or itself without taps.

        The teacher's tap is the last one in the cache, if possible of the main one. The student's tap is the one with
        the nearest grid to the teacher's, among equals the one of the same name, else the last. `student_taps` has the
        most useful last, and `grids` their (h, w) for a whole view. None takes equal ones.

        Raises: RecipeError for taps that the cache or the student lacks.
        """
        check_terms([self], manifest)
        return self


TERMS: dict[str, type[LossTerm]] = {}
"""Kind -> the class of the term."""


class FeatureTerm(LossTerm):
    """A term that compares features of student and teacher."""

    compares = "features"
    stored: ClassVar[tuple[str, str]] = ("features/{}", "--features {}")
    """What a cache has of a tap, and the flag that stores it."""

    student_tap: Name | None = setting(None, "The student's tap (default: the one with the nearest grid).")
    teacher_tap: Name | None = setting(None, "The teacher's tap (default: the cache's last tap).")

    def _grid(self, manifest: Any, tap: str) -> tuple[int, int]:
        """Return (h, w) of what the cache has of a tap."""
        stored = manifest.features.get(tap) or next(v for k, v in manifest.statistics.items() if k.endswith(f".{tap}"))
        height, width = stored.size
        return height, width

    def offered(self, manifest: Any) -> list[str]:
        """Return the teacher's taps that it can use, most useful last: summaries come before maps."""
        return sorted(manifest.features, key=lambda tap: not is_summary(manifest.features[tap]))

    def arrays(self, manifest: Any) -> tuple[str, ...]:
        """Return the arrays that the term reads. A tap in 8 bits also needs its scales."""
        if not self.reads_taps:
            return super().arrays(manifest)
        tap = str(self.teacher_tap)
        scaled = getattr(manifest.features[tap], "dtype", "float16") == "uint8"
        return (f"features/{tap}", *([f"scales/{tap}"] if scaled else []))

    def missing(self, manifest: Any) -> list[Missing]:
        """Return the features or statistics that a cache lacks for it. Raises: RecipeError for an unknown tap."""
        if not self.reads_taps:
            return super().missing(manifest)
        offered = self.offered(manifest)
        if offered and self.teacher_tap in (None, *offered):
            return []
        name, tap = _split_tap(self.teacher_tap or "TAP", getattr(manifest, "joined", ()))
        of_model = () if name or not self.teacher_tap else _taps_of(manifest)
        if of_model and tap not in of_model:
            raise RecipeError(
                f"Unknown teacher_tap {tap!r} of {self.kind}",
                fix=suggest(tap, of_model, f"Use one of {', '.join(of_model)}."),
            )
        what, flag = (text.format(tap) for text in self.stored)
        what = what if self.teacher_tap else "features of the teacher"
        prefix = f"{name}:" if name else ""
        own = [each.removeprefix(prefix) for each in dict.fromkeys(offered) if each.startswith(prefix)]
        return [Missing(f"{what}, but {name or 'the cache'} has {', '.join(own) or 'none'}", flag)]

    def resolved(
        self, manifest: Any, student_taps: Sequence[str], grids: Mapping[str, tuple[int, int]] | None = None
    ) -> Self:
        """Fill in the taps as `LossTerm` does. Raises: RecipeError for taps that cache or student lack."""
        check_terms([self], manifest)
        if not self.reads_taps:
            return self
        offered = self.offered(manifest)
        teacher_tap = self.teacher_tap or ([tap for tap in offered if ":" not in tap] or offered)[-1]
        alike = teacher_tap.rpartition(":")[2]
        student_tap = self.student_tap or (alike if alike in student_taps else "".join(student_taps[-1:]))
        if self.student_tap is None and grids:
            nearest_taps = _nearest_grids({tap: grids[tap] for tap in student_taps}, self._grid(manifest, teacher_tap))
            student_tap = student_tap if student_tap in nearest_taps else nearest_taps[-1]
        if student_tap not in student_taps:
            raise RecipeError(
                f"Unknown student_tap {student_tap!r} of {self.kind}",
                fix=suggest(
                    student_tap,
                    student_taps,
                    f"Choose one of {', '.join(student_taps) or 'none'}, or a student with taps (kdcache models).",
                ),
            )
        return replace(self, student_tap=student_tap, teacher_tap=teacher_tap)


def _taps_of(manifest: Any) -> tuple[str, ...]:
    """Return the taps of a cache's teacher, or () if it is not one of the listed models."""
    spec = getattr(getattr(manifest, "teacher", None), "spec", "")
    return next((tuple(info.taps) for info in list_models(spec) if info.spec == spec), ()) if spec else ()


def _split_tap(tap: str, joined: Sequence[str]) -> tuple[str, str]:
    """Split NAME:TAP of a joined cache, with '' for the main cache. `joined` names the caches, the main one first.

    Raises: RecipeError for an unknown name.
    """
    name, _, own = tap.rpartition(":")
    if name and name in joined[:1]:
        raise RecipeError(
            f"Cannot name the first cache in teacher_tap={tap}: its arrays have no name",
            fix=f"Write teacher_tap={own}.",
        )
    if name and name not in joined:
        raise RecipeError(
            f"Unknown cache {name} in teacher_tap={tap}: "
            + (f"the further caches are {', '.join(joined[1:])}" if joined else "the training has one cache"),
            fix=suggest(name, joined[1:], f"Join it: --cache {name}=CACHE."),
        )
    return name, own


def _nearest_grids(grids: Mapping[str, tuple[int, int]], grid: tuple[int, int]) -> list[str]:
    """Return the taps whose number of cells is nearest to a grid's, by their ratio."""
    apart = {tap: abs(math.log(math.prod(own) / math.prod(grid))) for tap, own in grids.items()}
    return [tap for tap, distance in apart.items() if math.isclose(distance, min(apart.values()), abs_tol=1e-9)]


def is_summary(feature: Any) -> bool:
    """Return True if a tap of a manifest has one cell, so one vector for each view."""
    return tuple(feature.size) == (1, 1)


def entries_of(term: type) -> dict[str, Entry]:
    """Return the options of a term by name."""
    return entries(term)


def untaken(given: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """Return the `given` settings of terms that are not in `taken`, with values. A weight of 0 is always taken."""
    named = {name.replace("-", "_"): value for name, value in given.items()}
    idle = {name: value for name, value in named.items() if name not in taken and _takers(name)}
    return {name: value for name, value in idle.items() if not (name.endswith("_weight") and float(value) == 0)}


def no_effect(idle: Mapping[str, Any], loss: str) -> RecipeError:
    """Return the error for settings that no term of a loss takes. `loss` describes the loss."""
    owners: dict[str, list[str]] = {}
    for name in idle:
        takers = _takers(name)
        owner = " and ".join(takers) if len(takers) < 4 else "terms that learn from a teacher"
        owners.setdefault(owner, []).append("--" + name.replace("_", "-"))
    values = [_typed(name, value) for name, value in idle.items()]
    return RecipeError(
        f"{' and '.join(values)} would have no effect with {loss}",
        fix=f"Leave {'them' if len(idle) > 1 else 'it'} out, or choose a --method that has "
        + " or ".join(f"{owner} ({', '.join(flags)})" for owner, flags in owners.items())
        + ".",
    )


def _typed(name: str, value: Any) -> str:
    """Return a setting as a command has it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _takers(name: str) -> list[str]:
    return [kind for kind, term in TERMS.items() if name in term().takes]


def check_terms(terms: Iterable[LossTerm], manifest: Any) -> None:
    """Check that a cache has the arrays that some terms read. `manifest` is None with labels in the teacher's place.

    Raises: RecipeError that names all build flags that would help.
    """
    terms = list(terms)
    if manifest is None:
        _check_logits_alone(terms)
        return
    lacks = [(term.kind, lack) for term in terms for lack in term.missing(manifest)]
    if lacks:
        flags = " ".join(dict.fromkeys(lack.flag for _, lack in lacks))
        raise RecipeError(
            " and ".join(f"{kind} needs {lack.what}" for kind, lack in dict.fromkeys(lacks)),
            fix=f"Build the cache with {flags} as well, or leave the term out."
            + (f" TAP is one of {', '.join(taps)}." if "TAP" in flags and (taps := _taps_of(manifest)) else ""),
        )
    for term in terms:
        if term.numeric and term.reads_teacher:
            term.check_unit("the cache's", manifest.heads[term.task])


def _check_logits_alone(terms: Sequence[LossTerm]) -> None:
    depths = [term.kind for term in terms if term.numeric and term.reads_teacher]
    if depths:
        raise RecipeError(
            f"Cannot compute {', '.join(dict.fromkeys(depths))} without a cache, or with --teacher labels",
            fix="Give --cache, one with targets of depth. Or compare with labels: --term depth-silog,reference=labels",
        )
    features = [term.kind for term in terms if term.reads_taps]
    if features:
        others = [kind for kind, term in TERMS.items() if term().reads_logits]
        raise RecipeError(
            f"Cannot compute {', '.join(dict.fromkeys(features))} with --teacher labels: labels have no features",
            fix=f"Choose among {', '.join(others)}, without taps, or leave out --teacher.",
        )


def _missing_head(manifest: Any, name: str) -> list[Missing]:
    """Return the head of a task that a cache lacks, or has of another kind."""
    kind, head = TASKS[name].head, manifest.heads.get(name)
    if head is not None and _kind(head) == kind:
        return []
    values = "logits" if kind == "categorical" else "targets"
    return [
        Missing(f"{values} of a {kind} head {name}, but the cache has {_heads_text(manifest.heads)}", f"--heads {name}")
    ]


def _heads_text(heads: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({_kind(head)})" for name, head in heads.items()) or "no head"


def _kind(head: Any) -> str:
    return str(getattr(head, "kind", "categorical"))
