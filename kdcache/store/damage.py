"""What to say of a file that is not what was written, or cannot be read. `file` is a path or an address."""

import errno

from kdcache.errors import CorruptError, KDCacheError, StoreError

_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)  # no fault of the store


def damaged(file: object, what: str) -> CorruptError:
    """Of a shard, a ledger record or the seal: a build redoes them, in an object store when they are gone."""
    again = "run the command that wrote it (build-teacher-cache, extend or copy) again: it redoes what is"
    return CorruptError(
        "a store's files must be those that were written",
        received=f"{file}: {what}",
        remedy=f"delete it and {again} missing" if "://" in str(file) else f"{again} damaged",
    )


def damaged_metadata(file: object) -> CorruptError:
    """Of a file that a build cannot write again: manifest, array metadata, ids."""
    return CorruptError(
        "a store's metadata must be what was written",
        received=f"{file} was changed or removed",
        remedy="restore that file from a copy of the store, or build into a new folder",
    )


def unreadable(file: object, what: str, error: Exception) -> KDCacheError:
    """For a shard, a ledger record or the seal: it is damaged, or this process may not or cannot open it."""
    number = getattr(error, "errno", None)
    if number in _OURS:
        return _not_allowed(file, error)
    return damaged(file, f"{what} ({error}{'; links are not followed' if number == errno.ELOOP else ''})")


def unreadable_metadata(file: object, error: Exception) -> KDCacheError:
    """The same for metadata."""
    return _not_allowed(file, error) if getattr(error, "errno", None) in _OURS else damaged_metadata(file)


def _not_allowed(file: object, error: Exception) -> StoreError:
    return StoreError(
        "the files of a store must be readable",
        received=f"{file}: {error}",
        remedy="check its permissions; for too many open files raise ulimit -n",
    )
