"""One training at a time per run folder: a second one would write the same checkpoint."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kdcache.errors import RecipeError

LOCK = ".lock"


class RunLock:
    """Held by the process that writes a run, from `take` to the end of the block. The system ends it with the process.

    Args:
        run: the folder, which may not exist yet.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._path = run / LOCK
        self._lock: FileLock | None = None

    def take(self) -> None:
        """Hold the folder, which exists, from now on. Raises: RecipeError that names the process that holds it."""
        if self._lock is not None:
            return
        lock = FileLock(self._path, blocking=False)
        holder = _read(self._path)
        try:
            lock.acquire()
        except Timeout:
            raise RecipeError(
                "a run is trained by one command at a time",
                received=f"{self._run} is being trained by {holder or 'another process'}",
                remedy="let that end, or stop it and repeat this command with --resume; or give another --out",
            ) from None
        self._lock = lock
        with suppress(OSError):  # for messages alone
            self._path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            with suppress(OSError):  # where a file that is held cannot be removed
                self._path.unlink(missing_ok=True)  # while it is held: who opened it before finds it gone, and repeats
            self._lock.release()
            self._lock = None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
