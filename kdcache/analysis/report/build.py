"""Build the page from runs, for `kdcache report`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kdcache.analysis.compare import CompareOptions, Progress, compare, one_range
from kdcache.analysis.comparison import Comparison
from kdcache.analysis.gallery import Gallery, Shown
from kdcache.analysis.report.audit import read_audit
from kdcache.analysis.report.page import check_out, read_figure, write_report
from kdcache.analysis.report.samples import FirstRuns, Sample, choose_samples, score_first_runs
from kdcache.analysis.report.stores import SizeOfCache
from kdcache.analysis.runs import Entry, find_runs
from kdcache.analysis.visualise import Drawing, draw
from kdcache.data import open_split
from kdcache.metrics import ConfusionMatrix

SAMPLES = 3


@dataclass(frozen=True)
class ReportOptions:
    """What a report page contains, in addition to the comparison.

    Attributes:
        compare: how runs are compared.
        title: title of the page. None makes one from the data's name.
        samples: number of best and of worst images. 0 shows none.
        audits: files `report.json` of the teachers' audits (inspect --teacher-report), one for each cache.
        drawing: pictures to draw into a folder, which the page mentions. None draws none.
        figure: a PNG with its own section, such as the curve of a sweep, or None.
        command: the command that the user typed, or None.
        size_of_cache: function from a cache's path to its `CacheSize`, or to None if it cannot be read.
    """

    compare: CompareOptions = field(default_factory=CompareOptions)
    title: str | None = None
    samples: int = SAMPLES
    audits: tuple[Path, ...] = ()
    drawing: Drawing | None = None
    figure: Path | None = None
    command: str | None = None
    size_of_cache: SizeOfCache = lambda _: None


def make_report(
    runs: Sequence[str | Path],
    data: str | None,
    split: str | None,
    out: Path,
    options: ReportOptions | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare runs, draw their best and worst images, and write the report page. Return the comparison.

    Args:
        runs: run folders, folders that hold runs, or SPEC@FILE.
        data: the data set. None takes the validation data of the recipes.
        split: its split. None takes the validation split of the recipes.
        out: the .html file, which is replaced.
        options: what the page contains. None takes the defaults.
        progress: called with (what is done, units done, units in total).
    Raises: RecipeError for invalid files and runs. MismatchError for other classes or data.
    """
    options = options or ReportOptions()
    report = progress or (lambda what, done, total: None)
    check_out(out)
    if options.drawing is not None:
        options.drawing.check_folder()
    figure = None if options.figure is None else read_figure(options.figure)
    audits = [read_audit(path) for path in options.audits]
    judging, teacher = options.compare.judging, options.compare.teacher
    comparison = compare(runs, data, split, options.compare, report)
    for audit in audits:
        audit.check_classes(comparison.class_names)
    everything = find_runs([*runs, *([] if teacher is None else [teacher])], judging.which)
    samples: tuple[Sample, ...] | None = None
    matrices: list[tuple[int, ConfusionMatrix]] = []
    if options.samples or options.drawing is not None:
        source = open_split(comparison.data, comparison.split)
        one_judging, _ = one_range(judging, everything, source)
        first = score_first_runs(comparison, everything, source, one_judging, report)
        matrices = [(place, model.scores.confusion) for place, _, model in first.models]
        if options.samples:
            samples = choose_samples(comparison, first, options.samples, report)
        if options.drawing is not None:
            notes = _draw(comparison, first, options.drawing, options.compare.baseline, report)
            comparison = replace(comparison, notes=(*comparison.notes, *notes))
    report("writing the page", 0, 1)
    write_report(
        comparison,
        everything,
        out,
        title=options.title,
        samples=samples,
        matrices=matrices,
        size_of_cache=options.size_of_cache,
        audits=audits,
        figure=figure,
        pictures=None if options.drawing is None else options.drawing.folder,
        device=judging.device,
        command=options.command,
    )
    report("writing the page", 1, 1)
    return comparison


def _draw(
    comparison: Comparison, first: FirstRuns, drawing: Drawing, baseline: str | None, progress: Progress
) -> list[str]:
    """Draw all rows but the teacher's, with the teacher and the named baseline as panels. Return notes."""
    rows = comparison.rows
    gallery = Gallery(
        first.split,
        above=comparison.banner,
        teacher=next((model for place, _, model in first.models if rows[place].teacher), None),
        baseline=_baseline(comparison, first, baseline),
        layout=drawing.layout,
        formats=drawing.formats,
    )
    models = [(run, model) for place, run, model in first.models if not rows[place].teacher]
    return draw(drawing, models, gallery, progress)


def _baseline(comparison: Comparison, first: FirstRuns, named: str | None) -> Shown | None:
    """Return the model of the row that --baseline names, by its name or by one of its runs."""

    def names(place: int, run: Entry) -> set[str]:
        row = comparison.rows[place]
        return {row.name, run.name, *(score.run for score in row.runs)}

    return next((model for place, run, model in first.models if named in names(place, run)), None)
