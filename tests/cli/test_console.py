"""Names from elsewhere are plain text on a terminal: no markup, no emoji, nothing that commands it."""

from __future__ import annotations

import io

import pytest
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kdcache.errors import DataError
from kdcache_cli import console
from kdcache_cli.app import _show
from kdcache_cli.console import _Terminal, progress_bar

NAMES = ["a[/]b", "[red]x", "[/bold]", "[link=http://x]y[/link]", "$x$", ":smile:", "\\", "[", "]"]
COMMANDS = ["\x1b]0;title\x07", "\x1b[2J", "\x9b2J", "\x7f", "\u202egnp.exe", "\r", "\x08", "\x00", "\u2066x"]


class Screen(_Terminal):
    def __init__(self) -> None:
        self.written = io.StringIO()
        super().__init__(file=self.written, width=300)

    def clear_text(self) -> None:
        self.written.seek(0)
        self.written.truncate()

    @property
    def text(self) -> str:
        return self.written.getvalue()


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
    monkeypatch.setattr(console, "ERRORS", screen)
    monkeypatch.setattr("kdcache_cli.app.ERRORS", screen)
    with progress_bar() as bar:
        bar.add_task(f"reading {name}", total=2, note=name)
    assert "\x1b]0" not in screen.text
    if name in NAMES:
        assert f"reading {name}" in screen.text
    screen.clear_text()
    error = DataError(f"rule {name}", received=name, remedy=name)
    assert not {"\x1b", "\x9b", "\u202e"} & set(str(error))
    _show(error.rule, error.received, error.remedy)
    assert "\x1b]0" not in screen.text
    if name in NAMES:
        assert f"rule {name}" in screen.text
