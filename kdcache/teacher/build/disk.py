"""Measure a disk's write speed, at first and once its write cache is full."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.errors import RecipeError
from kdcache.teacher.build.cost_estimate import Estimate

MOST_BYTES = 2_000_000_000
MOST_SECONDS = 30.0
SLOWER = 0.5
"""A disk counts as slowing down if its last rate is below this fraction of its first rate."""
_PIECE = 16 * 2**20
_PART = 5
"""The first and the last part are each a fifth of what is written."""


@dataclass(frozen=True)
class DiskRate:
    """The measured write speed of a disk.

    Attributes:
        folder: the folder in which it was measured.
        bytes: number of bytes written, and deleted again.
        seconds: duration of writing.
        first: bytes per second of the first fifth.
        last: bytes per second of the last fifth, when the disk's write cache may be full.
    """

    folder: str
    bytes: int
    seconds: float
    first: float
    last: float

    @classmethod
    def of(cls, folder: str, pieces: Sequence[tuple[int, float]]) -> "DiskRate":
        """Return the write speed of a disk from the times of several pieces that were written to `folder`.

        `pieces` has the number of bytes and the seconds of each piece, in the order of writing.
        """
        part = max(1, len(pieces) // _PART)
        size, seconds = _sum(pieces)
        first, last = (
            part_bytes / max(taken, 1e-9) for part_bytes, taken in (_sum(pieces[:part]), _sum(pieces[-part:]))
        )
        return cls(folder, size, seconds, first, last)

    @property
    def slows_down(self) -> bool:
        """True if the disk wrote the last fifth at less than half the rate of the first fifth."""
        return self.last < SLOWER * self.first


class Bound(NamedTuple):
    """The bottleneck of a build.

    Attributes:
        name: `teacher`, `decoding` or `disk`.
        seconds: seconds per record of each of these three, by name.
        build_seconds: estimated duration of the whole build, in seconds.
    """

    name: str
    seconds: dict[str, float]
    build_seconds: float

    def to_json(self, disk: DiskRate) -> dict[str, Any]:
        """Return the bottleneck's fields and those of `disk`, the disk's measured speed, as one dict of JSON values."""
        measured = {**asdict(disk), "slows_down": disk.slows_down}
        return {**measured, "bound": self.name, "seconds_per_record": self.seconds, "build_seconds": self.build_seconds}


def bound_of(estimate: Estimate, disk: DiskRate, threads: int) -> Bound:
    """Return the bottleneck of a build.

    Args:
        estimate: the estimated cost of the build.
        disk: the measured write speed.
        threads: number of threads that decode and resize images. With 0, the thread that runs the teacher does it.
    """
    cost = estimate.chosen
    cores = min(max(1, threads), os.cpu_count() or 1)
    seconds = {
        "teacher": estimate.seconds.teach,
        "decoding": estimate.seconds.render / cores,
        "disk": cost.bytes_per_record / disk.last,
    }
    return Bound(max(seconds, key=seconds.__getitem__), seconds, max(cost.seconds, cost.bytes / disk.last))


def check_local(out: str) -> None:
    """Raise RecipeError if `out` is an object-store address, which does not have a disk to measure."""
    if "://" in out:
        raise RecipeError(
            f"Cannot measure the disk of {out}: it is an object store",
            fix="Leave --measure-disk out, or give a local folder with --out",
        )


def measure_disk(
    out: str,
    *,
    most_bytes: int = MOST_BYTES,
    most_seconds: float = MOST_SECONDS,
    progress: Callable[[str, int, int], None] | None = None,
) -> DiskRate:
    """Measure a disk's write speed with random bytes, which are deleted again.

    At most half of the free space is written. Nothing is left if the process is killed.

    Args:
        out: folder on the disk. If it does not exist, its nearest existing parent is used.
        most_bytes: maximum number of bytes to write.
        most_seconds: seconds after which writing stops.
        progress: called with (description of the step, bytes done, total bytes).
    Raises: RecipeError for an object-store address, and for a folder that is not writable.
    """
    check_local(out)
    path = Path(out).absolute()
    folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
    pieces: list[tuple[int, float]] = []
    written = 0
    try:
        free = os.statvfs(folder)
        most = min(most_bytes, free.f_bavail * free.f_frsize // 2)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            while written < most and sum(seconds for _, seconds in pieces) < most_seconds:
                content = os.urandom(min(_PIECE, most - written))
                began = time.perf_counter()
                file.write(content)
                os.fsync(file.fileno())
                pieces.append((len(content), time.perf_counter() - began))
                written += len(content)
                if progress is not None:
                    progress("measuring the disk", written, most)
    except OSError as error:
        raise RecipeError(
            f"Cannot write to {folder} for --measure-disk: {error.strerror or error}",
            fix="Free some space, or name another place with --out",
        ) from error
    if not pieces:
        raise RecipeError(f"Cannot measure the disk of {folder}: no space is free", fix="Name another --out.")
    return DiskRate.of(str(folder), pieces)


def _sum(pieces: Sequence[tuple[int, float]]) -> tuple[int, float]:
    return sum(size for size, _ in pieces), sum(seconds for _, seconds in pieces)
