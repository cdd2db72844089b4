"""Under torchrun every process runs the command: the first one prints, the others print nothing and end as it does."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import typer

from kdcache.errors import KDCacheError, RecipeError

GRACE_S = 10
"""Seconds that the first process has to print an error that all processes meet."""


def numbered() -> tuple[int, int]:
    """Return the number of this process, from 0, and the number of processes, as torchrun sets RANK and WORLD_SIZE.

    Without these variables, return (0, 1). Raises: RecipeError for invalid values.
    """
    texts = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    try:
        rank, size = int(texts["RANK"] or 0), int(texts["WORLD_SIZE"] or 1)
    except ValueError:
        rank, size = -1, 1
    if rank < 0 or size < 1 or rank >= size > 1:
        raise RecipeError(
            f"Invalid environment: {', '.join(f'{name}={text}' for name, text in texts.items() if text is not None)}",
            fix="Start the processes with torchrun, which numbers them by RANK from 0, below WORLD_SIZE. Or unset "
            "both: unset RANK WORLD_SIZE",
        )
    return rank, size


def is_first() -> bool:
    """Return True if this process is the only one, or the first of several that torchrun started."""
    rank, size = numbered()
    return size == 1 or rank == 0


@contextmanager
def one_voice() -> Iterator[None]:
    """Suppress all output in a with block, except in the first of several processes that torchrun started."""
    first = is_first()
    _note_environment()
    if first:
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    except SystemExit as end:
        if end.code == 2:
            _wait_for_the_first()
        raise


@contextmanager
def shared_errors() -> Iterator[None]:
    """Show an error only once, in a with block, if all processes of torchrun have the same error.

    The first process raises the error, and the others exit with code 2.
    """
    try:
        yield
    except KDCacheError:
        if is_first():
            raise
        raise typer.Exit(2) from None


def _note_environment() -> None:
    """Print a note if RANK and WORLD_SIZE are set, but not by torchrun. They may be left over in a shell."""
    rank, size = numbered()
    if (rank, size) == (0, 1) or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    what = f"process {rank} of {size} (from 0): it does its share of the work" if size > 1 else f"process {rank}"
    silent = "" if is_first() else ", and leaves the output to process 0"
    print(
        f"note: RANK={rank} and WORLD_SIZE={size} in the environment make this {what}{silent}. "
        "If nothing has started the others: unset RANK WORLD_SIZE",
        file=sys.stderr,
        flush=True,
    )


def _wait_for_the_first() -> None:
    """Wait until the first process has printed its error. torchrun ends all processes as soon as one ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    time.sleep(GRACE_S)
