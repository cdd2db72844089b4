"""A comparison for readers and programs: tables, Markdown, CSV, and the plain table of a report.

Fractions are shown in percent with two digits. The best value of a column is marked, without the teacher. A single run
has no deviation.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kdcache.analysis.comparison import Comparison, Row
from kdcache.analysis.groups import CONTROL
from kdcache.analysis.statistics import RESAMPLES, Difference, Spread
from kdcache.analysis.task_views import FURTHER, VIEWS
from kdcache.errors import one_line
from kdcache.metrics.evaluators import EVALUATORS
from kdcache.metrics.tables import Table, markdown_table, percent
from kdcache.tasks import SEGMENTATION, TASKS

Mark = tuple[str, str]
"""What stands before and after a cell that is best."""
BOLD: Mark = ("**", "**")
FEW_BLOCKS = 10
"""Sequences below which their interval is too narrow to go without a note."""


def score_table(comparison: Comparison, mark: Mark = BOLD) -> Table:
    """Return a table with a line for each row: number of runs, and for each task its metrics, difference and verdict.

    mIoU, mAcc, aAcc and delta 1 are in percent, rmse is in metres. `mark` is the text before and after the best value.
    """
    header, cells = ["row", "runs"], [[row_name(row), str(len(row.runs))] for row in comparison.rows]
    for task in comparison.tasks or (SEGMENTATION,):
        view, seeds = VIEWS[task], interval_spans(comparison, task)[0]
        of = f" of {view.score}" if task in comparison.tasks[1:] else ""
        header += [view.figures[name].head for name in view.columns]
        header += [f"to baseline{of}", f"95 % over {seeds}", "verdict"]
        for row, texts in zip(comparison.rows, cells, strict=True):
            texts += [_marked(comparison, row, task, name, mark) for name in view.columns]
            texts += _difference(row.differences(task)[0], task)
    return header, cells


def difference_table(comparison: Comparison, task: str = SEGMENTATION) -> Table:
    """Return a table with a line for each difference between a row and its baseline or control.

    It has the difference, an interval over paired seeds, over unpaired seeds and over images, the correlation of the
    paired scores, p-values and a verdict. Differences that are NaN are left out.
    """
    seeds, images = interval_spans(comparison, task)
    intervals = [f"paired over {seeds}, 95 %", f"unpaired over {seeds}, 95 %", f"over {images}, 95 %"]
    header = ["row", "to", VIEWS[task].distance, *intervals, "correlation", "p", "p by Holm", "verdict"]
    rows = []
    for row, gap in ((each, gap) for each in comparison.rows for gap in each.differences(task)):
        if gap is not None and not math.isnan(gap.mean):
            paired = interval(gap.low, gap.high, task) if gap.paired else "-"
            rows.append(
                [
                    row_name(row),
                    gap.baseline,
                    VIEWS[task].gap_text(gap.mean),
                    paired,
                    interval(gap.unpaired.low, gap.unpaired.high, task),
                    "-" if gap.resampled is None else interval(gap.resampled.low, gap.resampled.high, task),
                    "-" if math.isnan(gap.correlation) else f"{gap.correlation:+.2f}",
                    p_value(gap.p),
                    p_value(gap.adjusted),
                    gap.verdict,
                ]
            )
    return header, rows


def interval_spans(comparison: Comparison, task: str = SEGMENTATION) -> tuple[str, str]:
    """Return two texts: what the two kinds of intervals in a task are taken over.

    The first kind is over runs: "seeds", or "seeds and folds" if runs differ in seed and in fold. The second kind is
    over "images" or "sequences".
    """
    gaps = [gap for row in comparison.rows if (gap := row.differences(task)[0]) is not None]
    seeds = max((gap.over for gap in gaps), key=len, default="seeds")
    return seeds, next((gap.resampled.over for gap in gaps if gap.resampled is not None), "images")


def interval(low: float, high: float, task: str = SEGMENTATION) -> str:
    """Return the ends of an interval as text, in points of mIoU or metres: "-0.50 to +1.20", or "-" for NaN.

    `low` and `high` are differences of scores in `task`: fractions for segmentation, metres for depth.
    """
    text = VIEWS[task].gap_text
    return "-" if math.isnan(low) else f"{text(low)} to {text(high)}"


def p_value(value: float) -> str:
    """Return a p-value with three decimals: "0.012", "< 0.001", or "-" for NaN."""
    if math.isnan(value):
        return "-"
    return "< 0.001" if value < 0.0005 else f"{value:.3f}"


def cost_table(comparison: Comparison) -> Table:
    """Return a table of each row's cost: image size, parameters, operations, and the time of one image if measured."""
    header = ["row", "size", "parameters", "GFLOPs", "GMACs", "ms per image", "median ms", "FPS"]
    rows = []
    for row in comparison.rows:
        cost, latency = row.cost, row.cost.latency
        times = ["-"] * 3
        if latency is not None:
            times = [_plus_minus(latency.mean_ms, latency.std_ms), f"{latency.median_ms:.2f}", f"{latency.fps:.1f}"]
        counts = [_millions(cost.parameters), f"{cost.flops / 1e9:.3f}", f"{cost.macs / 1e9:.3f}"]
        rows.append([row_name(row), f"{cost.size[0]}x{cost.size[1]}", *counts, *times])
    return header, rows


