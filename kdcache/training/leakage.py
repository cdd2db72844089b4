"""Whether a cache's teacher has seen what a run leaves out: its fold, or labels.

Folds divide a whole list of ids, so fold 0 of 5 of another list, or of a part of it, has other samples. A teacher that
was trained on other samples, elsewhere or from another list, is assumed to have seen none of these.
"""

import numpy as np

from kdcache.data import Fold, ids_digest
from kdcache.errors import KDCacheError, MismatchError
from kdcache.store import Cache, open_caches, seal_of
from kdcache.store.format.flags import Flags, unpack_flags
from kdcache.store.format.teacher_models import Training
from kdcache.training.config import TrainConfig


def check_same_samples(cache: Cache, run: str, trained_on: str, config: TrainConfig) -> str | None:
    """Check that a run was trained on the cache's samples. With other samples, the same fold number is another fold.

    Args:
        cache: an open cache.
        run: the run's folder, for messages.
        trained_on: the identity of the run's data, from its folder.
        config: the run's settings.
    Returns: a note for the user if the run's samples can no longer be identified, else None.
    Raises: MismatchError for a run on other samples.
    """
    theirs = _samples_of(cache, trained_on, config)
    names = cache.manifest.dataset.class_names
    if theirs is None:
        return (
            f"cannot tell whether {run} left out fold {config.data.fold} of these samples: its cache "
            f"{', '.join(config.data.cache or ())} is missing or has changed. If its samples were others, train it "
            "again on this cache."
        )
    if theirs not in (cache.manifest.dataset.ids_digest, ids_digest(names, cache.ids)):
        raise MismatchError(
            f"{run} was trained on other samples than the {len(cache.ids)} of {cache.place}, so its fold is another "
            "one",
            fix=f"Train it on this cache: kdcache train-student --cache {cache.place} --method none --fold "
            f"{config.data.fold}",
        )
    return None


def check_teacher(cache: Cache, config: TrainConfig, labels_used: Flags) -> list[str]:
    """Return notes about samples or labels that the run leaves out, but its cache's teacher may have seen.

    The list is empty if the run reads no targets.

    Args:
        cache: the run's open cache.
        config: the run's settings.
        labels_used: (N,) bool, True for each of the cache's samples whose label the run uses.
    Raises: MismatchError if the teacher was trained on labels that the run leaves out.
    """
    if not config.reads_targets:
        return []
    fold, notes = config.left_out, [_check_labels(cache, config, labels_used)]
    if fold is not None and (text := _fold_seen(cache, fold)) is not None:
        notes.append(
            f"{text}. The targets may contain its labels, so the student's score there may be too high. "
            f"Fix: train the teacher with {_flags_of(fold)} and build its cache"
        )
    return [note for note in notes if note is not None]


def doubt(cache: Cache, fold: Fold) -> str | None:
    """Return a note if the cache's teacher was trained on a part of the fold, or if the cache does not say. Else None.

    The result of `--class-trust` is measured on the fold. It is too high if the teacher was trained on it.
    """
    if cache.manifest.teacher.folds is not None:  # each sample's teacher has not seen it
        return None
    fix = f"train the teacher with {_flags_of(fold)} and build its cache, or build with --folds K"
    if (text := _fold_seen(cache, fold)) is not None:
        return f"{text}. Class trust is measured on this fold, so it is too generous. Fix: {fix}"
    if len(_on_these_samples(cache)) < len(_trainings(cache)):
        return (
            f"the cache does not say whether its teacher was trained on fold {fold}. If it was, class trust is "
            f"too generous, because it is measured on this fold. Fix: {fix}"
        )
    return None


def _check_labels(cache: Cache, config: TrainConfig, labels_used: Flags) -> str | None:
    """Raise MismatchError if the teacher learnt from labels that the run does not use, outside of its left-out fold.

    Returns: a note if it is not known which labels the teacher learnt from, else None.
    """
    limited = _limit(config) is not None
    without = ~(labels_used if limited else np.any([*cache.labelled.values()], axis=0))
    if not without.any():
        return None
    if config.left_out is not None:
        without &= ~config.left_out.holds(cache.ids)
    # Images without labels usually have a teacher from elsewhere; a limit is a claim about all that was learnt from.
    trainings = _trainings(cache) if limited else _on_these_samples(cache)
    known = [labels for training in trainings if (labels := _labels_of(cache, training)) is not None]
    hidden = np.flatnonzero(without & np.any([np.zeros_like(without), *known], axis=0)).tolist()
    if hidden:
        raise _hidden_labels(cache, config, int(labels_used.sum()), [cache.ids[number] for number in hidden])
    if len(known) == len(trainings):
        return None
    return (
        "the cache does not say which labels its teacher was trained on. If it had labels of these samples that this "
        f"run goes without, the run does not show what {labels_used.sum()} labels can do. Fix: build the cache of a "
        "run of train-teacher on the same labels"
    )


