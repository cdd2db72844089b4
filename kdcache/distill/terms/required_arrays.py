"""The arrays that a term reads from a store, and the build flags that would have written those that are missing."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from kdcache.distill.terms.base import MAXIMUM
from kdcache.distill.terms.spec import TermSpec, compares_features, of_depth, reads_teacher
from kdcache.errors import RecipeError
from kdcache.heads import AUXILIARY, DEPTH, SEGMENTATION, HeadKind, RegressionHead

_ADDED = {
    DEPTH: f", for instance --model MODEL+{DEPTH}",
    AUXILIARY: ": --model MODEL+aux adds it for the training",
}


class Missing(NamedTuple):
    """A description of what a store lacks, and the flag of `kdcache build-teacher-cache` that adds it."""

    what: str
    flag: str


def check_terms(specs: Iterable[TermSpec], manifest: Any, *, kl: bool = False) -> None:
    """Check that a store has the arrays that some terms read.

    Args:
        manifest: of an open cache; None where labels stand in the teacher's place.
        kl: whether KL is read, too.
    Raises: RecipeError that names all build flags that would help.
    """
    if manifest is None:
        _check_logits_alone(specs)
        return
    specs = list(specs)
    lacks = [("kl", lack) for lack in _missing_head(manifest, SEGMENTATION)] if kl else []
    lacks += [(spec.kind, lack) for spec in specs for lack in missing(spec, manifest)]
    if lacks:
        flags = " ".join(dict.fromkeys(lack.flag for _, lack in lacks))
        raise RecipeError(
            "a term learns from arrays that the store has",
            received="; ".join(f"{kind} needs {lack.what}" for kind, lack in dict.fromkeys(lacks)),
            remedy=f"build the store with {flags} as well, or leave the term out",
        )
    for spec in specs:
        if of_depth(spec) and spec.kind != "depth-ssi" and reads_teacher(spec):
            _check_metres(spec.kind, "the store's", depth_head(manifest))


def check_student(kind: str, heads: Mapping[str, HeadKind], name: str = SEGMENTATION) -> None:
    """Check that a student has the head whose output a term compares, and that it is of the right kind.

    Args:
        kind: of the term; ce and kl as well.
        heads: the student's in training, by name.
        name: of the head.
    Raises: RecipeError.
    """
    depth = name == DEPTH
    right = "regression" if depth else "categorical"
    head = heads.get(name)
    if head is None or head.kind != right:
        raise RecipeError(
            f"{kind} compares a head {name} that is {right}" + (": numbers" if depth else ": logits of classes"),
            received=f"a student with {_heads_text(heads)}",
            remedy="use a student with such a head"
            + _ADDED.get(name, "; or leave it out (--ce-weight 0, --method none) beside terms of depth"),
        )
    if depth and kind != "depth-ssi":
        _check_metres(kind, "the student's", head)


def depth_head(manifest: Any) -> RegressionHead:
    """The head of depth that a store has, as models have it."""
    head = manifest.heads[DEPTH]
    largest = None if head.range is None else head.range[1]
    return RegressionHead(head.channels, head.unit, head.parameterisation, largest)


def _check_metres(kind: str, whose: str, head: Any) -> None:
    if head.unit != "m":
        raise RecipeError(
            f"{kind} compares depth in metres",
            received=f"{whose} head {DEPTH} in unit {head.unit!r}",
            remedy="depth-ssi compares depth that is known up to a scale and a shift",
        )


def _heads_text(heads: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({_kind(head)})" for name, head in heads.items()) or "no head"


def _kind(head: Any) -> str:
    return str(getattr(head, "kind", "categorical"))


def _missing_head(manifest: Any, name: str) -> list[Missing]:
    """The head of a task that a store lacks, or has of another kind."""
    kind, values = ("regression", "targets") if name == DEPTH else ("categorical", "logits")
    head = manifest.heads.get(name)
    if head is not None and _kind(head) == kind:
        return []
    return [
        Missing(f"{values} of a {kind} head {name} (the store has {_heads_text(manifest.heads)})", f"--heads {name}")
    ]


def _check_logits_alone(specs: Iterable[TermSpec]) -> None:
    specs = list(specs)
    depths = [spec.kind for spec in specs if of_depth(spec) and reads_teacher(spec)]
    if depths:
        raise RecipeError(
            "a term of depth against a teacher reads a store's targets of depth",
            received=f"{', '.join(dict.fromkeys(depths))} without a store, or with --teacher labels",
            remedy="give --cache; or compare with labels, --term depth-silog,reference=labels",
        )
    features = [spec.kind for spec in specs if compares_features(spec)]
    if features:
        raise RecipeError(
            "labels can stand in the place of a teacher's logits, not of its features",
            received=f"{', '.join(dict.fromkeys(features))} with --teacher labels",
            remedy="choose among kl, pseudo, cwd (without taps), dist and dkd; or leave --teacher out",
        )


def resolve_taps(spec: TermSpec, manifest: Any, student_taps: Sequence[str]) -> TermSpec:
    """Fill in the taps of a term that compares features; any other term comes back as it is.

    The teacher's is the last that the store has, the student's the one of the same name, else its last.

    Args:
        student_taps: the student's, most useful last.
    Raises: RecipeError for taps that the store or the student lacks.
    """
    check_terms([spec], manifest)
    if not compares_features(spec):
        return spec
    teacher_tap = spec.teacher_tap or _offered(spec, manifest)[-1]
    student_tap = spec.student_tap or (teacher_tap if teacher_tap in student_taps else "".join(student_taps[-1:]))
    if student_tap not in student_taps:
        raise RecipeError(
            f"student_tap of a term is one of the student's: {', '.join(student_taps) or 'it has none'}",
            received=f"{student_tap!r} of {spec.kind}",
            remedy=_near(student_tap, student_taps) or "pick one of these, or a student that has taps (kdcache models)",
        )
    return replace(spec, student_tap=student_tap, teacher_tap=teacher_tap)


def arrays_of(spec: TermSpec, manifest: Any) -> tuple[str, ...]:
    """Paths of the arrays that a term with taps filled in reads beside the packed target."""
    if compares_features(spec):
        # Of an attention map and the features that it was made from, the map is smaller.
        mapped = spec.kind == "at" and spec.teacher_tap in _maps(manifest)
        return (f"statistics/at.{spec.teacher_tap}" if mapped else f"features/{spec.teacher_tap}",)
    return (MAXIMUM,) if spec.kind == "cwd" and manifest is not None else ()


def missing(spec: TermSpec, manifest: Any) -> list[Missing]:
    """The arrays that a store lacks for a term; [] when it has all."""
    if compares_features(spec):
        return _missing_feature(spec, manifest)
    if not reads_teacher(spec):
        return []
    if of_depth(spec):
        return _missing_head(manifest, DEPTH)
    lacks = _missing_head(manifest, SEGMENTATION)
    if lacks:
        return lacks
    head = manifest.heads[SEGMENTATION]
    if spec.kind in ("cwd", "dkd") and head.k < head.classes:
        what = f"the logits of all {head.classes} classes, of which {head.k} are kept"
        lacks.append(Missing(what, f"--top-k {head.classes}"))
    if spec.kind == "cwd" and not getattr(head, "raw", False):
        lacks.append(Missing(f"raw logits ({MAXIMUM})", "--raw-logits"))
    return lacks


def _missing_feature(spec: TermSpec, manifest: Any) -> list[Missing]:
    offered, tap = _offered(spec, manifest), spec.teacher_tap
    if offered and (tap is None or tap in offered):
        return []
    name = tap or "TAP"
    what = f"the attention map or features of {name}" if spec.kind == "at" else f"features/{name}"
    has = f"the store has {', '.join(offered)}" if offered else "the store has none"
    return [Missing(f"{what} ({has})", f"--statistics at:{name}" if spec.kind == "at" else f"--features {name}")]


def _offered(spec: TermSpec, manifest: Any) -> list[str]:
    """Teacher's taps that a term can use, most useful last; for `at` those with a stored map come after all others."""
    taps = list(manifest.features)
    if spec.kind == "at":
        taps += _maps(manifest)
    return taps


def _maps(manifest: Any) -> list[str]:
    """Taps whose attention map is stored."""
    statistics: Mapping[str, Any] = getattr(manifest, "statistics", {})
    return [name.removeprefix("at.") for name in statistics if name.startswith("at.")]


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else ""
