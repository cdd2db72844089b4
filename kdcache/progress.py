"""Progress of work, as a bar or as lines, for the command line and for functions. Free of torch.

with progress_bar() as bar:
    task = bar.add_task("evaluating", total=100, note="")
    bar.update(task, completed=7)
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from kdcache.errors import plain_text

_REST, _LEAST_NOTE = 47, 8
"""Columns of a bar of ten, counts and times; columns below which a note is left out."""
LINE_EVERY_S = 30
"""How often a line tells how far the work is where no bar can."""


def note_line(text: str) -> str:
    """Return a note as a line of output. A note that begins with `warning: ` stays a warning."""
    return text if text.startswith("warning: ") else f"note: {text}"


class _Left(ProgressColumn):
    """The time left. Rich's own estimate needs two updates, and until then the average speed counts."""

    def render(self, task: Task) -> Text:
        left = seconds_left(task)
        return Text("-:--:--" if left is None else str(timedelta(seconds=round(left))), style="progress.remaining")


class _Note(ProgressColumn):
    """The task's note, as much as a narrow terminal has room for: the bar, its counts and its times come first."""

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        room = self._console.width - len(task.description) - _REST
        text = Text(plain_text(task.fields.get("note", "")))
        if room < _LEAST_NOTE:
            return Text()
        text.truncate(room, overflow="ellipsis")
        return text


def seconds_left(task: Task) -> float | None:
    """Return the seconds until a task is complete, or None before its first update or without a total."""
    if task.time_remaining is not None:
        return task.time_remaining
    done, remaining = task.completed - task.fields.get("begun", 0), task.remaining
    return None if not done > 0 or remaining is None or task.elapsed is None else task.elapsed / done * remaining


class Bar(Progress):
    """A bar with the task, its progress and the time left, on a terminal and in a notebook with ipywidgets.

    Elsewhere, in a file, a pipe or another notebook, it is a line every 30 seconds. A quiet console shows nothing.
    """

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            _Left(),
            _Note(console),
        )
        super().__init__(*columns, console=console, disable=console.quiet or not _shows_bars(console))
        self._ended = Event()
        self._lines = Thread(target=self._print_lines, name="progress", daemon=True)

    def add_task(  # type: ignore[override]
        self, description: str, *, total: float | None = None, completed: int = 0, **fields: Any
    ) -> TaskID:
        """Add a task, and remember what was completed before."""
        return super().add_task(description, total=total, completed=completed, begun=completed, **fields)

    def start(self) -> None:
        """Start the bar, or the thread that prints lines."""
        super().start()
        if self.disable and not self.console.quiet:
            self._lines.start()

    def stop(self) -> None:
        """Stop the bar and the thread."""
        self._ended.set()
        super().stop()

    def _print_lines(self) -> None:
        while not self._ended.wait(LINE_EVERY_S):
            for task in self.tasks:
                if not task.finished:
                    self.console.print(_line(task), markup=False, highlight=False, soft_wrap=True)


def _line(task: Task) -> str:
    """Return 'teacher's pass: 40/367, 2.1/s, 0:00:19 so far, 0:02:35 left', and the task's note."""
    so_far, left = task.elapsed or 0, seconds_left(task)
    parts = [f"{task.completed:.0f}" + ("" if task.total is None else f"/{task.total:.0f}")]
    if (done := task.completed - task.fields.get("begun", 0)) > 0:
        rate = task.speed or done / so_far
        parts.append(f"{rate:.3g}/s" if rate >= 0.1 else f"{1 / rate:.3g} s each")
    parts.append(f"{timedelta(seconds=round(so_far))} so far")
    if left is not None:
        parts.append(f"{timedelta(seconds=round(left))} left")
    if task.fields.get("note"):
        parts.append(task.fields["note"])
    return f"{task.description}: {', '.join(parts)}"


class _Voice:
    """Hold the console for progress, notes and warnings: stderr, or the one that the command line sets."""

    console: Console | None = None
    warn: Callable[[str], None] | None = None


def use_console(console: Console, warn: Callable[[str], None]) -> None:
    """Send the progress, notes and warnings of functions to a console, as the command line does."""
    _Voice.console, _Voice.warn = console, warn


def progress_bar(shown: bool = True) -> Bar:
    """Return a function's progress bar on stderr, or below the cell of a notebook. False shows nothing."""
    return Bar(_console(shown))


@contextmanager
def progress_of_steps(first: str, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar with a changing text. It yields a function to call with (what, done, total)."""
    with progress_bar(shown) as bar:
        task = bar.add_task(first, total=None, note="")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
        total = bar.tasks[0].total
        if total is None:  # there was nothing to do
            bar.remove_task(task)
        else:
            bar.update(task, completed=total)


@contextmanager
def progress_of_stages(shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage, which stays afterwards. It yields a function of (stage, done, total)."""
    tasks: dict[str, TaskID] = {}
    with progress_bar(shown) as bar:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, note="")
            bar.update(tasks[stage], completed=done)

        yield update


def progress_of(bar: Progress, what: str, note: str = "") -> Callable[[int, int], None]:
    """Add a task to a bar and return a function to call with (done, total)."""
    task = bar.add_task(what, total=None, note=note)
    return lambda done, total: bar.update(task, completed=done, total=total)


def say(text: str, shown: bool = True) -> None:
    """Print a note for the user, or a warning if it begins with `warning: `. Without `shown`, only warnings."""
    if text.startswith("warning: "):
        warn(text.removeprefix("warning: "))
    elif shown:
        _console(shown).print(note_line(text), markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning about a result of little value."""
    if _Voice.warn is not None:
        _Voice.warn(text)
    else:
        _console(True).print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)


def _console(shown: bool) -> Console:
    if shown and _Voice.console is not None:
        return _Voice.console
    console = Console(stderr=True, quiet=not shown, markup=False, emoji=False, highlight=False)
    console.soft_wrap = not (console.is_terminal or console.is_jupyter)  # a file has no width
    return console


def _shows_bars(console: Console) -> bool:
    """Return whether a bar can move: on a terminal, and in a notebook where ipywidgets is installed."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal
