"""Errors for files that are not what was written, or cannot be read. `file` is a path or an address."""

import errno

from kdcache.errors import CorruptError, KDCacheError, StoreError

_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)  # no fault of the store
AGAIN = "run the command that wrote it (build-teacher-cache, extend or copy) again"
"""The words that remedies begin with."""


def without_spare(error: KDCacheError, store: object) -> KDCacheError:
    """The error of a root's zarr.json that no spare is left of: what it held cannot be written again."""
    before = error.remedy.partition(AGAIN)[0]
    received = f"{error.received}; there is no spare of zarr.json"
    return type(error)(error.rule, received=received, remedy=before + restored(store))


def restored(store: object) -> str:
    """The remedy for a manifest that cannot be written again."""
    return f"restore zarr.json from a copy, or delete all of {store} and {AGAIN}"


def damaged(file: object, what: str) -> CorruptError:
    """The error for a file of a shard: a build redoes it, in an object store when it is gone."""
    return CorruptError(
        "a store's files must be those that were written",
        received=f"{file}: {what}",
        remedy=f"delete it and {AGAIN}: it redoes what is missing"
        if "://" in str(file)
        else f"{AGAIN}: it redoes what is damaged",
    )


def remedy_of_files(*, remote: bool) -> str:
    """The remedy for a list of files, as a sentence."""
    return (
        f"Delete these files, then {AGAIN}: it redoes them alone." if remote else f"R{AGAIN[1:]}: it redoes them alone."
    )


def damaged_metadata(file: object, what: str = "it was changed or removed") -> CorruptError:
    """The error for what a build writes again wherever the store is: manifest, array metadata, ids, ledger, seal."""
    return CorruptError(
        "a store's files must be those that were written",
        received=f"{file}: {what}",
        remedy=f"{AGAIN}: it writes this file anew",
    )


def unreadable(file: object, what: str, error: Exception) -> KDCacheError:
    """The error for a shard that is damaged, or that this process may not or cannot open."""
    number = getattr(error, "errno", None)
    if number in _OURS:
        return _not_allowed(file, error)
    return damaged(file, f"{what} ({error}{_links(number)})")


def unreadable_metadata(file: object, error: Exception, what: str = "it was changed or removed") -> KDCacheError:
    """The error for metadata, ledger or seal that are damaged, or that this process may not or cannot open."""
    number = getattr(error, "errno", None)
    if number in _OURS:
        return _not_allowed(file, error)
    return damaged_metadata(file, f"{what} ({error}{_links(number)})")


def _links(number: int | None) -> str:
    return "; links are not followed" if number == errno.ELOOP else ""


def _not_allowed(file: object, error: Exception) -> StoreError:
    return StoreError(
        "the files of a store must be readable",
        received=f"{file}: {error}",
        remedy="check its permissions; for too many open files raise ulimit -n",
    )
