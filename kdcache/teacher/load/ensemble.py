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
    """Load one teacher, or several as an ensemble.

    Args:
        origins: one text for each teacher. It is a run folder, `RUN@best-ema` for other weights of the run, `SPEC@FILE`
            for weights trained elsewhere, or `SPEC@default` for weights that the library downloads.
        classes: the classes of the data set.
        weights: weight of each teacher's probabilities. Default: equal.
        tta: test-time augmentation. None uses the image only.
        folds: number of folds. Teacher i then predicts the samples of fold i, instead of averaging. None averages.
        folds_by: regular expression whose match in a sample id names the sample's sequence. A sequence is never divided
            between folds. None divides samples by a hash of their ids.
        class_map: file that names the data class for each class of a teacher. None if the classes are the same.
        mean: RGB mean of the normalisation, for pixels from 0 to 1. Default: each teacher's own.
        std: RGB standard deviation of the normalisation, for pixels from 0 to 1. Default: each teacher's own.
        trust: whether a function that a run names as its model may be imported and called.
        classified: True if the segmentation head is used. Its classes must then fit the data set.
    Raises: RecipeError for a wrong number of weights or teachers. ModelError or MismatchError for a teacher that does
        not fit the data set.
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
        each = [f"{origin} has {' and '.join(names)}" for origin, names in zip(origins, heads, strict=True)]
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
    """Load the teachers of a cache again, with the settings in the cache's fingerprint.

    The settings are each teacher's weight in the ensemble, the test-time augmentation, the folds, and mean and std of
    the pixels. `origins` gives the networks. To find out whether they are the same teachers, compare the fingerprint of
    the result with `fingerprint`.

    Args:
        fingerprint: the entry on the teacher in the cache's manifest.
        origins: for each teacher a run folder, `RUN@best-ema`, `SPEC@FILE` or `SPEC@default`, in the order of the
            build.
        classes: the classes of the data set.
        class_map: file that names the data class for each class of a teacher. None if the classes are the same.
        classified: whether the cache has a segmentation head.
    Raises: MismatchError for another number of teachers, for a cache of earlier versions with one teacher per head, or
        for other classes. ModelError or RecipeError for a teacher that cannot be loaded.
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
    """Check that this version can load the teachers of a cache. `fingerprint` is the manifest's entry on them.

    Raises: MismatchError for a cache of earlier versions with one teacher per head.
    """
    if fingerprint.per_head:
        raise MismatchError(
            f"This version of kdcache cannot compute a cache of one teacher per head: {fingerprint.spec}",
            fix="Read it and train from it as it is. To compute its arrays, build a cache of each teacher, the "
            "further ones with --like, and give them all to train-student --cache. Restore damaged files from a copy.",
        )


def check_cross_fit(origins: Sequence[str], split: Split, by: str | None = None) -> None:
    """Check that each teacher was trained without the fold that it will predict, and saw every class.

    Args:
        origins: run folder of each teacher. Teacher i predicts fold i.
        split: the data set. All its labels are read.
        by: regular expression whose match in a sample id names the sample's sequence. None for folds by a hash of each
            id.

    Raises:
        MismatchError: a teacher has seen its fold, or was trained on other data than `split`.
        RecipeError: a run does not have a recipe, or a class has labels in one fold only.
    """
    folds = len(origins)
    check_folds(split, folds, by)
    for number, origin in enumerate(origins):
        expected = Fold(number, folds, by)
        run = Run.open(origin)
        if run.recipe is None:
            raise RecipeError(
                f"{origin} does not say which fold it left out: {run.folder / RECIPE} does not exist",
                fix="Give the --out of train-teacher --fold I/K",
            )
        left_out = fold_left_out(run.recipe)
        if left_out != expected:
            same = left_out is not None and left_out[:2] == expected[:2]
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
    """Return, for each sample of a split, the index of the member of the ensemble `teacher` that predicts it.

    Returns None if all members predict together.
    """
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
