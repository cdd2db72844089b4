"""`kdcache report`: runs side by side as a page to read."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from kdcache.errors import RecipeError
from kdcache_cli.console import OUT, bytes_text, progress_of_steps
from kdcache_cli.help import common
from kdcache_cli.settings import compare_flags
from kdcache_cli.settings.signature import takes

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.analysis.visualise import Drawing

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
        _Option("--format", metavar="png,svg,pdf", help="Formats of --draw beside PNG, whose text stays text."),
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
    """One HTML page of a comparison: did it help, scores, curves, pictures, recipes.

    The page is one file that opens without network or server. Rows and baseline
    are those of [bold]kdcache compare[/]; evaluations are kept and used again.

    --draw writes a folder for the first run of each row: its best and worst images
    with the teacher and a named --baseline beside it, a contact sheet, how scores
    are spread, the confusion matrix and the curves. Several rows are also drawn side
    by side.

    [dim]kdcache report runs/ --teacher teacher --out report.html[/]
    [dim]kdcache report runs/ --teacher teacher --baseline none --draw paper --layout row --format pdf[/]
    """
    from kdcache.analysis.report import ReportOptions, make_report
    from kdcache.analysis.report.build import SAMPLES
    from kdcache.analysis.report.summary import headline

    options = ReportOptions(
        compare_flags.compare_options(settings),
        title,
        SAMPLES if num is None else num,
        tuple(audit or ()),
        _drawing(draw, num, layout, formats),
        figure,
        _command(),
    )
    with progress_of_steps("comparing") as shown:
        comparison = make_report(runs, settings["data"], settings["split"], out, options, shown)
    answer, sentence, _ = headline(comparison)
    if comparison.banner is not None:
        OUT.print(comparison.banner, style="yellow", markup=False, highlight=False)
    OUT.print(f"{answer} {sentence}", markup=False, highlight=False)
    OUT.print(f"{out}: {bytes_text(out.stat().st_size)}", markup=False, highlight=False)
    if draw is not None:
        OUT.print(f"{draw}: {sum(1 for _ in draw.rglob('*.png'))} pictures", markup=False, highlight=False)


def _drawing(draw: Path | None, num: int | None, layout: str | None, formats: str | None) -> "Drawing | None":
    """Return the folder of pictures. Raises: RecipeError for settings of pictures without one, and for wrong ones."""
    from kdcache.analysis.visualise import Drawing
    from kdcache.metrics.figures import Layout, check_formats

    given = {"--layout": layout, "--format": formats}
    if draw is None and (unused := [flag for flag, value in given.items() if value is not None]):
        raise RecipeError(
            f"Cannot use {' and '.join(unused)} without --draw",
            received="no folder of pictures",
            remedy="Add --draw DIR, or leave these out.",
        )
    if layout not in (None, *get_args(Layout)):
        raise RecipeError(f"Unknown --layout {layout}", received="grid or row", remedy="Use row.")
    if draw is None:
        return None
    names = [name.strip() for name in (formats or "png").split(",")]
    return Drawing(
        draw, Drawing.num if num is None else num, cast("Layout", layout or Drawing.layout), check_formats(names)
    )


def _command() -> str | None:
    """The command as typed; None where another program calls the verb."""
    return shlex.join(["kdcache", *sys.argv[1:]]) if sys.argv[1:2] == ["report"] else None
