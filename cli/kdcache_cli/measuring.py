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
"""The text for a number that was not measured."""
WRITE_EVERY_S = 2.0
"""The least seconds between two writes of the result file."""
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures, the machine and the commit.")]


def check_json(path: Path | None) -> None:
    """Check that the result file of --json can be written, before anything is measured.

    `path` is the file. None is without a file and passes. Raises: RecipeError if the file's folder does not exist.
    """
    if path is not None and not path.resolve().parent.is_dir():
        raise RecipeError(
            f"Cannot write --json {path}: no such folder",
            fix=f"Make the folder: {shlex.join(['mkdir', '-p', str(path.parent)])}",
        )


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Show the progress of a benchmark in a with block. Yield a function that prints the name of a new stage."""
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=None, note="")

        def note(text: str) -> None:
            ERRORS.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)
            bar.update(task, description=text)

        yield note


def contestants(*columns: str, title: str) -> Table:
    """Return an empty table of measurements, whose first column is for names.

    `columns` are the headings of the other columns. The title is not bold.
    """
    table = figure_table("", *columns)
    table.title, table.title_style = title, None
    return table


def line(text: str) -> None:
    """Print a line of text on stdout, without wrapping or markup."""
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)


def _header(theme: str) -> dict[str, Any]:
    from kdcache.bench.header import header
    from kdcache.training.run.metrics_log import environment

    words = sys.argv[1:] if sys.argv[1:2] == ["bench-kernels"] else ["bench-kernels"]
    return header(theme, shlex.join(["kdcache", *words]), environment())


class GrowingResult:
    """A result file (JSON) that is valid after each new row, so that an interrupted benchmark keeps its results.

    The rows are under the key `rows`. The key `complete` is true once all rows are there.

    Args:
        path: the file. None writes nothing.
        theme: what is measured, such as "kernels". The file has it under the key `theme`.
        of: the number of rows of a complete file.
    """

    def __init__(self, path: Path | None, theme: str, *, of: int) -> None:
        self._path, self._of = path, of
        self._rows: list[dict[str, Any]] = []
        self._content = {} if path is None else _header(theme)
        self._written = 0.0

    def write(self, **content: Any) -> None:
        """Add the keyword arguments to the top-level keys of the JSON file, and write the file."""
        self._content |= content
        if self._path is None:
            return
        from kdcache.training.run.metrics_log import write_json

        complete = len(self._rows) == self._of
        write_json(self._path, {**self._content, "complete": complete, "rows": self._rows})
        self._written = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row. The file is written only if the last write was more than 2 seconds ago.

        Call `write` after the last row.
        """
        self._rows.append(row)
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self.write()

    def end(self, **content: Any) -> None:
        """Add keys to the file's content, write the file, and print its path."""
        self.write(**content)
        if self._path is not None:
            ERRORS.print(f"wrote {self._path}", markup=False, highlight=False)

    @contextmanager
    def kept_when_interrupted(self) -> Iterator[None]:
        """Write the file on Ctrl-C in a with block, and exit with code 130."""
        try:
            yield
        except KeyboardInterrupt:
            self.end()
            ERRORS.print(f"\nInterrupted: {len(self._rows)} of {self._of} rows are measured.")
            raise typer.Exit(130) from None
