"""`kdcache compare`: runs side by side."""

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from kdcache_cli.console import ERRORS, OUT, figure_table
from kdcache_cli.help import common
from kdcache_cli.settings import compare_flags
from kdcache_cli.settings.signature import takes

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.analysis.comparison import Comparison

_Option = typer.Option
_WIDEST = 7
"""Rows beside each other in the table of classes: a terminal is higher than it is wide."""


@common(*compare_flags.COMMON, "markdown", "csv", "json_file", "text")
@takes(
    *compare_flags.TABLES,
    order=("runs", *compare_flags.ROWS, *compare_flags.JUDGING, "markdown", "csv", "json_file", "text"),
)
def compare(
    settings: dict[str, Any],
    runs: compare_flags.Runs,
    markdown: Annotated[Path | None, _Option("--markdown", help="Write the tables as Markdown.")] = None,
    csv: Annotated[Path | None, _Option("--csv", help="Write a line per row, plain numbers.")] = None,
    json_file: Annotated[Path | None, _Option("--json", help="Write the whole comparison.")] = None,
    text: Annotated[
        Path | None, _Option("--text", help="Write the small table: mIoU, parameters, milliseconds.")
    ] = None,
) -> None:
    """Compare runs: IoU per class, difference from the baseline and how certain it is, cost.

    Runs that differ only in seed and fold make one row, with mean and standard
    deviation. The run folders keep the evaluations. kdcache uses them again while
    weights and data are the same.

    [dim]kdcache compare runs/ --teacher teacher --markdown comparison.md[/]
    """
    from kdcache.analysis import tables
    from kdcache.verbs import compare as compare_runs

    comparison = compare_runs(runs, **settings)
    _show(comparison)
    contents = (
        (markdown, tables.to_markdown),
        (csv, tables.to_csv),
        (text, tables.to_text),
        (json_file, _to_json),
    )
    for path, content in contents:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content(comparison), encoding="utf-8")
            ERRORS.print(f"written: {path}", markup=False)


def _to_json(comparison: "Comparison") -> str:
    return json_module.dumps(comparison.to_json(), indent=1) + "\n"


def _show(comparison: "Comparison") -> None:
    from kdcache.analysis.report.summary import headline
    from kdcache.analysis.tables import (
        class_table,
        cost_table,
        difference_table,
        legend,
        score_table,
    )
    from kdcache.analysis.task_views import VIEWS
    from kdcache.tasks import SEGMENTATION

    if comparison.banner is not None:
        OUT.print(f"[yellow]{escape(comparison.banner)}[/]", highlight=False)
    answer, sentence, _ = headline(comparison)
    OUT.print(f"[bold]{answer}[/] {escape(sentence)}\n", highlight=False)
    _print("Scores and what is noise", comparison, *score_table(comparison))
    for task, view in VIEWS.items():
        header, rows = difference_table(comparison, task)
        if rows:
            _print_rows(view.title, header, rows)
    header, rows = class_table(comparison)
    (_, *names), *columns = zip(header, *rows, strict=True)
    for first in range(0, len(names) if SEGMENTATION in comparison.tasks else 0, _WIDEST):
        part = slice(first, first + _WIDEST)
        table = figure_table("IoU %", *names[part])
        for class_name, *cells in columns[: len(comparison.class_names)]:
            table.add_row(class_name, *map(_cell, cells[part]))
        OUT.print()
        OUT.print(table)
    _print("Cost of one image", comparison, *cost_table(comparison))
    OUT.print()
    for line in legend(comparison):
        OUT.print(f"[dim]- {escape(line)}[/]", highlight=False)


def _print(title: str, comparison: "Comparison", header: list[str], rows: list[list[str]]) -> None:
    teachers = [place for place, row in enumerate(comparison.rows) if row.teacher]
    _print_rows(title, header, rows, teachers)


def _print_rows(title: str, header: list[str], rows: list[list[str]], apart: Sequence[int] = ()) -> None:
    table = figure_table(*header, title=title)
    for place, cells in enumerate(rows):
        if place in apart:
            table.add_section()
        table.add_row(cells[0], *map(_cell, cells[1:]))
    OUT.print(table)


def _cell(text: str) -> Text | str:
    """Return a table's text in bold if it is marked as the best one, else unchanged."""
    from kdcache.analysis.tables import BOLD

    begin, end = BOLD
    marked = text.startswith(begin) and text.endswith(end)
    return Text(text.removeprefix(begin).removesuffix(end), "bold") if marked else text
