"""From runs to the page, for `kdcache report`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.analysis.compare import CompareOptions, Progress, compare, one_range
from kdcache.analysis.comparison import Comparison
from kdcache.analysis.report.audit import read_audit
from kdcache.analysis.report.page import check_out, write_report
from kdcache.analysis.report.samples import Sample, choose_samples
from kdcache.analysis.runs import find_runs
from kdcache.data import open_split
from kdcache.errors import RecipeError

SAMPLES = 3


@dataclass(frozen=True)
class ReportOptions:
    """The comparison and the other contents of a page.

    Attributes:
        title: title of the page; None makes one of the data's name.
        samples: best and worst images; 0 shows none.
        audits: `report.json` of the audits of teachers (inspect --teacher-report), one for each store.
        pictures: a folder of pictures that the page mentions.
        command: what the user typed.
    """

    compare: CompareOptions = field(default_factory=CompareOptions)
    title: str | None = None
    samples: int = SAMPLES
    audits: tuple[Path, ...] = ()
    pictures: Path | None = None
    command: str | None = None


def make_report(
    runs: Sequence[str | Path],
    data: str | None,
    split: str | None,
    out: Path,
    options: ReportOptions | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare runs, draw their best and worst images, write the page.

    Args:
        data, split: default: those that the runs' recipes validate on.
        out: an .html file; one that is there is replaced.
    Raises: RecipeError for files and runs that are none; MismatchError for other classes or data.
    """
    options = options or ReportOptions()
    report = progress or (lambda what, done, total: None)
    check_out(out)
    if options.pictures is not None and not options.pictures.is_dir():
        raise RecipeError(
            "--pictures is the folder that visualise wrote",
            received=f"{options.pictures} " + ("is a file" if options.pictures.exists() else "does not exist"),
            remedy="run kdcache visualise first, or leave --pictures out",
        )
    audits = [read_audit(path) for path in options.audits]
    judging, teacher = options.compare.judging, options.compare.teacher
    comparison = compare(runs, data, split, options.compare, report)
    for audit in audits:
        audit.check_classes(comparison.class_names)
    everything = find_runs([*runs, *([] if teacher is None else [teacher])], judging.which)
    samples: tuple[Sample, ...] | None = None
    if options.samples:
        source = open_split(comparison.data, comparison.split)
        one_judging, _ = one_range(judging, everything, source)
        samples = choose_samples(comparison, everything, source, one_judging, options.samples, report)
    report("writing the page", 0, 1)
    write_report(
        comparison,
        everything,
        out,
        title=options.title,
        samples=samples,
        audits=audits,
        pictures=options.pictures,
        device=judging.device,
        command=options.command,
    )
    report("writing the page", 1, 1)
    return comparison
