"""Errors for files that are damaged or cannot be read. `file` is a path or an address."""

import errno
from collections.abc import Callable

from kdcache.errors import CorruptError, KDCacheError, StoreError

_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)  # no fault of the store
_COMMAND = "the command that wrote it (build-teacher-cache or copy)"
AGAIN = f"Run {_COMMAND} again"
"""The words in a fix that proposes a repair."""


def without_spare(error: KDCacheError, store: object) -> KDCacheError:
    """Return a copy of `error` that also says that zarr.json has no spare copy.

    Its fix is then to restore zarr.json from a copy, or to build the cache again. `store` is the cache's path or
    address.
    """
    before = error.fix.partition(AGAIN)[0]
    return type(error)(f"{error.problem}, and zarr.json has no spare copy", fix=before + restored(store))


def restored(store: object) -> str:
    """Return the text of the fix for a cache whose zarr.json and spare copy are both lost.

    `store` is the cache's path or address.
    """
    return f"Restore zarr.json from a copy, or delete all of {store} and repeat {_COMMAND}."


def damaged(file: object, what: str) -> CorruptError:
    """Return the error for a damaged shard file.

    The error's fix is to repeat the build or copy, which writes the file again. In an object store, the user must
    delete the damaged file first.

    Args:
        file: path or address of the file.
        what: what is wrong with it, such as "the file is missing".
    """
    return CorruptError(
        f"Damaged cache file {file}: {what}",
        fix=f"Delete it. {AGAIN}: it rebuilds what is missing."
        if "://" in str(file)
        else f"{AGAIN}: it rebuilds what is damaged.",
    )


def fix_of_files(*, remote: bool) -> str:
    """Return the text that tells a user how to fix damaged shard files. `remote` is True for an object store."""
    return f"{'Delete these files. ' if remote else ''}{AGAIN}: it rebuilds only them."


def damaged_metadata(file: object, what: str = "it was changed or removed") -> CorruptError:
    """Return the error for a damaged manifest, id file, ledger or seal.

    The error's fix is to run the build again, which writes this file again.

    Args:
        file: path or address of the file.
        what: what is wrong with it.
    """
    return CorruptError(f"Damaged cache file {file}: {what}", fix=f"{AGAIN}: it writes this file again.")


def unreadable(
    file: object, what: str, error: Exception, damage: Callable[[object, str], CorruptError] = damaged
) -> KDCacheError:
    """Return the error for a file that could not be read.

    The result is a StoreError if this process may not open the file or has too many open files. Otherwise it is the
    CorruptError that `damage` returns.

    Args:
        file: path or address of the file.
        what: what is wrong with the file, such as "the shard cannot be opened".
        error: the exception that was raised.
        damage: a function that returns the error for a damaged file. It is called with `file` and `what`.
    """
    number = getattr(error, "errno", None)
    if number in _OURS:
        return StoreError(
            f"Cannot read {file}: {error}", fix="Check its permissions. For too many open files, raise ulimit -n"
        )
    return damage(file, f"{what} ({error}{', links are not followed' if number == errno.ELOOP else ''})")


def unreadable_metadata(file: object, error: Exception, what: str = "it was changed or removed") -> KDCacheError:
    """Return the error for a manifest, id file, ledger or seal that could not be read.

    The result is a StoreError if this process may not open the file or has too many open files. Otherwise it is a
    CorruptError.

    Args:
        file: path or address of the file.
        error: the exception that was raised.
        what: what is wrong with the file.
    """
    return unreadable(file, what, error, damaged_metadata)
