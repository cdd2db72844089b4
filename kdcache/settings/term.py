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
"""The array of the teacher's largest logit in each pixel. With it, stored logits become raw logits again."""
MASK = ("gate", "distill_void", "class_trust", "class_balance")
"""The settings that weigh pixels in the terms that learn from a teacher."""
SCHEDULE = "distill_schedule"
"""The setting that changes the weight of terms during a training: teacher terms, and pseudo labels of the student."""

Share = Annotated[float, Gt(0), Lt(1)]
Name = Annotated[str, MinLen(1)]
_ADDED = {
    DEPTH: f", for example --model MODEL+{DEPTH}",
    AUXILIARY: ": --model MODEL+aux adds it for the training.",
}


class Missing(NamedTuple):
    """Something that a loss term needs and a cache lacks.

    Attributes:
        what: what is missing, in words.
        flag: the build flag that stores it, such as `--raw-logits`.
    """

    what: str
    flag: str


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """The base class of all loss terms, as settings.

    A subclass sets `kind` and other class variables. Its fields are options, as in `--term cosine,weight=0.1`.

    Attributes:
        kind: the term's name, such as `cosine`.
        fused: True if the loss kernels compute it, and only flags set it (`ce`, `kl`).
        learns_from: `labels`, `teacher`, or `predictions` of the student.
        compares: `logits`, `features`, `similarity` (of features), or `depth`.
        whole_batch: True if its value is not a mean over samples, so it needs the whole batch at once.
        follows_mix: True if it works with `--mix`, which pastes pixels of other samples of the same stream.
        follows_paste: True if it works with pixels pasted from another stream.
        whole_view: True if it needs whole stored views, without random crops.
        head: the student's head that it reads.
        all_classes: True if it needs the teacher's logits of all classes.
        raw_logits: True if it needs the teacher's raw logits, not only the differences between classes.
        partly_labelled: True if it learns from labels, but also works on samples without labels.
        takes: the settings of the training that affect it, in addition to its own options.
        weight: the factor on it. None uses `default_weight`.
        given: the names of the options that the user gave.
    Raises: RecipeError for an invalid value of an option.
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
        """Return the names of the term's options."""
        return tuple(entries_of(cls))

    def table(self) -> dict[str, Any]:
        """Return the term as a table `[[term]]` of a recipe: `kind` and option -> value.

        It has the options that the user gave, and options that differ from their default. `parse_term` reverses it.
        """
        values = {option: getattr(self, option) for option in self.options()}
        written = {k: v for k, v in values.items() if k in self.given or v != getattr(type(self), k)}
        return {"kind": self.kind, **{option: value for option, value in written.items() if value is not None}}

    @property
    def default_weight(self) -> float:
        """The weight that is used if `weight` is None."""
        return 1.0

    @property
    def active(self) -> bool:
        """True if the weight is not 0."""
        return self.weight != 0

    @property
    def reads_teacher(self) -> bool:
        """True if the term learns from a teacher. With `--teacher labels`, labels replace this teacher."""
        return self.learns_from == "teacher"

    @property
    def reads_labels(self) -> bool:
        """True if the term learns from labels."""
        return self.learns_from == "labels"

    @property
    def needs_labels(self) -> bool:
        """True if the term, with a weight other than 0, fails on data without labels."""
        return self.reads_labels and self.active and not self.partly_labelled

    @property
    def labels_itself(self) -> bool:
        """True if the term is active and learns from pseudo labels of the student or of the student's EMA."""
        return False

    @property
    def reads_taps(self) -> bool:
        """True if the term compares features of student and teacher."""
        return self.compares in ("features", "similarity")

    @property
    def reads_logits(self) -> bool:
        """True if the term reads the teacher's segmentation logits."""
        return self.reads_teacher and self.compares == "logits"

    @property
    def task(self) -> str:
        """The task of the term: `segmentation` or `depth`."""
        return self.compares if self.compares in TASKS else SEGMENTATION

    @property
    def numeric(self) -> bool:
        """True if the term compares numbers, such as depth, instead of classes."""
        return TASKS[self.task].head == "regression"

    @property
    def takes(self) -> tuple[str, ...]:
        """The training's settings that affect the term, by name: weights of pixels (`gate`), and `distill_schedule`."""
        # Numbers have neither classes nor void pixels.
        mask = MASK if self.reads_teacher and not self.numeric else ()
        return (*mask, SCHEDULE) if self.reads_teacher or self.labels_itself else mask

    def arrays(self, manifest: Any) -> tuple[str, ...]:
        """Return the paths of those arrays in a cache that the term reads, except the packed logits.

        `manifest` is the cache's manifest, or None if labels replace the teacher. A term that compares features must
        have a `teacher_tap`, as `resolved` sets it.
        """
        return (MAXIMUM,) if self.raw_logits and self.reads_logits and manifest is not None else ()

    def missing(self, manifest: Any) -> list[Missing]:
        """Return what the term needs and a cache with this manifest lacks."""
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
        """True if the term compares depth in metres, not only up to a scale and a shift."""
        return False

    def check_unit(self, whose: str, head: Any) -> None:
        """Check that the term can compare values in the unit of a head. The default accepts every unit.

        `head` has an attribute `unit`. `whose` names the head's owner in the error, such as "the student's".

        Raises: RecipeError for another unit.
        """

    def check_student(self, heads: Mapping[str, Any]) -> None:
        """Check that a student has the head that the term reads.

        `heads` are the student's heads: name -> kind. Raises: RecipeError if the head is missing or of another kind.
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
        """Check that a cache has what the term needs, and return the term. `FeatureTerm.resolved` also chooses taps.

        Args:
            manifest: the cache's manifest, or None if labels replace the teacher.
            student_taps: names of the student's taps. Only terms that compare features read them.
            grids: name of a student's tap -> the (h, w) of its features. None if unknown. Only terms that compare
                features read it.
        Raises: RecipeError if the cache lacks something.
        """
        check_terms([self], manifest)
        return self


TERMS: dict[str, type[LossTerm]] = {}
"""Kind -> the class of the term."""


class FeatureTerm(LossTerm):
    """A base class of loss terms that compare features at a tap of the student and at a tap of the teacher.

    `stored` is the path of a teacher tap's array in the cache, and the build flag that stores it. {} is the tap's name.
    """

    compares = "features"
    stored: ClassVar[tuple[str, str]] = ("features/{}", "--features {}")
    """What a cache has of a tap, and the flag that stores it."""

    student_tap: Name | None = setting(
        None, "The student's tap (default: the tap whose grid is nearest to the teacher's)."
    )
    teacher_tap: Name | None = setting(None, "The teacher's tap (default: the cache's last tap).")

    def _grid(self, manifest: Any, tap: str) -> tuple[int, int]:
        """Return the (h, w) of a tap's stored features or statistic."""
        stored = manifest.features.get(tap) or next(v for k, v in manifest.statistics.items() if k.endswith(f".{tap}"))
        height, width = stored.size
        return height, width

    def offered(self, manifest: Any) -> list[str]:
        """Return the taps that the term can use, from a cache's `Manifest`. The last is the default `teacher_tap`."""
        return sorted(manifest.features, key=lambda tap: not is_summary(manifest.features[tap]))

    def arrays(self, manifest: Any) -> tuple[str, ...]:
        """Return the paths of the arrays in a cache that the term reads: features, and the scales of 8-bit ones.

        `manifest` is the cache's manifest.
        """
        if not self.reads_taps:
            return super().arrays(manifest)
        tap = str(self.teacher_tap)
        scaled = getattr(manifest.features[tap], "dtype", "float16") == "uint8"
        return (f"features/{tap}", *([f"scales/{tap}"] if scaled else []))

    def missing(self, manifest: Any) -> list[Missing]:
        """Return the features or statistics that the term needs and a cache with this manifest lacks.

        Raises: RecipeError if the teacher has no tap of the name `teacher_tap`.
        """
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
        named_taps = [each.removeprefix(prefix) for each in dict.fromkeys(offered) if each.startswith(prefix)]
        return [Missing(f"{what}, but {name or 'the cache'} has {', '.join(named_taps) or 'none'}", flag)]

    def resolved(
        self, manifest: Any, student_taps: Sequence[str], grids: Mapping[str, tuple[int, int]] | None = None
    ) -> Self:
        """Return a copy of the term with its taps chosen: the cache's last, and the student's with the nearest grid.

        Taps that the user named are kept.

        Args:
            manifest: the cache's manifest.
            student_taps: names of the student's taps.
            grids: name of a student's tap -> its (h, w) for a whole view. None chooses the student's tap of the same
                name as the teacher's, or else the last.
        Raises: RecipeError if the cache or the student lacks a tap.
        """
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
    """Return the taps of a cache's teacher, or () if the teacher is not a listed model."""
    spec = getattr(getattr(manifest, "teacher", None), "spec", "")
    return next((tuple(info.taps) for info in list_models(spec) if info.spec == spec), ()) if spec else ()


