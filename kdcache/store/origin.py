"""Whether a data set is the one that a store was built from: record n of a store is sample n of that one only."""

from collections.abc import Sized
from typing import Protocol

from kdcache.errors import MismatchError
from kdcache.store.reader import Cache


class Origin(Protocol):
    """What is asked of a split."""

    data: str
    split: str

    @property
    def classes(self) -> Sized: ...
    def __len__(self) -> int: ...
    def digest(self) -> str: ...


def check_origin(cache: Cache, split: Origin | None, *, needed: bool) -> None:
    """Refuse a data set that the store was not built from, and none for a store without pixels where it is needed.

    Raises: MismatchError.
    """
    about = cache.manifest.dataset
    if split is None and needed and not cache.pixels_stored:
        raise MismatchError(
            "a store without pixels needs its data set beside it",
            received=f"{cache.place} was built with --pixels source, and no data set was given",
            remedy=f"add --data (the folder of {about.name!r})",
        )
    if split is not None and split.digest() != about.ids_digest:
        raise MismatchError(
            "a store is used with the data set that it was built from",
            received=f"{split.data}, split {split.split!r} ({len(split)} samples, {len(split.classes)} classes), for "
            f"{about.name!r}, split {about.split!r} ({about.samples} samples, {len(about.class_names)} classes)",
            remedy="give the original data set with --data and --split, or build a store of this one",
        )
