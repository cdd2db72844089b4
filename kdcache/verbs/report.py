"""`kdcache.report`: a comparison of runs as an HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

from annotated_types import Ge

from kdcache.analysis.comparison import Comparison
from kdcache.analysis.report import ReportOptions, make_report
from kdcache.analysis.report.build import SAMPLES
from kdcache.analysis.report.stores import CacheSize
from kdcache.analysis.visualise import Drawing
from kdcache.errors import KDCacheError, RecipeError, suggest
from kdcache.metrics.figures import Layout, check_formats
from kdcache.progress import progress_of_steps
from kdcache.run_folder import Run
from kdcache.store import inspect_store
from kdcache.verbs.compare import TABLES, options_of, places_of
from kdcache.verbs.keywords import Data, checked, keywords


@keywords(*TABLES)
def report(
    runs: str | Path | Run | Sequence[str | Path | Run],
    out: str | Path = "report.html",
    *,
    data: Data | None = None,
    split: str | None = None,
    teacher: str | Path | Run | None = None,
    title: str | None = None,
    num: Annotated[int, Ge(0)] | None = None,
    draw: str | Path | None = None,
    layout: str | None = None,
    format: str | None = None,
    audit: Sequence[str | Path] = (),
    figure: str | Path | None = None,
    command: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Compare runs and write the comparison as one HTML page, as `kdcache report` does. Return the comparison.

    >>> import kdcache
    >>> comparison = kdcache.report("runs/student", "report.html", num=0, repeats=0, progress=False)
    >>> comparison.images
    4

    Args:
        runs: run folders, folders with runs, RUN@best-ema, or SPEC@FILE.
        out: the .html file, which is replaced.
        data: the data set. Default: the validation data in the runs' recipes.
        split: name of its split. Default: the validation split in the runs' recipes.
        teacher: a run or SPEC@FILE, shown in its own row, outside the ranking. None shows no teacher.
        title: title of the page. Default: made from the data set's name.
        num: number of best images, and of worst images. Default: 3, or with `draw` 10 for each run.
        draw: folder for pictures, curves and confusion matrices as separate files. None writes none.
        layout: how panels are arranged in these files: "grid" (the default) or "row". It needs `draw`.
        format: comma-separated formats of these files, such as "png,pdf". PNG is always written. It needs `draw`.
        audit: paths of report.json files, written by `kdcache inspect --teacher-report`.
        figure: path of a PNG to show, such as the curve of a sweep. None shows none.
        command: the command that the page shows as its origin. None shows none.
        progress: show a progress bar, or lines without a terminal.
        settings: the other flags of `kdcache report`, with the same defaults. `help(kdcache.report)` lists them.
    Raises: KDCacheError, the base class of all errors of kdcache.
    """
    values = checked(report, settings, *TABLES) | {"teacher": None if teacher is None else str(teacher)}
    texts, place, split = places_of(runs, data, split)
    options = ReportOptions(
        options_of(values),
        title,
        SAMPLES if num is None else num,
        tuple(map(Path, audit)),
        _drawing(draw, num, layout, format),
        None if figure is None else Path(figure),
        command,
        size_of_cache,
    )
    with progress_of_steps("comparing", progress) as progress_steps:
        return make_report(texts, place, split, Path(out), options, progress_steps)


def size_of_cache(place: str) -> CacheSize | None:
    """Return the number of records and the bytes of a cache, or None if the cache cannot be read.

    `place` is its folder or address.
    """
    try:
        summary = inspect_store(place)
    except KDCacheError:
        return None
    return CacheSize(summary.records_written, summary.bytes_on_disk)


def _drawing(draw: str | Path | None, num: int | None, layout: str | None, formats: str | None) -> Drawing | None:
    """Return the settings of separate picture files, or None if `draw` is None.

    Raises: RecipeError for invalid settings.
    """
    given = {"--layout": layout, "--format": formats}
    if draw is None and (unused := [name for name, value in given.items() if value is not None]):
        raise RecipeError(
            f"Cannot use {' and '.join(unused)} without --draw",
            fix=f"Add --draw DIR, or leave {' and '.join(unused)} out.",
        )
    if layout not in (None, *get_args(Layout)):
        raise RecipeError(f"Unknown --layout {layout}", fix=suggest(str(layout), get_args(Layout), "Use grid or row."))
    if draw is None:
        return None
    names = [name.strip() for name in (formats or "png").split(",")]
    samples = Drawing.num if num is None else num
    return Drawing(Path(draw), samples, cast("Layout", layout or Drawing.layout), check_formats(names))
