"""What `bench-kernels` is made of: stages, tables of figures, the result file."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kdcache.errors import RecipeError
from kdcache.progress import progress_bar
from kdcache_cli.console import ERRORS, OUT, figure_table

MISSING = "-"
"""The cell of a figure that was not measured."""
WRITE_EVERY_S = 2.0
"""Rows that come faster are written together: a thousand small ones take a while."""
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures, the machine and the commit.")]


def check_json(path: Path | None) -> None:
    """Refuse a result file that could not be written, before anything is measured. Raises: RecipeError."""
    if path is not None and not path.resolve().parent.is_dir():
        raise RecipeError(
            f"Cannot write --json {path}: no such folder",
            fix=f"Make the folder: {shlex.join(['mkdir', '-p', str(path.parent)])}",
        )


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Yield a function that prints a line for each stage of a benchmark, above a bar that names the latest."""
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=None, note="")

        def note(text: str) -> None:
            ERRORS.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)
            bar.update(task, description=text)

        yield note


def contestants(*columns: str, title: str) -> Table:
    """Return a table of figures with a name in front of each row, below a plain title."""
    table = figure_table("", *columns)
    table.title, table.title_style = title, None
    return table


def line(text: str) -> None:
    """Print a line as it is, however long."""
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)


def _header(theme: str) -> dict[str, Any]:
    from kdcache.bench.header import header
    from kdcache.training.run.metrics_log import environment

    words = sys.argv[1:] if sys.argv[1:2] == ["bench-kernels"] else ["bench-kernels"]
    return header(theme, shlex.join(["kdcache", *words]), environment())


class GrowingResult:
    """A result file that is whole JSON at any time: rows as they come, and `complete` at the end.

    Args:
        path: the file; None writes nothing.
        of: how many rows there will be.
    """

    def __init__(self, path: Path | None, theme: str, *, of: int) -> None:
        self._path, self._of = path, of
        self._rows: list[dict[str, Any]] = []
        self._content = {} if path is None else _header(theme)
        self._written = 0.0

    def write(self, **content: Any) -> None:
        """Write the file with further keys."""
        self._content |= content
        if self._path is None:
            return
        from kdcache.training.run.metrics_log import write_json

        complete = len(self._rows) == self._of
        write_json(self._path, {**self._content, "complete": complete, "rows": self._rows})
        self._written = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write the file unless it was written a moment ago."""
        self._rows.append(row)
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self.write()

    def end(self, **content: Any) -> None:
        """Write the file for the last time."""
        self.write(**content)
        if self._path is not None:
            ERRORS.print(f"wrote {self._path}", markup=False, highlight=False)

    @contextmanager
    def kept_when_interrupted(self) -> Iterator[None]:
        """Write what there is on Ctrl-C, and end with 130."""
        try:
            yield
        except KeyboardInterrupt:
            self.end()
            ERRORS.print(f"\nInterrupted: {len(self._rows)} of {self._of} rows are measured.")
            raise typer.Exit(130) from None