def _split_tap(tap: str, joined: Sequence[str]) -> tuple[str, str]:
    """Split NAME:TAP into the name of a joined cache and the tap. The first cache has the name ''.

    Raises: RecipeError for an unknown name.
    """
    name, _, plain = tap.rpartition(":")
    if name and name in joined[:1]:
        raise RecipeError(
            f"Cannot name the first cache in teacher_tap={tap}: its arrays have no name",
            fix=f"Write teacher_tap={plain}.",
        )
    if name and name not in joined:
        raise RecipeError(
            f"Unknown cache {name} in teacher_tap={tap}: "
            + (f"the further caches are {', '.join(joined[1:])}" if joined else "the training has one cache"),
            fix=suggest(name, joined[1:], f"Join it: --cache {name}=CACHE."),
        )
    return name, plain


def _nearest_grids(grids: Mapping[str, tuple[int, int]], grid: tuple[int, int]) -> list[str]:
    """Return the taps whose number of elements has the ratio to the grid's that is nearest to 1."""
    apart = {tap: abs(math.log(math.prod(size) / math.prod(grid))) for tap, size in grids.items()}
    return [tap for tap, distance in apart.items() if math.isclose(distance, min(apart.values()), abs_tol=1e-9)]


def is_summary(feature: Any) -> bool:
    """Return True if a tap's features are one vector per view: their stored size is (1, 1).

    `feature` is the tap's entry in a manifest.
    """
    return tuple(feature.size) == (1, 1)


