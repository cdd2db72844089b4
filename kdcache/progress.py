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
"""Seconds from one line of progress to the next, if the output cannot show a bar."""


def note_line(text: str) -> str:
    """Return `note: TEXT` as a line of output. A text that begins with `warning: ` stays unchanged."""
    return text if text.startswith("warning: ") else f"note: {text}"


class _Left(ProgressColumn):
    """The time left. Rich's own estimate needs two updates. Until then, the average speed counts."""

    def render(self, task: Task) -> Text:
        left = seconds_left(task)
        return Text("-:--:--" if left is None else str(timedelta(seconds=round(left))), style="progress.remaining")


class _Note(ProgressColumn):
    """The task's note, shortened to the room that the bar, its counts and its times leave."""

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
    """Return the estimated seconds until a progress bar's task ends, or None before an update or without a total."""
    if task.time_remaining is not None:
        return task.time_remaining
    done, remaining = task.completed - task.fields.get("begun", 0), task.remaining
    return None if not done > 0 or remaining is None or task.elapsed is None else task.elapsed / done * remaining


class Bar(Progress):
    """A progress bar with task, counts and time left, on a terminal or in a notebook with ipywidgets.

    In a file, a pipe or another notebook, it prints a line every 30 seconds instead. A quiet console shows nothing.
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
        """Add a task and return its id.

        Args:
            description: the text in front of the bar.
            total: the number of steps. None if it is not known yet.
            completed: steps that were done before, by an earlier process. They do not count towards the speed.
            fields: `note`, the text after the bar.
        """
        return super().add_task(description, total=total, completed=completed, begun=completed, **fields)

    def start(self) -> None:
        """Show the bar. Where a bar cannot be shown, such as in a file, start the thread that prints lines."""
        super().start()
        if self.disable and not self.console.quiet:
            self._lines.start()

    def stop(self) -> None:
        """Stop the bar and the thread that prints lines."""
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
    """The console for progress, notes and warnings: stderr, or the console that the command line sets."""

    console: Console | None = None
    warn: Callable[[str], None] | None = None


def use_console(console: Console, warn: Callable[[str], None]) -> None:
    """Print progress, notes and warnings of kdcache's functions on a given console, as the command line does.

    Args:
        console: the console for progress and notes.
        warn: prints a warning. It gets the text without `warning: `.
    """
    _Voice.console, _Voice.warn = console, warn


def progress_bar(shown: bool = True) -> Bar:
    """Return a progress bar on stderr, or in a notebook's output. If `shown` is False, it shows nothing."""
    return Bar(_console(shown))


@contextmanager
def progress_of_steps(first: str, shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Show one progress bar in a with block. Yield a function (text, done, total) that sets its text and its progress.

    `first` is the text before the first call. If `shown` is False, nothing is shown.
    """
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
    """Show a progress bar for each stage of the work, in a with block. Finished bars stay.

    Yield a function (stage, done, total). Its first call with a new stage adds that stage's bar. If `shown` is False,
    nothing is shown.
    """
    tasks: dict[str, TaskID] = {}
    with progress_bar(shown) as bar:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, note="")
            bar.update(tasks[stage], completed=done)

        yield update


def progress_of(bar: Progress, what: str, note: str = "") -> Callable[[int, int], None]:
    """Add a task to a progress bar. Return a function (done, total) that updates the task.

    Args:
        bar: the progress bar.
        what: the text in front of the task's bar.
        note: the text after the task's bar.
    """
    task = bar.add_task(what, total=None, note=note)
    return lambda done, total: bar.update(task, completed=done, total=total)


def say(text: str, shown: bool = True) -> None:
    """Print a note, or a warning if the text begins with `warning: `. If `shown` is False, print warnings only.

    The output goes to stderr, or where `use_console` sends it.
    """
    if text.startswith("warning: "):
        warn(text.removeprefix("warning: "))
    elif shown:
        _console(shown).print(note_line(text), markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print `warning: TEXT` on stderr, or call the function that `use_console` set."""
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
    """Return True if the console can show a bar: a terminal, or a notebook with ipywidgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal
