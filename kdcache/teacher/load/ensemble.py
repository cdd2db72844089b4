"""Several teachers as one: an ensemble with averaged probabilities, or for each fold an unbiased teacher."""

import re
from collections.abc import Sequence
from pathlib import Path

from kdcache.data import ClassList, Fold, Split, check_folds, check_folds_by
from kdcache.errors import MismatchError, RecipeError
from kdcache.models import EnsembleModel, Tta
from kdcache.run_folder import RECIPE, Run
from kdcache.settings.removed import TEACHERS, removal
from kdcache.store import Fingerprint
from kdcache.teacher.load.load import RGB, Teacher, load_teacher
from kdcache.teacher.load.provenance import fold_left_out

_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.+)")
"""HEAD=ORIGIN of earlier versions. A spec has a colon before any equals sign."""


def load_teachers(
    origins: Sequence[str],
    classes: ClassList,
    *,
    weights: Sequence[float] | None = None,
    tta: Tta | None = None,
    folds: int | None = None,
    folds_by: str | None = None,
    class_map: str | Path | None = None,
    mean: RGB | None = None,
    std: RGB | None = None,
    trust: bool = False,
    classified: bool = True,
) -> Teacher:
    """Load one teacher, or several as one.

    `weights` weigh their probabilities (default: equal). `tta` averages predictions over renderings of every image.
    With `folds`, teacher i predicts the samples of fold i instead (see `check_cross_fit`), and `folds_by` is the
    pattern of the sequences that folds keep together. Other arguments are as in `load_teacher`, for each teacher.

    Raises: as `load_teacher`; RecipeError for weights or folds that are not one per teacher.
    """
    _check_plain(origins)
    _check_counts(origins, weights, folds, folds_by)
    loaded = [
        load_teacher(origin, classes, class_map=class_map, mean=mean, std=std, trust=trust, classified=classified)
        for origin in origins
    ]
    if len(loaded) == 1 and tta is None and weights is None:
        return loaded[0]
    heads = [teacher.model.learnt_heads for teacher in loaded]
    if folds is not None and len(set(heads)) > 1:
        each = [f"{origin} has {' and '.join(own)}" for origin, own in zip(origins, heads, strict=True)]
        raise RecipeError(
            f"The teachers of folds have different heads: {', '.join(each)}", fix="Train them with the same heads."
        )
    return Teacher(
        EnsembleModel([teacher.model for teacher in loaded], weights, tta).eval(),
        ", ".join(origins),
        loaded[0].size if len({teacher.size for teacher in loaded}) == 1 else None,
        loaded[0].class_map,
        tuple(dict.fromkeys(note for teacher in loaded for note in teacher.notes)),
        folds,
        folds_by,
        tuple(training for teacher in loaded for training in teacher.trainings),
        tuple(dict.fromkeys(parent for teacher in loaded for parent in teacher.parents)),
    )


def load_like(
    fingerprint: Fingerprint,
    origins: Sequence[str],
    classes: ClassList,
    *,
    class_map: str | Path | None = None,
    classified: bool = True,
) -> Teacher:
    """Load the teachers of a cache again, with the weights, augmentation, folds and normalisation of its manifest.

    Their fingerprint tells whether they are the same teachers. `classified` says whether the cache has a head of
    classes.

    Raises: as `load_teachers`; MismatchError for another number, and for a cache of one teacher per head.
    """
    check_computable(fingerprint)
    _check_plain(origins)
    count = max(1, len(fingerprint.members))
    if len(origins) != count:
        raise MismatchError(
            f"{len(origins)} teachers were given, but the cache has {count}: {fingerprint.spec}",
            fix="Give --teacher once for each, in the order of the build.",
        )
    if not fingerprint.members:
        return load_teacher(
            origins[0], classes, class_map=class_map, mean=fingerprint.mean, std=fingerprint.std, classified=classified
        )
    teacher = load_teachers(
        origins,
        classes,
        weights=[member.share for member in fingerprint.members],
        tta=None if fingerprint.tta is None else Tta(fingerprint.tta.flip, fingerprint.tta.scales),
        folds=fingerprint.folds,
        folds_by=fingerprint.folds_by,
        class_map=class_map,
        classified=classified,
    )
    assert isinstance(teacher.model, EnsembleModel)
    teacher.model.shares = tuple(member.share for member in fingerprint.members)  # to the last bit
    for model, member in zip(teacher.model.parts, fingerprint.members, strict=True):
        model.mean, model.std = member.mean, member.std
    return teacher


def check_computable(fingerprint: Fingerprint) -> None:
    """Check that this version can load the teachers of a cache. Raises: MismatchError for one teacher per head."""
    if fingerprint.per_head:
        raise MismatchError(
            f"This version of kdcache cannot compute a cache of one teacher per head: {fingerprint.spec}",
            fix="Read it and train from it as it is. To compute its arrays, build a cache of each teacher, the "
            "further ones with --like, and give them all to train-student --cache. Restore damaged files from a copy.",
        )


def check_cross_fit(origins: Sequence[str], split: Split, by: str | None = None) -> None:
    """Check that no teacher has seen the fold that it predicts, and that no fold lacks a class in training.

    Reads every label of the split. What a run has seen is known from its recipe, `fold = "i/K"` and `folds-by`, and the
    digest of its training split. `by` is the pattern of the sequences that folds keep together.

    Raises: MismatchError, RecipeError.
    """
    folds = len(origins)
    check_folds(split, folds, by)
    for number, origin in enumerate(origins):
        wanted = Fold(number, folds, by)
        run = Run.open(origin)
        if run.recipe is None:
            raise RecipeError(
                f"{origin} does not say which fold it left out: {run.folder / RECIPE} does not exist",
                fix="Give the --out of train-teacher --fold I/K",
            )
        left_out = fold_left_out(run.recipe)
        if left_out != wanted:
            same = left_out is not None and left_out[:2] == wanted[:2]
            raise MismatchError(
                f"Teacher {origin}, number {number} of {folds}{_sequences(by)}, "
                + (f"has fold {left_out}" if left_out else "has seen all folds"),
                fix=("Repeat the --folds-by of the trainings. Or train" if same else "Train")
                + f" and give the runs in this order: kdcache train-teacher --fold {number}/{folds}{_sequences(by)} "
                "--out RUN",
            )
        if run.model.trained_on != f"data {split.digest()}":
            raise MismatchError(
                f"{origin} was trained on other samples or classes than {split.data}, split {split.split!r}",
                fix="Train it on this data set and split, or give the data that it was trained on.",
            )


def folds_of_split(teacher: Teacher, split: Split) -> Sequence[int] | None:
    """Return the number of the teacher that predicts each sample of a split, or None if all predict together."""
    return None if teacher.folds is None else split.folds(teacher.folds, teacher.folds_by).tolist()


def _check_plain(origins: Sequence[str]) -> None:
    """Check that no teacher is given as HEAD=TEACHER, which was removed. Raises: RecipeError."""
    for origin in origins:
        if _NAMED.fullmatch(origin) and not Path(origin).exists():
            gone = removal("--teacher HEAD=TEACHER", TEACHERS)
            assert gone is not None
            raise gone.within(f"--teacher {origin}")


def _sequences(by: str | None) -> str:
    return "" if by is None else f" --folds-by '{by}'"


def _check_counts(
    origins: Sequence[str], weights: Sequence[float] | None, folds: int | None, folds_by: str | None
) -> None:
    check_folds_by(folds_by, folds=folds is not None)
    if folds is None:
        return
    if folds < 2 or folds != len(origins):
        raise RecipeError(
            f"--folds {folds} needs {folds} teachers, one for each fold, but {len(origins)} were given"
            if folds > 1
            else f"--folds {folds} is too small: it needs 2 or more",
            fix="Give --teacher once for each fold, in their order: number I was trained without fold I.",
        )
    if weights is not None and len(set(weights)) > 1:
        raise RecipeError(
            f"Cannot use --teacher-weights {','.join(f'{weight:g}' for weight in weights)} with --folds {folds}: these "
            "teachers are not averaged",
            fix="Leave out --teacher-weights",
        )
