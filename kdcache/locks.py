"""Locks for one process at a time, on every file system: `flock`, or a lease if there is none.

The system ends a `flock` with its process. Some file systems do not have it (Lustre by default, NFS without lockd).
There the lock is a file NAME.owner with host, process and start. Its owner touches it every 10 seconds. Another process
takes it over at once if the owner was a process of the same machine that has died, and otherwise if nobody touched it
for 30 seconds. Both kinds remove their file at the end.
"""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from socket import gethostname

from filelock import SoftFileLease, Timeout

from kdcache.errors import plain_logger

STALE_S = 30
"""Seconds without a sign of life after which another process takes over a lease."""
_OWNER = ".owner"
_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
_log = plain_logger(__name__)


class Lock:
    """A lock for one process at a time, on every file system.

    It uses `flock`. If the file system does not have it, a file with the owner's host and process id (a lease) replaces
    it. The lock is held from `acquire` to `release`, or until the process ends. `with lock:` waits for it and releases
    it.

    Args:
        path: a file that the lock creates and removes, in an existing folder. Or a folder, which stays unchanged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
        self._lease: SoftFileLease | None = None

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock and return True. If `wait` is False and another process has the lock, return False at once.

        Raises: OSError if the lock's file cannot be opened.
        """
        if self._lease is None:
            try:
                return self._acquire_flock(wait)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
            self._lease = _lease(self._path)
        try:
            self._lease.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return False
        return True

    def outlive(self) -> bool:
        """Take over a lock that `acquire` did not get, if the process that has it is dead. Return True if it was taken.

        If the lock is a lease, this waits up to 32 seconds, because a dead process's lease expires in that time. If the
        lock uses `flock`, the result is False at once. Such a lock ends with its process, so its owner must be alive.
        """
        if self._lease is not None:
            with suppress(Timeout):
                self._lease.acquire(timeout=STALE_S + 2)
                return True
        return False

    @property
    def owner(self) -> str:
        """The process that has the lock, for messages: `process 4711 on HOST`, or '' if it is unknown."""
        if self._lease is not None:
            owner = self._lease.owner
            return "" if owner is None else f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
        with suppress(OSError):
            return self._path.read_text(encoding="utf-8", errors="replace").strip()
        return ""

    def release(self) -> None:
        """Release the lock and remove its file."""
        if self._lease is not None:
            self._lease.release()
        if self._handle is not None:
            if not self._path.is_dir():
                with suppress(OSError):
                    self._path.unlink()  # while it is held: a process that waits for it finds it gone, and repeats
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _acquire_flock(self, wait: bool) -> bool:
        folder = self._path.is_dir()
        while True:
            handle = os.open(self._path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(handle)
                return False
            except BaseException as error:
                os.close(handle)
                if isinstance(error, OSError) and error.errno in _NO_FLOCK and not folder:
                    self._path.unlink(missing_ok=True)
                raise
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), self._path.stat()):
                    self._handle = handle
                    if not folder:
                        with suppress(OSError):  # for messages only
                            os.truncate(handle, 0)
                            os.pwrite(handle, f"process {os.getpid()} on {gethostname()}".encode(), 0)
                    return True
            os.close(handle)  # the process before has removed it


def is_lock(path: Path, name: str) -> bool:
    """Return True if `path` is a lock file of the name `name`, or a temporary file of this lock.

    A killed process may leave the temporary file next to the lock file.
    """
    return path.name == name or path.name.startswith(f"{name}{_OWNER}")


def _lease(path: Path) -> SoftFileLease:
    """Return the lease that replaces `flock`. Its file is next to the lock's file."""
    file = path / f".lock{_OWNER}" if path.is_dir() else path.with_name(path.name + _OWNER)
    lost = lambda loss: _log.warning("another process may have taken the lock %s over: %s", file, loss.reason)  # noqa: E731
    # Whoever takes a shard is not the thread that lets go of it.
    return SoftFileLease(file, lease_duration=STALE_S, on_compromise=lost, thread_local=False)