def class_table(comparison: Comparison, mark: Mark = BOLD) -> Table:
    """Return a table of scores in percent: a line for each row of the comparison.

    Its columns are the IoU of every class, then mIoU, mAcc and aAcc. `mark` is the pair of texts before and after the
    best value of each column.
    """
    header = ["row", *comparison.class_names, "mIoU", "mAcc", "aAcc"]
    columns = [_iou(number) for number in range(len(comparison.class_names))]
    columns += [partial(_mean, name=name) for name in VIEWS[SEGMENTATION].columns]
    rows = []
    for row in comparison.rows:
        cells = [(percent(column(row)), comparison.is_best(row, column)) for column in columns]
        rows.append([row_name(row), *(f"{mark[0]}{text}{mark[1]}" if best else text for text, best in cells)])
    return header, rows


def legend(comparison: Comparison) -> list[str]:
    """Return the explanations of the tables, one sentence each, then the warnings of the comparison."""
    where = f"{comparison.data}, split {comparison.split}: {comparison.images} labelled images"
    if comparison.own_fold:
        where += ", each run on the fold that its training left out"
    matrix = "one confusion matrix per run, void left out, " if SEGMENTATION in comparison.tasks else ""
    where += f" (sha256 {comparison.data_sha256[:12]}), weights {comparison.weights}"
    sentences = [f"{where}; {matrix}at the labels' own size"]
    if comparison.depth_range is not None:
        sentences.append(
            f"depth: labels of {comparison.depth_range}, metrics of each image, then their mean; of rmse, abs rel and "
            "their distances to the baseline less is better; verdicts on depth are adjusted among themselves"
        )
    if len(comparison.tasks) > 1:
        sentences.append("a dash: that task is not judged, for the model does not predict it, or has not learnt it")
    several = any(len(row.runs) > 1 for row in comparison.rows)
    if several:
        sentences.append(
            "± is the standard deviation over runs, which differ in seed and fold; marked is the best mean"
        )
    sentences += _about_differences(comparison)
    timed = comparison.latency
    sentences.append("FLOPs of convolutions, matrix products and attention, 2 per multiply-add (MAC)")
    if timed is not None:
        sentences.append(
            f"time of one image from pixels on the device to outputs at its size: {timed.device}, {timed.threads} "
            f"thread{'s' if timed.threads > 1 else ''}, batch size 1, {timed.repeats} calls after {timed.warm_up}; "
            "rows of one model share it"
        )
    return [*sentences, *comparison.notes]


def to_markdown(comparison: Comparison) -> str:
    """Return all tables and their explanations as Markdown."""
    scores, classes, cost = score_table(comparison), class_table(comparison), cost_table(comparison)
    distances = ""
    for task, view in VIEWS.items():
        header, gaps = difference_table(comparison, task)
        distances += f"## {view.title}\n\n{markdown_table(header, gaps)}\n" if gaps else ""
    per_class = f"## IoU per class, %\n\n{markdown_table(*classes)}\n" if SEGMENTATION in comparison.tasks else ""
    notes = "".join(f"- {text}\n" for text in legend(comparison))
    above = "" if comparison.banner is None else f"> **{comparison.banner}**\n\n"
    text = (
        f"# Comparison on {comparison.data}, {comparison.split}\n\n{above}{markdown_table(*scores)}\n{distances}"
        f"{per_class}## Cost\n\n{markdown_table(*cost)}\n{notes}"
    )
    return comparison.without_folders(text)


_CSV_DIFFERENCE = (
    *("to_baseline", "difference", "low", "high", "paired", "verdict", "p", "p_adjusted", "comparisons", "correlation"),
    *("unpaired", "unpaired_low", "unpaired_high", "unpaired_p"),
    *("over", "resampled_over", "resampled_count", "resampled_low", "resampled_high"),
)


