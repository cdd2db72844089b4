"""Errors for files that are damaged or cannot be read. `file` is a path or an address."""

import errno
from collections.abc import Callable

from kdcache.errors import CorruptError, KDCacheError, StoreError

_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)  # no fault of the store
_COMMAND = "the command that wrote it (build-teacher-cache or copy)"
AGAIN = f"Run {_COMMAND} again"
"""The words of a fix that a repair follows."""


def without_spare(error: KDCacheError, store: object) -> KDCacheError:
    """Return the error for a cache whose zarr.json is lost and has no spare copy to restore it from."""
    before = error.fix.partition(AGAIN)[0]
    return type(error)(f"{error.problem}, and zarr.json has no spare copy", fix=before + restored(store))


def restored(store: object) -> str:
    """Return the fix for a manifest that is lost together with its spare copy."""
    return f"Restore zarr.json from a copy, or delete all of {store} and repeat {_COMMAND}."


def damaged(file: object, what: str) -> CorruptError:
    """Return the error for a damaged file of a shard. A build writes it again, in an object store if it is missing."""
    return CorruptError(
        f"Damaged cache file {file}: {what}",
        fix=f"Delete it. {AGAIN}: it rebuilds what is missing."
        if "://" in str(file)
        else f"{AGAIN}: it rebuilds what is damaged.",
    )


def fix_of_files(*, remote: bool) -> str:
    """Return the fix for a list of damaged files."""
    return f"{'Delete these files. ' if remote else ''}{AGAIN}: it rebuilds only them."


def damaged_metadata(file: object, what: str = "it was changed or removed") -> CorruptError:
    """Return the error for damaged metadata that every build writes again: manifest, ids, ledger, seal."""
    return CorruptError(f"Damaged cache file {file}: {what}", fix=f"{AGAIN}: it writes this file again.")


def unreadable(
    file: object, what: str, error: Exception, damage: Callable[[object, str], CorruptError] = damaged
) -> KDCacheError:
    """Return the error for a file, by default of a shard, that is damaged or that this process cannot open."""
    number = getattr(error, "errno", None)
    if number in _OURS:
        return StoreError(
            f"Cannot read {file}: {error}", fix="Check its permissions. For too many open files, raise ulimit -n"
        )
    return damage(file, f"{what} ({error}{', links are not followed' if number == errno.ELOOP else ''})")


def unreadable_metadata(file: object, error: Exception, what: str = "it was changed or removed") -> KDCacheError:
    """Return the error for metadata, a ledger or a seal that is damaged or that this process cannot open."""
    return unreadable(file, what, error, damaged_metadata)
