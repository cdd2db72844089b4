"""Check that the data set of a training is still what its cache was built from."""

from collections.abc import Callable

from kdcache.data import UNRECORDED, Split, changed_data, open_split
from kdcache.errors import DataError
from kdcache.store import Cache, data_changes, renewal
from kdcache.training.config import TrainConfig


def check_same_data(config: TrainConfig, cache: Cache, note: Callable[[str], None]) -> None:
    """Check that a data set still has the samples that the cache was built from, unchanged.

    The data set is `--data`. Without `--data`, it is the split of `--val` that has the cache's samples. Changes there
    are only noted, because the training does not read this split.

    Args:
        config: the stream's settings.
        cache: the stream's open cache.
        note: is called with notes about changes.
    Raises: DataError for a data set that cannot be read. MismatchError that names the changed samples.
    """
    split = (
        open_split(config.data.data, config.data.split)
        if config.data.data is not None
        else _beside_validation(config, cache)
    )
    if split is None:
        if not cache.manifest.records_contents:
            note(UNRECORDED)
        return
    changes = data_changes(cache, split)
    for text in changes.notes():
        note(text)
    if not changes:
        return
    renew = renewal(cache.place, split.data)
    if config.data.data is None:
        note(f"{split.data} has changed since {cache.place} was built: {changes.describe()}. To train on it: {renew}")
        return
    fix = f"restore the data set, or renew the cache: {renew}"
    if cache.pixels_stored:
        fix += ". To train on what the cache stores, leave --data out"
    raise changed_data(cache.place, changes, split, fix)


def _beside_validation(config: TrainConfig, cache: Cache) -> Split | None:
    """Return the split in the data set of `--val` that has most of the cache's samples, or None."""
    if config.data.val is None:
        return None
    try:
        split = open_split(config.data.val, cache.manifest.dataset.split)
    except DataError:
        return None
    return split if len(set(split.ids) & set(cache.ids)) > len(cache.ids) // 2 else None