def to_csv(comparison: Comparison) -> str:
    """Return the comparison as CSV, with a line for each row.

    Scores are fractions from 0 to 1, times are in milliseconds, and unknown values are empty.
    """
    names = comparison.class_names
    header = ["row", "model", "teacher", "baseline", "runs", "runs_at_chance"]
    header += [f"{column}_{part}" for column in ("miou", "macc", "aacc") for part in ("mean", "std")]
    header += _CSV_DIFFERENCE
    header += ["height", "width", "parameters", "flops", "macs"]
    header += ["latency_mean_ms", "latency_std_ms", "latency_median_ms", "fps", "device", "threads"]
    header += [f"iou_{part}:{name}" for name in names for part in ("mean", "std")]
    further = [task for task in comparison.tasks if task in FURTHER]
    header += [column for task in further for column in _csv_header(task)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(one_line, header))
    for row in comparison.rows:
        scores, classes = _csv_spreads(row, SEGMENTATION), _mean_and_std(row.iou)
        counts = [int(row.teacher), int(row.baseline), len(row.runs), len(row.collapsed)]
        head = [one_line(row.name), one_line(row.model), *counts]
        further_cells = [
            cell for task in further for cell in (*_csv_spreads(row, task), *_csv_difference(row.differences(task)[0]))
        ]
        cells = [*head, *scores, *_csv_difference(row.difference), *_csv_cost(row), *classes]
        writer.writerow([*cells, *further_cells])
    return comparison.without_folders(text.getvalue())


def _csv_header(task: str) -> list[str]:
    scores = [f"{task}_{name}_{part}" for name in EVALUATORS[task].figures for part in ("mean", "std")]
    return [*scores, *(f"{task}_{name}" for name in _CSV_DIFFERENCE)]


def _csv_spreads(row: Row, task: str) -> list[str]:
    return _mean_and_std(row.spread(task, name) for name in EVALUATORS[task].figures)


def to_text(comparison: Comparison) -> str:
    """Return a small table as plain text, a line per row: mIoU (0 to 1), parameters, and milliseconds per image.

    If there are depth labels, it also has the rmse of depth. The table has a heading, and notes below it.
    """
    tasks = [task for task in comparison.tasks if task in FURTHER]
    further = "".join(f"{_text_head(task):<20}" for task in tasks)
    header = f"{'Knowledge Distillation':<36}{'mIoU':<20}{further}{'# Parameters':<19}{'Inference Speed (ms)':<25}"
    lines = [header.rstrip()]
    lines.append("-" * 100)
    for row in comparison.rows:
        latency = row.cost.latency
        speed = "-" if latency is None else _plus_minus(latency.mean_ms, latency.std_ms)
        miou = "-" if math.isnan(row.miou.mean) else f"{row.miou.mean:.4f}"
        miou += "" if math.isnan(row.miou.std) else f" ± {row.miou.std:.4f}"
        others = "".join(f"{_marked(comparison, row, task, TASKS[task].score, ('', '')):<19} " for task in tasks)
        name, parameters = row_name(row), _millions(row.cost.parameters).replace(" ", "")
        lines.append(f"{name:<35} {miou:<19} {others}{parameters:<18} {speed}")
    rule = "=" * 100
    notes = "\n".join(legend(comparison))
    body = "\n".join(lines)
    above = "" if comparison.banner is None else f"{comparison.banner}\n\n"
    return comparison.without_folders(f"{rule}\nCOMPARISON TABLE\n{rule}\n\n{above}{body}\n\n{notes}\n")


def _text_head(task: str) -> str:
    view = VIEWS[task]
    return f"{task.capitalize()} {view.score.upper()} ({view.unit})"


def row_name(row: Row) -> str:
    """Return a row's name, with " (baseline)" appended if the row is a baseline.

    Nothing is appended to a name that contains "baseline" or says that the row is a control.
    """
    name = one_line(row.name)
    marked = "baseline" in name.lower() or name.endswith(CONTROL)
    return f"{name} (baseline)" if row.baseline and not marked else name


def _iou(number: int) -> Callable[[Row], float]:
    return lambda row: row.iou[number].mean


def _mean(row: Row, name: str) -> float:
    return row.spread(SEGMENTATION, name).mean


def _marked(comparison: Comparison, row: Row, task: str, name: str, mark: Mark) -> str:
    """Return a figure of a row with its deviation, marked if it is the best."""
    figure, spread = EVALUATORS[task].figures[name], row.spread(task, name)
    text = figure.text(spread.mean)
    if not math.isnan(spread.std):
        text += f" ± {figure.text(spread.std)}"
    best = comparison.is_best(row, lambda other: other.spread(task, name).mean, least=figure.less)
    return f"{mark[0]}{text}{mark[1]}" if best else text


