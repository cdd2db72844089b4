"""`kdcache compare`: runs side by side."""

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kdcache.settings import entries
from kdcache.settings.shared import JudgeSettings, MachineSettings
from kdcache_cli.console import ERRORS, OUT, progress_bar
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.signature import flag

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.analysis.comparison import Comparison
    from kdcache.analysis.stored_evaluations import Judging

_Option = typer.Option
Runs = Annotated[list[str], typer.Argument(help="Run folders, folders that hold runs, or SPEC@FILE.", metavar="RUN...")]
OptionalData = Annotated[
    str | None, _Option("--data", help="Data to judge on (default: what the runs' recipes validate on).")
]
OptionalSplit = Annotated[str | None, _Option("--split", help="Which split of it (default: theirs, or val).")]
Teacher = Annotated[str | None, _Option("--teacher", metavar="RUN", help="A run or SPEC@FILE, shown apart.")]
Weights = Annotated[str, flag(JudgeSettings, "weights")]
BatchSize = Annotated[int, flag(JudgeSettings, "batch_size")]
Baseline = Annotated[
    str | None,
    _Option(
        "--baseline",
        metavar="NAME",
        help="A row, or a run of it, to measure against (default: the same model with --method none).",
    ),
]
Ignore = Annotated[
    list[str] | None,
    _Option("--ignore", metavar="KEY", help="A setting, besides seed and fold, that does not separate rows."),
]
OwnFold = Annotated[
    bool, _Option("--own-fold", help="Judge each run on the fold of the split that its --fold left out.")
]
Repeats = Annotated[int, flag(JudgeSettings, "repeats")]
Fresh = Annotated[bool, _Option("--fresh", help="Evaluate again what was evaluated before.")]
Smoke = Annotated[
    bool, _Option("--smoke", help="Print above everything that the runs are no result, as of sweep --smoke.")
]
_WIDEST = 7
"""Rows beside each other in the table of classes: a terminal is higher than it is wide."""


def compare(
    runs: Runs,
    data: OptionalData = None,
    split: OptionalSplit = None,
    teacher: Teacher = None,
    baseline: Baseline = None,
    ignore: Ignore = None,
    own_fold: OwnFold = False,
    weights: Weights = JudgeSettings.weights,
    size: shared_flags.Size = None,
    batch_size: BatchSize = JudgeSettings.batch_size,
    repeats: Repeats = JudgeSettings.repeats,
    threads: shared_flags.Threads = MachineSettings.threads,
    device: shared_flags.Device = MachineSettings.device,
    fresh: Fresh = False,
    smoke: Smoke = False,
    markdown: Annotated[Path | None, _Option("--markdown", help="Write the tables as Markdown.")] = None,
    csv: Annotated[Path | None, _Option("--csv", help="Write a line per row, plain numbers.")] = None,
    json_file: Annotated[Path | None, _Option("--json", help="Write the whole comparison.")] = None,
    text: Annotated[
        Path | None, _Option("--text", help="Write the small table: mIoU, parameters, milliseconds.")
    ] = None,
) -> None:
    """Runs side by side: IoU per class, distance to the baseline and its noise, cost.

    Runs that differ only in seed and fold are one row, with mean and standard
    deviation. Evaluations are kept in the run folders and used again while
    weights and data are the same.

    [dim]kdcache compare runs/ --teacher teacher --markdown comparison.md[/]
    """
    from kdcache.analysis import tables
    from kdcache.analysis.compare import CompareOptions
    from kdcache.analysis.compare import compare as compare_runs

    judged = judging(weights, size, batch_size, device, threads, fresh)
    options = CompareOptions(judged, teacher, baseline, tuple(ignore or ()), own_fold, repeats, smoke)
    with progress_bar() as bar:
        task = bar.add_task("comparing", total=None, note="")
        comparison = compare_runs(
            runs,
            data,
            split,
            options,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
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


def judging(
    weights: str, size: str | None, batch_size: int, device: str, threads: int, fresh: bool = False
) -> "Judging":
    """How runs are evaluated, from the flags; sets torch's threads."""
    import torch

    from kdcache.analysis.stored_evaluations import Judging
    from kdcache.train import pick_device

    entries(JudgeSettings)["weights"].read(weights)
    if threads:
        torch.set_num_threads(threads)
    return Judging(weights, shared_flags.parse_size(size), batch_size, str(pick_device(device)), fresh)


def _to_json(comparison: "Comparison") -> str:
    return json_module.dumps(comparison.to_json(), indent=1) + "\n"


def _show(comparison: "Comparison") -> None:
    from kdcache.analysis.tables import class_table, cost_table, difference_table, legend, score_table

    if comparison.banner is not None:
        OUT.print(f"[yellow]{escape(comparison.banner)}[/]", highlight=False)
    _print("mIoU and what is noise", comparison, *score_table(comparison))
    header, rows = difference_table(comparison)
    if rows:
        _print_rows("Distance to the baseline, points of mIoU", header, rows)
    header, rows = class_table(comparison)
    (_, *names), *columns = zip(header, *rows, strict=True)
    for first in range(0, len(names), _WIDEST):
        shown = slice(first, first + _WIDEST)
        table = Table("IoU %", *names[shown], box=None, header_style="dim")
        _align(table)
        for class_name, *cells in columns[: len(comparison.class_names)]:
            table.add_row(class_name, *map(_cell, cells[shown]))
        OUT.print()
        OUT.print(table)
    _print("Cost of one image", comparison, *cost_table(comparison))
    OUT.print()
    for line in legend(comparison):
        OUT.print(f"[dim]{escape(line)}[/]", highlight=False)


def _print(title: str, comparison: "Comparison", header: list[str], rows: list[list[str]]) -> None:
    teachers = [place for place, row in enumerate(comparison.rows) if row.teacher]
    _print_rows(title, header, rows, teachers)


def _print_rows(title: str, header: list[str], rows: list[list[str]], apart: Sequence[int] = ()) -> None:
    table = Table(*header, title=f"\n{title}", title_style="bold", title_justify="left", box=None, header_style="dim")
    _align(table)
    for place, cells in enumerate(rows):
        if place in apart:
            table.add_section()
        table.add_row(cells[0], *map(_cell, cells[1:]))
    OUT.print(table)


def _cell(text: str) -> Text | str:
    """A figure that the table marks as the best, in bold: what tables hold has no markup."""
    from kdcache.analysis.tables import BOLD

    begin, end = BOLD
    marked = text.startswith(begin) and text.endswith(end)
    return Text(text.removeprefix(begin).removesuffix(end), "bold") if marked else text


def _align(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