def entries_of(term: type) -> dict[str, Entry]:
    """Return the settings that a class of loss terms declares, such as `weight`, in order: name -> setting."""
    return entries(term)


def untaken(given: Mapping[str, Any], taken: Collection[str]) -> dict[str, Any]:
    """Return the settings of loss terms that no term in use reads: name with underscores -> value.

    Weights of 0 are left out, because they only switch off a term.

    Args:
        given: name -> value of the settings that the user gave. Settings that belong to no loss term are ignored.
        taken: names of the settings that the terms in use read.
    """
    named = {name.replace("-", "_"): value for name, value in given.items()}
    of_terms = {name for term in TERMS.values() for name in term().takes}
    idle = {name: value for name, value in named.items() if name not in taken and name in of_terms}
    return {name: value for name, value in idle.items() if not (name.endswith("_weight") and float(value) == 0)}


def no_effect(idle: Mapping[str, Any], loss: str) -> RecipeError:
    """Return the error for settings (name -> value) that no term of the loss reads. `loss` is the loss in words."""
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
    """Return a setting as typed in a command, such as `--kl-weight 0.3`."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _takers(name: str) -> list[str]:
    return [kind for kind, term in TERMS.items() if name in term().takes]


def check_terms(terms: Iterable[LossTerm], manifest: Any) -> None:
    """Check that a cache has all arrays that some loss terms read.

    `manifest` is the cache's manifest. None stands for labels in the teacher's place, which give only logits.

    Raises: RecipeError. With a manifest, its fix names the build flags that store what is missing.
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
    """Return the head of a task if a cache lacks it or has it with another kind, else []."""
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
