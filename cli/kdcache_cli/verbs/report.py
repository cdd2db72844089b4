"""`kdcache report`: runs side by side as a page to read."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdcache.settings.shared import JudgeSettings, MachineSettings
from kdcache_cli.console import OUT, bytes_text, progress_bar
from kdcache_cli.settings import shared_flags
from kdcache_cli.verbs.compare import (
    Baseline,
    BatchSize,
    Fresh,
    Ignore,
    OptionalData,
    OptionalSplit,
    OwnFold,
    Repeats,
    Runs,
    Smoke,
    Teacher,
    Weights,
    judging,
)

_Option = typer.Option


def report(
    runs: Runs,
    out: Annotated[Path, _Option("--out", help="The page, an .html file; one that is there is replaced.")] = Path(
        "report.html"
    ),
    data: OptionalData = None,
    split: OptionalSplit = None,
    teacher: Teacher = None,
    baseline: Baseline = None,
    ignore: Ignore = None,
    own_fold: OwnFold = False,
    title: Annotated[str | None, _Option("--title", help="Title of the page (default: of the data's name).")] = None,
    num: Annotated[int, _Option("--num", min=0, help="Best and worst images; 0 shows none.")] = 3,
    audit: Annotated[
        Path | None,
        _Option("--audit", metavar="FILE", help="report.json of inspect --teacher-report: the teacher's audit."),
    ] = None,
    pictures: Annotated[
        Path | None, _Option("--pictures", metavar="DIR", help="Folder of visualise, which the page mentions.")
    ] = None,
    weights: Weights = JudgeSettings.weights,
    size: shared_flags.Size = None,
    batch_size: BatchSize = JudgeSettings.batch_size,
    repeats: Repeats = JudgeSettings.repeats,
    threads: shared_flags.Threads = MachineSettings.threads,
    device: shared_flags.Device = MachineSettings.device,
    fresh: Fresh = False,
    smoke: Smoke = False,
) -> None:
    """One HTML page of a comparison: did it help, scores, curves, pictures, recipes.

    The page is one file that opens without network or server. Rows and baseline
    are those of [bold]kdcache compare[/]; evaluations are kept and used again.

    [dim]kdcache report runs/ --teacher teacher --out report.html[/]
    """
    from kdcache.analysis.compare import CompareOptions
    from kdcache.analysis.report import ReportOptions, make_report
    from kdcache.analysis.report.summary import headline

    judged = judging(weights, size, batch_size, device, threads, fresh)
    compared = CompareOptions(judged, teacher, baseline, tuple(ignore or ()), own_fold, repeats, smoke)
    options = ReportOptions(compared, title, num, audit, pictures, _command())
    with progress_bar() as bar:
        task = bar.add_task("comparing", total=None, note="")
        comparison = make_report(
            runs,
            data,
            split,
            out,
            options,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    answer, sentence, _ = headline(comparison)
    if comparison.banner is not None:
        OUT.print(comparison.banner, style="yellow", markup=False, highlight=False)
    OUT.print(f"{answer} {sentence}", markup=False, highlight=False)
    OUT.print(f"{out}: {bytes_text(out.stat().st_size)}", markup=False, highlight=False)


def _command() -> str | None:
    """The command as typed; None where another program calls the verb."""
    return shlex.join(["kdcache", *sys.argv[1:]]) if sys.argv[1:2] == ["report"] else None
