"""`kdcache report`: runs side by side as a page to read."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcache_cli.console import OUT, bytes_text, progress_of_steps
from kdcache_cli.settings import compare_flags
from kdcache_cli.settings.signature import takes

_Option = typer.Option


@takes(
    *compare_flags.TABLES,
    order=("runs", "out", *compare_flags.ROWS, "title", "num", "audit", "pictures", *compare_flags.JUDGING),
)
def report(
    settings: dict[str, Any],
    runs: compare_flags.Runs,
    out: Annotated[Path, _Option("--out", help="The page, an .html file; one that is there is replaced.")] = Path(
        "report.html"
    ),
    title: Annotated[str | None, _Option("--title", help="Title of the page (default: of the data's name).")] = None,
    num: Annotated[int, _Option("--num", min=0, help="Best and worst images; 0 shows none.")] = 3,
    audit: Annotated[
        list[Path] | None,
        _Option(
            "--audit",
            metavar="FILE",
            help="report.json of inspect --teacher-report: the teacher's audit. Repeat it to compare several stores.",
        ),
    ] = None,
    pictures: Annotated[
        Path | None, _Option("--pictures", metavar="DIR", help="Folder of visualise, which the page mentions.")
    ] = None,
) -> None:
    """One HTML page of a comparison: did it help, scores, curves, pictures, recipes.

    The page is one file that opens without network or server. Rows and baseline
    are those of [bold]kdcache compare[/]; evaluations are kept and used again.

    [dim]kdcache report runs/ --teacher teacher --out report.html[/]
    """
    from kdcache.analysis.report import ReportOptions, make_report
    from kdcache.analysis.report.summary import headline

    options = ReportOptions(
        compare_flags.compare_options(settings), title, num, tuple(audit or ()), pictures, _command()
    )
    with progress_of_steps("comparing") as shown:
        comparison = make_report(runs, settings["data"], settings["split"], out, options, shown)
    answer, sentence, _ = headline(comparison)
    if comparison.banner is not None:
        OUT.print(comparison.banner, style="yellow", markup=False, highlight=False)
    OUT.print(f"{answer} {sentence}", markup=False, highlight=False)
    OUT.print(f"{out}: {bytes_text(out.stat().st_size)}", markup=False, highlight=False)


def _command() -> str | None:
    """The command as typed; None where another program calls the verb."""
    return shlex.join(["kdcache", *sys.argv[1:]]) if sys.argv[1:2] == ["report"] else None
