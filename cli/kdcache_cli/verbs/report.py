"""`kdcache report`: runs side by side as a page to read."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcache_cli.console import OUT, bytes_text
from kdcache_cli.help import common
from kdcache_cli.settings import compare_flags
from kdcache_cli.settings.signature import takes

_Option = typer.Option


@common(*compare_flags.COMMON, "out", "title", "num", "draw", "audit")
@takes(
    *compare_flags.TABLES,
    order=(
        "runs",
        "out",
        *compare_flags.ROWS,
        "title",
        "num",
        "draw",
        "layout",
        "formats",
        "audit",
        "figure",
        *compare_flags.JUDGING,
    ),
)
def report(
    settings: dict[str, Any],
    runs: compare_flags.Runs,
    out: Annotated[Path, _Option("--out", help="The page, an .html file; one that is there is replaced.")] = Path(
        "report.html"
    ),
    title: Annotated[str | None, _Option("--title", help="Title of the page (default: of the data's name).")] = None,
    num: Annotated[
        int | None,
        _Option("--num", min=0, help="Best and worst images (default: 3, with --draw 10 of each run)."),
    ] = None,
    draw: Annotated[
        Path | None, _Option("--draw", metavar="DIR", help="Also write pictures, curves and matrices as files here.")
    ] = None,
    layout: Annotated[
        str | None,
        _Option(
            "--layout",
            metavar="grid|row",
            help="Panels of --draw: grid with overlay and errors, or a row.",
        ),
    ] = None,
    formats: Annotated[
        str | None,
        _Option("--format", metavar="png,svg,pdf", help="Further formats of --draw. Their text stays text."),
    ] = None,
    audit: Annotated[
        list[Path] | None,
        _Option(
            "--audit",
            metavar="FILE",
            help="report.json of inspect --teacher-report. Repeat it to compare teachers.",
        ),
    ] = None,
    figure: Annotated[
        Path | None, _Option("--figure", metavar="FILE", help="A PNG to show, such as the curve of a sweep.")
    ] = None,
) -> None:
    """Write a comparison as one HTML page: did it help, scores, curves, pictures, recipes.

    The page is one file that opens without network or server. It has the rows and the
    baseline of [bold]kdcache compare[/], and uses the same kept evaluations.

    --draw writes a folder for the first run of each row. It has the best and worst images
    next to the teacher and a named --baseline, a contact sheet, a histogram of scores,
    the confusion matrix and the curves. Several rows are also drawn side by side.

    [dim]kdcache report runs/ --teacher teacher --out report.html[/]
    [dim]kdcache report runs/ --teacher teacher --baseline none --draw paper --layout row --format pdf[/]
    """
    from kdcache.analysis.report.summary import headline
    from kdcache.verbs import report as make_report

    comparison = make_report(
        runs,
        out,
        title=title,
        num=num,
        draw=draw,
        layout=layout,
        format=formats,
        audit=audit or (),
        figure=figure,
        command=_command(),
        **settings,
    )
    answer, sentence, _ = headline(comparison)
    if comparison.banner is not None:
        OUT.print(comparison.banner, style="yellow", markup=False, highlight=False)
    OUT.print(f"{answer} {sentence}", markup=False, highlight=False)
    OUT.print(f"{out}: {bytes_text(out.stat().st_size)}", markup=False, highlight=False)
    if draw is not None:
        OUT.print(f"{draw}: {sum(1 for _ in draw.rglob('*.png'))} pictures", markup=False, highlight=False)


def _command() -> str | None:
    """Return the command line that made the page, or None."""
    return shlex.join(["kdcache", *sys.argv[1:]]) if sys.argv[1:2] == ["report"] else None
