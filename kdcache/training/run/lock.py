"""One training at a time per run folder, because two would write the same checkpoint."""

from pathlib import Path

from kdcache.errors import RecipeError
from kdcache.locks import Lock

LOCK = ".lock"


class RunLock:
    """A lock on a run's folder, so that only one training writes it. Use it in a with block, and call `take` inside.

    The lock ends with the block, or with the process.

    Args:
        run: the folder, which may not exist yet.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock: Lock | None = None

    def take(self) -> None:
        """Lock the folder, which must exist. Raises: RecipeError that names the process that has the lock."""
        if self._lock is not None:
            return
        lock = Lock(self._run / LOCK)
        if not lock.acquire(wait=False) and not lock.outlive():
            raise RecipeError(
                f"Cannot train {self._run}: it is being trained by {lock.owner or 'another process'}",
                fix="Let that end, or stop it and repeat this command with --resume. Or give another --out.",
            )
        self._lock = lock

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