def _hidden_labels(cache: Cache, config: TrainConfig, used: int, hidden: list[str]) -> MismatchError:
    """Return the error for a teacher that was also trained on the labels of the samples `hidden`."""
    limit = config.data.limit_labels
    flag = _limit(config)
    some = ", ".join(hidden[:3]) + (f" and {len(hidden) - 3} more" if len(hidden) > 3 else "")
    teacher = "the data set as it was when the cache was built"
    if flag is not None:
        same = flag if limit is None else f"--limit-samples {used if limit < 1 else limit:g}"
        fold = "" if config.left_out is None else f" {_flags_of(config.left_out)}"
        teacher = f"the same labels, with train-teacher {same}{fold}"
    return MismatchError(
        "The teacher saw other labels than the student: "
        + ("" if flag is None else f"{flag}: ")
        + f"{used} labels, and the teacher of {cache.place} was trained on labels of {len(hidden)} more of its samples "
        f"({some})",
        fix=f"Train the teacher on {teacher}, and build its cache. Or learn from labels only, by --method none or "
        "--teacher labels",
    )


def _limit(config: TrainConfig) -> str | None:
    """Return the flag that limits a run's labels, or None if it uses all."""
    if config.data.labels_from is not None:
        return f"--labels-from {config.data.labels_from}"
    limit = config.data.limit_labels
    return None if limit is None else f"--limit-labels {limit:g}"


def _labels_of(cache: Cache, training: Training | None) -> Flags | None:
    """Return True for each of the cache's samples whose label a teacher learnt from, (N,) bool, or None if unknown."""
    dataset = cache.manifest.dataset
    if training is None:
        return None
    if training.ids_digest != dataset.ids_digest:
        return np.zeros(dataset.samples, np.bool_)
    return None if training.labels is None else unpack_flags(training.labels, dataset.samples, cache.place)


def _fold_seen(cache: Cache, fold: Fold) -> str | None:
    """Return a sentence about a teacher's training that has seen a part of the fold, or None."""
    for training in _on_these_samples(cache):
        labels = _labels_of(cache, training)
        if training.left_out(*fold) or (labels is not None and not (labels & fold.holds(cache.ids)).any()):
            continue
        extent = "all" if labels is None or labels.all() else f"the labels of {labels.sum()}"
        if training.fold is not None:
            extent = f"all but fold {Fold(*training.fold, training.folds_by)}"
        return f"the teacher was trained on {extent} of these samples, so it may have seen fold {fold}"
    return None


def _trainings(cache: Cache) -> tuple[Training | None, ...]:
    return cache.manifest.teacher.trainings or (None,)


def _on_these_samples(cache: Cache) -> list[Training]:
    """Return the teacher's trainings on exactly the cache's samples."""
    digest = cache.manifest.dataset.ids_digest
    return [training for training in _trainings(cache) if training is not None and training.ids_digest == digest]


def _flags_of(fold: Fold) -> str:
    return f"--fold {fold.number}/{fold.folds}" + ("" if fold.by is None else f" --folds-by '{fold.by}'")


def _samples_of(cache: Cache, trained_on: str, config: TrainConfig) -> str | None:
    """Return the digest of the ids and classes of a run's samples, or None if it is no longer known."""
    kind, _, digest = trained_on.partition(" ")
    if kind == "data":
        return digest
    if kind == "store" and digest == seal_of(cache):
        return cache.manifest.dataset.ids_digest
    if kind != "store" or config.data.cache is None:
        return None
    try:
        theirs = open_caches(config.data.cache, cache_dir=config.data.cache_dir)
    except KDCacheError:  # moved, or damaged: it is not needed for anything else
        return None
    return theirs.manifest.dataset.ids_digest if digest == seal_of(theirs) else None
