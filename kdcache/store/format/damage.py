"""Errors for files that are not what was written, or cannot be read. `file` is a path or an address."""

import errno
from collections.abc import Callable

from kdcache.errors import CorruptError, KDCacheError, StoreError

_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)  # no fault of the store
_AS_WRITTEN = "a store's files must be those that were written"
AGAIN = "run the command that wrote it (build-teacher-cache or copy) again"
"""The words that remedies begin with."""


def without_spare(error: KDCacheError, store: object) -> KDCacheError:
    """The error of a root's zarr.json that no spare is left of: what it held cannot be written again."""
    before = error.remedy.partition(AGAIN)[0]
    return error.restated(received=f"{error.received}; there is no spare of zarr.json", remedy=before + restored(store))


def restored(store: object) -> str:
    """The remedy for a manifest that cannot be written again."""
    return f"restore zarr.json from a copy, or delete all of {store} and {AGAIN}"


def damaged(file: object, what: str) -> CorruptError:
    """The error for a file of a shard: a build redoes it, in an object store when it is gone."""
    remote = "://" in str(file)
    remedy = f"delete it and {AGAIN}: it redoes what is missing" if remote else f"{AGAIN}: it redoes what is damaged"
    return CorruptError(_AS_WRITTEN, received=f"{file}: {what}", remedy=remedy)


def remedy_of_files(*, remote: bool) -> str:
    """The remedy for a list of files, as a sentence."""
    return (
        f"Delete these files, then {AGAIN}: it redoes them alone." if remote else f"R{AGAIN[1:]}: it redoes them alone."
    )


def damaged_metadata(file: object, what: str = "it was changed or removed") -> CorruptError:
    """The error for what a build writes again wherever the store is: manifest, array metadata, ids, ledger, seal."""
    return CorruptError(_AS_WRITTEN, received=f"{file}: {what}", remedy=f"{AGAIN}: it writes this file anew")


def unreadable(
    file: object, what: str, error: Exception, damage: Callable[[object, str], CorruptError] = damaged
) -> KDCacheError:
    """The error for a file that is damaged, by default one of a shard, or that this process may not or cannot open."""
    number = getattr(error, "errno", None)
    if number in _OURS:
        return StoreError(
            "the files of a store must be readable",
            received=f"{file}: {error}",
            remedy="check its permissions; for too many open files raise ulimit -n",
        )
    return damage(file, f"{what} ({error}{'; links are not followed' if number == errno.ELOOP else ''})")


def unreadable_metadata(file: object, error: Exception, what: str = "it was changed or removed") -> KDCacheError:
    """The error for metadata, ledger or seal that are damaged, or that this process may not or cannot open."""
    return unreadable(file, what, error, damaged_metadata)