def _about_differences(comparison: Comparison) -> list[str]:
    """Describe how differences to baselines were judged, and how many at once."""
    by_task = {task: [gap for row in comparison.rows if (gap := row.differences(task)[0])] for task in VIEWS}
    gaps = [gap for gaps_of in by_task.values() for gap in gaps_of]
    if not gaps:
        return []
    all_paired = all(gap.paired for gap in gaps)
    pairs = "over runs of equal seed and fold" if all_paired else "paired by seed and fold where they pair"
    baselines = " and ".join(sorted({gap.baseline for gap in gaps}))
    over = max((interval_spans(comparison, task)[0] for task, gaps_of in by_task.items() if gaps_of), key=len)
    units = " and ".join(VIEWS[task].words for task, gaps_of in by_task.items() if gaps_of)
    sentences = [f"{units} to {baselines}, {pairs}; 95 % interval over {over} by Student's t"]
    if any(row.differences(task)[1] is not None for row in comparison.rows for task in VIEWS):
        sentences.append(
            f"a row named '{CONTROL}' learnt by the same terms without a teacher: what it has over the baseline is the "
            "loss's own, and the distance of a row to it is what the teacher adds"
        )
    if any(math.isnan(gap.half_width) for gap in gaps):
        sentences.append("one run (or one pair) has no interval: how much a seed changes is unknown")
    if any(gap.paired and not math.isnan(gap.half_width) for gap in gaps):
        sentences.append(
            "pairing by seed buys nothing where the correlation of the pairs is about 0 (of two pairs it is not "
            "known): the unpaired interval, by Welch over all runs, is there too; the verdict is that of the pairs"
        )
    comparisons = max(gap.comparisons for gap in gaps)
    if comparisons > 1:
        sentences.append(
            f"{comparisons} comparisons: verdicts are adjusted by Holm, so that the chance of one false 'above noise' "
            "among all of them is at most 5 %; intervals are those of one comparison; verdicts on classes are adjusted "
            "over the classes of all rows"
        )
    return sentences + _about_images(gaps)


def _about_images(gaps: Sequence[Difference]) -> list[str]:
    """Explain the intervals over images or sequences, if there are any."""
    drawn = next((gap.resampled for gap in gaps if gap.resampled is not None), None)
    if drawn is None:
        return []
    sentences = [
        f"the interval over {drawn.over} is a bootstrap: {RESAMPLES:,} draws of the {drawn.count} {drawn.over} with "
        f"replacement, the same for both rows; it says what other {drawn.over} would change for these trained runs, "
        "the one over seeds what other trainings would change on these images; verdicts are those over seeds"
    ]
    if drawn.over == "images":
        sentences.append("frames of a video are alike: there, resample whole sequences with --blocks-by")
    elif drawn.count < FEW_BLOCKS:
        sentences.append(f"{drawn.count} sequences are few: the interval over them is too narrow")
    return sentences


def _difference(gap: Difference | None, task: str) -> list[str]:
    if gap is None or math.isnan(gap.mean):
        return ["-", "-", "-"]
    return [VIEWS[task].gap_text(gap.mean), interval(gap.low, gap.high, task), gap.verdict]


def _csv_difference(difference: Difference | None) -> list[str]:
    if difference is None:
        return [""] * len(_CSV_DIFFERENCE)
    ends, free = (difference.mean, difference.low, difference.high), difference.unpaired
    more = [*map(_cell, (difference.p, difference.adjusted)), str(difference.comparisons)]
    numbers = map(_cell, (difference.correlation, free.mean, free.low, free.high, free.p))
    drawn = difference.resampled
    spans = [difference.over, *([""] * 4 if drawn is None else [drawn.over, str(drawn.count)])]
    spans += [] if drawn is None else map(_cell, (drawn.low, drawn.high))
    paired = str(int(difference.paired))
    return [difference.baseline, *map(_cell, ends), paired, difference.verdict, *more, *numbers, *spans]


def _csv_cost(row: Row) -> list[str]:
    cost, latency = row.cost, row.cost.latency
    counts = [*map(str, cost.size), str(cost.parameters), str(cost.flops), str(cost.macs)]
    if latency is None:
        return [*counts, *[""] * 6]
    times = (latency.mean_ms, latency.std_ms, latency.median_ms, latency.fps)
    return [*counts, *map(_cell, times), latency.device, str(latency.threads)]


def _mean_and_std(spreads: Iterable[Spread]) -> list[str]:
    return [_cell(value) for spread in spreads for value in (spread.mean, spread.std)]


def _cell(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _plus_minus(mean: float, std: float) -> str:
    return f"{mean:.2f}" if math.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
