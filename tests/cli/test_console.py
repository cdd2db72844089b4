"""Names from elsewhere are plain text on a terminal: no markup, no emoji, nothing that commands it."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kdcache.errors import DataError
from kdcache.progress import progress_bar, progress_of_steps, seconds_left, use_console
from kdcache_cli.app import show_error
from kdcache_cli.console import ERRORS, Terminal, figure_table, warn

NAMES = ["a[/]b", "[red]x", "[/bold]", "[link=http://x]y[/link]", "$x$", ":smile:", "\\", "[", "]"]
COMMANDS = ["\x1b]0;title\x07", "\x1b[2J", "\x9b2J", "\x7f", "\u202egnp.exe", "\r", "\x08", "\x00", "\u2066x"]


class Screen(Terminal):
    def __init__(self) -> None:
        self.written = io.StringIO()
        super().__init__(file=self.written, width=300)

    def clear_text(self) -> None:
        self.written.seek(0)
        self.written.truncate()

    @property
    def text(self) -> str:
        return self.written.getvalue()


@pytest.fixture(autouse=True)
def own_console():
    yield
    use_console(ERRORS, warn)


def shown(screen: Screen, name: str) -> list[str]:
    """What each way to print shows of a name."""
    table = Table(name, title=name)
    table.add_row(name)
    printed = []
    for thing in (table, Panel(name, title=Text(name)), Text(name), f"[bold]{escape(name)}[/]: done"):
        screen.clear_text()
        screen.print(thing)
        printed.append(screen.text)
    screen.clear_text()
    screen.print(name, markup=False)
    return [*printed, screen.text]


@pytest.mark.parametrize("name", NAMES)
def test_markup_in_a_name_is_text(name) -> None:
    for printed in shown(Screen(), name):
        assert name in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_commands_the_terminal(name) -> None:
    for printed in shown(Screen(), f"a{name}b"):
        assert not set("\x00\x07\x08\r\x1b\x7f\x9b\u202e\u2066") & set(printed)
        assert printed.count("a") >= 1


def test_our_own_lines_keep_their_markup() -> None:
    screen = Screen()
    screen.print("[bold]done[/]")
    assert screen.text == "done\n"


@pytest.mark.parametrize("name", [*NAMES, *COMMANDS])
def test_bars_and_panels_take_any_name(monkeypatch, name) -> None:
    screen = Screen()
    screen._force_terminal = True
    use_console(screen, warn)
    monkeypatch.setattr("kdcache_cli.app.ERRORS", screen)
    with progress_bar() as bar:
        bar.add_task(f"reading {name}", total=2, note=name)
    assert "\x1b]0" not in screen.text
    if name in NAMES:
        assert f"reading {name}" in screen.text
    screen.clear_text()
    error = DataError(f"rule {name}", fix=name, rule=name)
    assert not {"\x1b", "\x9b", "\u202e"} & set(str(error))
    show_error(error)
    assert "\x1b]0" not in screen.text
    if name in NAMES:
        assert f"rule {name}" in screen.text


def piped(monkeypatch: pytest.MonkeyPatch) -> Screen:
    screen = Screen()
    use_console(screen, warn)
    monkeypatch.setattr("kdcache.progress.LINE_EVERY_S", 0.01)
    return screen


def wait_for_text(screen: Screen) -> None:
    until = time.monotonic() + 20
    while not screen.text and time.monotonic() < until:
        time.sleep(0.005)


def test_a_pipe_gets_lines_with_rate_and_time_left(monkeypatch) -> None:
    screen = piped(monkeypatch)
    with progress_bar() as bar:
        task = bar.add_task("teacher's pass", total=40, completed=10, note="")
        bar.update(task, completed=20)
        wait_for_text(screen)
    assert re.match(r"teacher's pass: 20/40, [0-9.e+]+/s, 0:00:0\d so far, 0:00:0\d left\n", screen.text)


@pytest.mark.parametrize("width", [60, 120])
def test_a_narrow_terminal_keeps_counts_and_times(width: int) -> None:
    screen = Screen()
    screen.width, screen._force_terminal = width, True
    use_console(screen, warn)
    with progress_bar() as bar:
        task = bar.add_task("train-student", total=60000, completed=10000, note="")
        bar.update(task, completed=30000, note="mIoU 45.10 loss 1.790 ce 1.462 dist 0.328 3.2 img/s, 42 % waiting")
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.text).splitlines() if line.strip()]
    assert re.match(r"train-student .*30000/60000 0:00:0\d left 0:0\d:\d\d", lines[-1])
    assert len(lines[-1].rstrip()) <= width
    assert ("mIoU 45.10 loss 1.790 ce" in lines[-1]) == (width == 120)


def test_quiet_has_no_lines(monkeypatch) -> None:
    screen = piped(monkeypatch)
    screen.quiet = True
    with progress_bar() as bar:
        bar.add_task("teacher's pass", total=40, note="")
        time.sleep(0.05)
    with screen.heard():
        screen.print("an error")
    assert screen.text == "an error\n"


def test_time_left_counts_what_this_process_did() -> None:
    """A resumed training has not done its first steps in no time."""
    with progress_bar() as bar:
        bar.add_task("training", total=100, completed=80)
        (task,) = bar.tasks
        assert seconds_left(task) is None
        task.start_time, task.get_time = 0.0, lambda: 30.0
        task.completed = 90
        assert seconds_left(task) == 30


def test_a_line_in_a_pipe_is_not_broken() -> None:
    screen = Screen()
    screen.width = 40
    screen.print("word " * 20)
    assert screen.text.count("\n") == 1


def test_tables_keep_their_numbers_and_in_a_file_their_rows() -> None:
    table = Table(*(f"column {number}" for number in range(20)), box=None)
    table.add_row(*(f"{number}.125" for number in range(20)))
    for terminal in (False, True):
        written = io.StringIO()
        screen = Terminal(file=written, width=80, force_terminal=terminal)
        screen.print(table)
        assert "19.125" in written.getvalue()
        assert (written.getvalue().count("\n") == 2) is not terminal
        assert screen.width == 80


@pytest.mark.parametrize("width", [30, 80])
def test_a_table_that_a_terminal_has_no_room_for_is_turned_over(width) -> None:
    table = figure_table("row", "points of mIoU", "verdict", title="Scores…")
    table.add_row("kdcache:tiny", "-3.30", "inconclusive")
    table.add_row("kdcache:base", "12.44", "inconclusive")
    screen = Screen()
    screen._force_terminal, screen.width = True, width
    screen.print(table)
    lines = [line.strip() for line in Text.from_ansi(screen.text).plain.splitlines() if line.strip()]
    assert lines[0] == "Scores…"
    assert all(number in screen.text for number in ("-3.30", "12.44"))
    assert screen.text.count("inconclusive") == 2
    assert ([line.split()[0] for line in lines[1:]] == ["row", "points", "verdict"] * 2) == (width == 30)


def test_a_bar_is_whole_when_it_ends_and_gone_where_there_was_nothing_to_do() -> None:
    screen = Screen()
    screen._force_terminal = True
    use_console(screen, warn)
    for total, left in ((None, ""), (1, "1/1")):
        screen.clear_text()
        with progress_of_steps("comparing") as update:
            if total:
                update("comparing", 0, total)
        last = Text.from_ansi(screen.text).plain.rstrip().splitlines()[-1:]
        assert (left in "".join(last)) if total else not any("0/?" in line for line in last)
