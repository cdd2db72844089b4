"""What `bench-kernels` and `bench-loader` share: stages on the terminal, tables of figures, the result file."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kdcache.errors import RecipeError
from kdcache_cli.console import ERRORS, OUT, figure_table, progress_bar

MISSING = "-"
"""The cell of a figure that was not measured."""
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures, the machine and the commit.")]


def check_json(path: Path | None) -> None:
    """Refuse a result file that could not be written, before anything is measured. Raises: RecipeError."""
    if path is not None and not path.resolve().parent.is_dir():
        raise RecipeError("--json is a file in a folder that exists", received=str(path), remedy="make the folder")


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A function that prints a line for each stage of a benchmark, above a bar that names the latest."""
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=None, note="")

        def note(text: str) -> None:
            ERRORS.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)
            bar.update(task, description=text)

        yield note


def contestants(*columns: str, title: str) -> Table:
    """A table of figures with a name in front of each row, below a plain title."""
    table = figure_table("", *columns)
    table.title, table.title_style = title, None
    return table


def line(text: str) -> None:
    """Print a line as it is, however long."""
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)


def write_result(path: Path | None, verb: str, theme: str, content: Mapping[str, Any]) -> None:
    """Write the figures of a verb below their header; nothing without a path."""
    if path is None:
        return
    from kdcache.bench.header import header
    from kdcache.train.run.metrics_log import environment, write_json

    words = sys.argv[1:] if sys.argv[1:2] == [verb] else [verb]
    write_json(path, {**header(theme, shlex.join(["kdcache", *words]), environment()), **content})
    ERRORS.print(f"wrote {path}", markup=False, highlight=False)
