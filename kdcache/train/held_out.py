"""Whether the fold that a plain run left out is unknown to a store's teacher too: only there can both be compared.

Folds are dealt out over a whole list of ids: fold 0 of 5 of another list, or of a part of it, is other samples.
"""

from kdcache.data import Fold
from kdcache.errors import KDCacheError, MismatchError
from kdcache.store import Cache, open_cache
from kdcache.store.subset import ids_digest
from kdcache.train.config import TrainConfig


def check_same_samples(cache: Cache, run: str, trained_on: str, config: TrainConfig) -> str | None:
    """Refuse a run of other samples than the store's, of which its fold is another.

    Args:
        trained_on: identity of the run's data, from its folder.
        config: the run's settings.
    Returns: a note for the user when the run's samples cannot be identified any more.
    Raises: MismatchError.
    """
    theirs = _samples_of(cache, trained_on, config)
    names = cache.manifest.dataset.class_names
    if theirs is None:
        return (
            f"whether {run} left out fold {config.fold} of these very samples is not known: {config.cache}, the store "
            "that it was trained from, is gone or another. If its samples were others, train it again on this store."
        )
    if theirs not in (cache.manifest.dataset.ids_digest, ids_digest(names, cache.ids)):
        raise MismatchError(
            "trust is measured on a fold of the very samples of the store: which those are depends on all ids",
            received=f"{run} was trained on other samples than the {len(cache.ids)} of {cache.place}",
            remedy=f"train it on this store: kdcache train-student --cache {cache.place} --method none "
            f"--fold {config.fold}",
        )
    return None


def doubt(cache: Cache, fold: Fold) -> str | None:
    """A note that the teacher may have seen the fold on which it is compared; None when it cannot have."""
    teacher, digest = cache.manifest.teacher, cache.manifest.dataset.ids_digest
    if teacher.folds is not None:  # each sample's teacher has not seen it
        return None
    trainings = teacher.trainings or (None,)
    on_these = [training for training in trainings if training is not None and training.ids_digest == digest]
    has_seen = [training for training in on_these if not training.left_out(*fold)]
    flags = f"--fold {fold.number}/{fold.folds}" + ("" if fold.by is None else f" --folds-by '{fold.by}'")
    remedy = f"train the teacher with {flags} too and build its store, or build with --folds K"
    if has_seen:
        without = has_seen[0].fold
        seen = "all of these samples"
        if without is not None:
            seen = f"all but fold {Fold(*without, has_seen[0].folds_by)} of these samples"
        return (
            f"the teacher was trained on {seen}, so it may have seen fold {fold}, on which it is compared with the "
            f"plain run: trust in it is too generous. Remedy: {remedy}"
        )
    if len(on_these) < len(trainings):
        return (
            f"the store does not say whether its teacher was trained on fold {fold}, on which it is compared with the "
            f"plain run. If it was, trust in it is too generous: {remedy}"
        )
    return None


def _samples_of(cache: Cache, trained_on: str, config: TrainConfig) -> str | None:
    """The digest of classes and ids that a run was trained on, or left out; None when that is lost."""
    kind, _, digest = trained_on.partition(" ")
    if kind == "data":
        return digest
    if kind == "store" and digest == _seal(cache):
        return cache.manifest.dataset.ids_digest
    if kind != "store" or config.cache is None:
        return None
    try:
        theirs = open_cache(config.cache, cache_dir=config.cache_dir)
    except KDCacheError:  # moved, or damaged: it is not needed for anything else
        return None
    return theirs.manifest.dataset.ids_digest if digest == _seal(theirs) else None


def _seal(cache: Cache) -> str | None:
    return None if cache.ledger is None else cache.ledger.completion.ledger_sha256
