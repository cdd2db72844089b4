"""Under torchrun every process runs the command: the first one speaks, the others end as it does, in silence."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import typer

from kdcache.errors import KDCacheError

GRACE_S = 10
"""How long the first process may take to say what every process found."""


def is_first() -> bool:
    """Whether this process is alone or the first of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def one_voice() -> Iterator[None]:
    """What every process says is said once, wrong flags for instance."""
    if is_first():
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
    """Errors of kdcache inside are the same on every process, so that the first one's panel says it all."""
    try:
        yield
    except KDCacheError:
        if is_first():
            raise
        raise typer.Exit(2) from None


def _wait_for_the_first() -> None:
    """torchrun ends every process as soon as one has ended, so that who has the message must end first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    time.sleep(GRACE_S)
