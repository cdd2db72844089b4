"""Where output goes: results to stdout, progress and errors to stderr."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.table import Column, Table

from kdcache.errors import one_line, plain_text
from kdcache.progress import use_console

_WIDEST = 1000
"""The most columns of a table in a file."""


class Terminal(Console):
    """A console that prints names, paths and errors as plain text, without control characters.

    Strings may have rich's markup, such as [bold]. In tables, panels and bars, markup is printed as it is.

    Args:
        options: arguments of rich's `Console` other than `markup` and `emoji`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def print(self, *objects: Any, markup: bool | None = None, soft_wrap: bool | None = None, **options: Any) -> None:
        """Print objects as rich does.

        Args:
            objects: strings, tables or other objects that rich can print.
            markup: whether rich's markup is interpreted. None interprets it if all objects are strings.
            soft_wrap: True does not wrap lines. None does not wrap strings that go to a file.
            options: the other arguments of rich's `Console.print`.
        """
        lines = all(isinstance(part, str) for part in objects)
        unwrapped = lines and not self.is_terminal if soft_wrap is None else soft_wrap
        with self._room_for(objects):
            super().print(*objects, markup=lines if markup is None else markup, soft_wrap=unwrapped, **options)

    @contextmanager
    def _room_for(self, objects: Sequence[Any]) -> Iterator[None]:
        """Widen output to a file, in a with block, so that tables keep all their numbers."""
        width, tables = self._width, [part for part in objects if isinstance(part, Table)]
        if tables and not self.is_terminal:
            unbounded = self.options.update(width=_WIDEST)
            self.width = max(self.width, *(self.measure(table, options=unbounded).maximum for table in tables))
        try:
            yield
        finally:
            self._width = width

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Let `print` work in a with block, even if --quiet is given."""
        quiet, self.quiet = self.quiet, False
        try:
            yield
        finally:
            self.quiet = quiet

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of rich's `Console.render`, with the same arguments, but without control characters.

        A table that is too wide for the terminal is printed as lines of names and values.
        """
        if isinstance(renderable, Table):
            for column in renderable.columns:  # a name makes no row of its own
                column._cells = [one_line(cell) if isinstance(cell, str) else cell for cell in column._cells]
                if isinstance(column.header, str):
                    column.header = one_line(column.header)
            if self.is_terminal and _cuts(self, renderable, options):
                renderable = _upright(renderable)
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain_text(text), style, control)


def _cuts(terminal: Console, table: Table, options: ConsoleOptions | None) -> bool:
    """Return True if a table is so wide that the terminal cuts off numbers or words."""
    printed = "".join(segment.text for segment in Console.render(terminal, table, options))
    written = f"{table.title}" + "".join(
        str(part) for column in table.columns for part in (column.header, *column.cells)
    )
    return printed.count("…") > written.count("…")


def _upright(table: Table) -> Table:
    """Return a table as lines of names and values: all cells of a row below each other, then an empty line."""
    headers = [column.header for column in table.columns]
    turned = Table(box=None, show_header=False, title=table.title, title_style=table.title_style)
    turned.title_justify = table.title_justify
    turned.add_column(style="dim")
    turned.add_column(overflow="fold")
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for header, cell in zip(headers, row, strict=True):
            turned.add_row(header, cell)
        turned.add_row()
    return turned


OUT = Terminal()
ERRORS = Terminal(stderr=True)


def figure_table(*header: str, title: str | None = None) -> Table:
    """Return an empty table without borders, with the headings `header`.

    Its first column is for names, and the others are for numbers. `title` is printed above it, and None prints none.
    """
    columns = [Column(name, justify="right" if place else "left") for place, name in enumerate(header)]
    above = None if title is None else f"\n{title}"
    return Table(*columns, title=above, title_style="bold", title_justify="left", box=None, header_style="dim")


def histogram_table(header: str, bins: Sequence[tuple[str, int]]) -> Table:
    """Return a table with a line for each bin of a histogram of pixels: its name, its share in per cent, and a bar.

    Args:
        header: the heading of the first column.
        bins: the name of each bin, and its number of pixels. Empty bins are left out.
    """
    table = Table(header, "pixels %", "", box=None, header_style="dim")
    total, most = sum(count for _, count in bins), max(count for _, count in bins)
    for words, count in bins:
        if count:
            table.add_row(words, f"{100 * count / total:.2f}", "#" * max(round(30 * count / most), 1))
    return table


def warn(text: str) -> None:
    """Print `warning: TEXT` on stderr, also with --quiet."""
    with ERRORS.heard():
        ERRORS.print(f"warning: {text}", style="yellow", markup=False, highlight=False)


use_console(ERRORS, warn)


@contextmanager
def data_warnings() -> Iterator[None]:
    """Print each `DataWarning` as `warning: TEXT` on stderr, in a with block. Other warnings do not change."""
    with warnings.catch_warnings():
        default = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            if category.__name__ == "DataWarning":  # of a room that is imported late
                warn(str(message))
            else:
                default(message, category, *rest, **named)

        warnings.showwarning = show
        yield


def bytes_text(count: float) -> str:
    """Return a number of bytes as text, for instance 1.4 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
