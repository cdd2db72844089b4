"""Compare runs: what each scored, how far it is from its baseline, and what it costs to run.

    comparison = compare(["runs/none-0", "runs/kl-0", "runs/none-1", "runs/kl-1"], "camvid", "val")

A row is a recipe. Its runs differ in seed and fold. Metrics come from the evaluations that are stored with the weights,
or from a new one on the same data.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from kdcache.analysis.comparison import Comparison, Gaps, Row, RunScore, alike, collapse
from kdcache.analysis.groups import Group, group_runs
from kdcache.analysis.runs import Entry, check_judged, check_same_data, find_runs, regressions_of, validated_split
from kdcache.analysis.statistics import Blocks, Difference, Key, Spread, adjust, choose_blocks, difference, resample
from kdcache.analysis.stored_evaluations import (
    EvalSettings,
    Evaluation,
    data_digest,
    evaluate_run,
    judged_range,
    memory_errors,
)
from kdcache.data import Split, fold_alone, open_split, read_contents
from kdcache.errors import DataError, MismatchError, RecipeError, suggest
from kdcache.metrics.cost import REPEATS, Cost, CostKey, keep_cost, kept_cost, measure_cost
from kdcache.metrics.depth import DepthRange
from kdcache.metrics.evaluators import EVALUATORS
from kdcache.models import not_logits
from kdcache.models.registry import is_listed
from kdcache.run_folder import Run
from kdcache.settings.shared import DepthSettings
from kdcache.tasks import TASKS, in_metres

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class CompareOptions:
    """How runs are compared.

    Attributes:
        judging: how each run is evaluated.
        teacher: a run or SPEC@FILE that gets its own row, outside the ranking. None adds no row.
        baseline: the name of a row, or of a run in it. None takes, for each row, the row of the same model that learnt
            from labels only.
        blocks_by: a pattern that finds the sequence in a sample's id. Intervals over images then resample sequences.
            None resamples single images.
        own_fold: evaluate each run on the fold that its training left out (cross-validation).
        repeats: timed calls per model. 0 measures no latency.
        smoke: the runs come from a shortened recipe (`sweep --smoke`), so all output is marked.
    """

    judging: EvalSettings = field(default_factory=EvalSettings)
    teacher: str | None = None
    baseline: str | None = None
    blocks_by: str | None = None
    own_fold: bool = False
    repeats: int = REPEATS
    smoke: bool = False


def compare(
    runs: Sequence[str | Path],
    data: str | None = None,
    split: str | None = None,
    options: CompareOptions | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate runs and compare them, with one row for each recipe.

    Stored evaluations of the same weights and data are reused.

    Args:
        runs: run folders, folders that hold runs, or SPEC@FILE.
        data: the data set. None takes the validation data of the recipes.
        split: its split. None takes the validation split of the recipes.
        options: how to compare. None takes the defaults.
        progress: called with (what is done, units done, units in total).
    Raises: RecipeError for invalid runs, an unknown `options.teacher` or `options.baseline`, or if `options.blocks_by`
    finds fewer than two sequences. MismatchError for runs with other classes or other data.
    """
    options = options or CompareOptions()
    which = options.judging.which
    teachers = [] if options.teacher is None else find_runs([options.teacher], which)
    apart = {entry.run.folder.resolve() for entry in teachers if entry.run is not None}
    named = find_runs(runs, which)
    members = [run for run in named if run.run is None or run.run.folder.resolve() not in apart]
    left_out = [f"{run.text} has no row of its own: it is the --teacher" for run in named if run not in members]
    if not members:
        raise RecipeError(
            f"Nothing to compare: {'only the teacher was given' if teachers else 'no run was given'}",
            fix="Name some runs.",
        )
    check_judged([*members, *teachers])
    source = comparable_split(members, data, split)
    judging, depth_range = one_range(options.judging, [*members, *teachers], source)
    options = replace(options, judging=judging)
    blocks = {task: choose_blocks(source, options.blocks_by, task) for task in source.tasks}
    groups, notes = group_runs(members)
    groups += _apart(teachers, groups)
    _check_baseline(options.baseline, groups)
    judge = _Judge(source, options, progress or (lambda what, done, total: None))
    scores = {group.name: tuple(judge.score(run, group.teacher) for run in group.runs) for group in groups}
    costs = {group.name: judge.cost(group.runs[0]) for group in groups}
    baselines = {group.name: choose_baseline(group, groups, options.baseline) for group in groups}
    controls = {group.name: choose_control(group, groups) for group in groups}
    used = {rival.name for rival in (*baselines.values(), *controls.values()) if rival is not None}
    rows = [
        _row(
            group,
            scores,
            costs[group.name],
            (baselines[group.name], controls[group.name]),
            blocks,
            used=group.name in used,
        )
        for group in groups
    ]
    return Comparison(
        data=source.data,
        split=source.split,
        data_sha256=judge.digest(source),
        images=len(source.labelled()),
        own_fold=options.own_fold,
        weights=which,
        class_names=source.classes.names,
        class_colours=source.classes.colours,
        rows=adjust_rows(rows),
        notes=(*_warnings(rows), *left_out, *judge.judged_notes, *notes, *judge.notes),
        smoke=options.smoke,
        depth_range=None if depth_range is None else str(depth_range),
    )


def one_range(judging: EvalSettings, members: Sequence[Entry], split: Split) -> tuple[EvalSettings, DepthRange | None]:
    """Return evaluation settings with one depth range for all models, and this range.

    Each model alone would have its own largest depth, and the common range ends at the largest of these. The range is
    None if depth is not evaluated.

    Args:
        judging: the settings of the evaluation.
        members: the models to compare.
        split: the data.
    Raises: DataError if `judging` has depth settings, but depth is not evaluated.
    """
    heads = [regressions_of(entry, split.classes, judging.which) for entry in members if in_metres(split.tasks)]
    ranges = [depth_range for each in heads if (depth_range := judged_range(each, split, judging.depth)) is not None]
    if not ranges:
        if judging.depth != DepthSettings():
            raise DataError(
                "Cannot use --min-depth, --max-depth or --depth-crop: no depth is judged for "
                f"{', '.join(entry.text for entry in members[:3])} on {split.data}, split {split.split!r}",
                fix="Leave these flags out, or give models that predict depth in metres and data with labels of depth.",
            )
        return judging, None
    widest = max(ranges, key=lambda depth_range: depth_range.max_depth)
    return replace(judging, depth=replace(judging.depth, max_depth=widest.max_depth)), widest


def _warnings(rows: Sequence[Row]) -> list[str]:
    """Return warnings about runs that have learnt nothing, and about those that seeds did not change."""
    return [note for row in rows for note in (collapse(row, row.name), alike(row)) if note is not None]


def comparable_split(runs: Sequence[Entry], data: str | None, split: str | None) -> Split:
    """Open the split on which all runs are compared: the named one, or the validation split of their recipes.

    `data` None takes the recipes' data. `split` None takes their validation split, or "val".

    Raises: RecipeError if no recipe names data, or recipes name different data. MismatchError if the data has changed.
    """
    if data is not None:
        splits = {str(run.settings.get("val-split", "val")) for run in runs if "val" in run.settings}
        opened = open_split(data, split or (splits.pop() if len(splits) == 1 else "val"))
        if split is None:
            check_same_data(runs, opened)
        return opened
    named = {
        (str(run.settings["val"]), split or str(run.settings.get("val-split", "val"))): run
        for run in runs
        if "val" in run.settings
    }
    if not named:
        raise RecipeError(
            f"Missing --data: no recipe of {', '.join(run.text for run in runs[:3])} names data to validate on",
            fix="Add --data, and --split if it is not val.",
        )
    (_, first), *others = named.items()
    source, *more = [validated_split(run, *where) for where, run in named.items()]
    for (_, run), further in zip(others, more, strict=True):
        if data_digest(further) != data_digest(source):
            raise MismatchError(
                f"Cannot compare runs on two data sets: {first.text} was validated on {source.data}, split "
                f"{source.split!r}, and {run.text} on {further.data}, split {further.split!r}",
                fix="Name the data for all with --data and --split, or compare fewer runs.",
            )
    return source


def choose_baseline(group: Group, groups: Sequence[Group], named: str | None = None) -> Group | None:
    """Return the row with which a row is compared, its baseline, or None if it does not have one.

    Without `named`, the baseline is a row of the same model that learnt from labels only. Of several such rows, it is
    the one with the most similar settings. The teacher's baseline is the only row that learnt from labels only.

    Args:
        group: the row to compare. Without `named`, a row that learnt from labels only has no baseline.
        groups: all rows of the comparison.
        named: the name of the baseline, or of a run in it. The result is None for an unknown name, and for the
            baseline itself.
    """
    if named is not None:
        baseline = _named(named, groups)
        return None if baseline is group else baseline
    plain_rows = [row for row in groups if not row.taught and not row.teacher]
    if group.teacher:
        return plain_rows[0] if len(plain_rows) == 1 else None
    rivals = [row for row in plain_rows if row.model == group.model]
    if not group.taught or not rivals:
        return None
    return min(rivals, key=group.unlikeness)


def choose_control(group: Group, groups: Sequence[Group]) -> Group | None:
    """Return the control of a row among all rows: the same model and loss terms, with labels in the teacher's place.

    Of several controls, it is the one with the most similar settings. None if there is none.
    """
    if group.control or group.teacher or not group.taught:
        return None
    rivals = [row for row in groups if row.control and not row.teacher and row.terms == group.terms]
    return min(rivals, key=group.unlikeness, default=None)


def adjust_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return rows whose verdicts are adjusted for multiple comparisons by Holm's method.

    The differences in a task, to baselines and to controls, form one family of tests. All differences in class IoUs
    form another. The teacher's row is not adjusted, so it does not weaken other verdicts.
    """
    adjusted = list(rows)
    for task in TASKS:
        slots = [
            (place, name, gap)
            for place, row in enumerate(rows)
            for name, gap in zip(("baseline", "control"), row.differences(task), strict=True)
            if gap is not None and not row.teacher
        ]
        for (place, name, _), gap in zip(slots, adjust([gap for *_, gap in slots]), strict=True):
            adjusted[place] = adjusted[place].with_gaps(task, **{name: gap})
    places = [place for place, row in enumerate(rows) if not row.teacher]
    classes = iter(adjust([gap for place in places for gap in rows[place].class_differences]))
    for place in places:
        class_gaps = tuple(next(classes) for _ in rows[place].class_differences)
        adjusted[place] = replace(adjusted[place], class_differences=class_gaps)
    return tuple(adjusted)


def _named(name: str, groups: Sequence[Group]) -> Group | None:
    """Return a row by its name, or by the name or path of one of its runs."""
    by_name = {}
    for group in groups:
        if not group.teacher:
            for run in group.runs:
                by_name[run.text], by_name[run.name] = group, group
    by_name |= {group.name: group for group in groups if not group.teacher}
    return by_name.get(name)


def _check_baseline(name: str | None, groups: Sequence[Group]) -> None:
    """Refuse an unknown baseline before anything is evaluated. Raises: RecipeError."""
    if name is not None and _named(name, groups) is None:
        names = [group.name for group in groups if not group.teacher]
        raise RecipeError(
            f"Unknown row or run in --baseline: {name!r}",
            fix=suggest(name, names, f"Choose one of: {', '.join(names[:40])}", cutoff=0.5),
        )


def _apart(teachers: Sequence[Entry], groups: Sequence[Group]) -> list[Group]:
    """Return the teacher's row, named `teacher`."""
    teacher_groups, _ = group_runs(teachers) if teachers else ([], [])
    taken = {group.name for group in groups}
    names = [
        "teacher" if len(teacher_groups) == 1 and "teacher" not in taken else f"teacher {group.name}"
        for group in teacher_groups
    ]
    return [Group(name, group.runs, {}, teacher=True) for name, group in zip(names, teacher_groups, strict=True)]


class _Judge:
    """Evaluates and measures, each thing once."""

    def __init__(self, split: Split, options: CompareOptions, progress: Progress) -> None:
        self._split, self._options, self._progress = split, options, progress
        self.digest = _once(data_digest)
        self._contents = _once(read_contents)
        self._costs: dict[tuple[object, ...], Cost] = {}
        self.notes: list[str] = []
        self._judged: dict[str, list[str]] = {}

    @property
    def judged_notes(self) -> list[str]:
        """The notes on evaluations, each once with the runs that it applies to."""
        return [
            f"{', '.join(runs[:3])}{' and others' if len(runs) > 3 else ''}: {text}"
            for text, runs in self._judged.items()
        ]

    def score(self, run: Entry, teacher: bool) -> RunScore:
        """Return the score of a run. With `own_fold`, a teacher that left out no fold is judged on the whole split."""
        fold = run.own_fold() if self._options.own_fold and not (teacher and run.fold is None) else None
        part = self._split if fold is None else fold_alone(self._split, *fold)
        evaluation: Evaluation = evaluate_run(
            run,
            part,
            self.digest(part),
            self._options.judging,
            lambda done, total: self._progress(f"evaluating {run.name}", done, total),
            fold,
            self._contents,
        )
        self.notes += [run.note] if run.note else []
        for note in evaluation.notes:
            self._judged.setdefault(note, []).append(run.text)
        return RunScore(run.text, *run.key, evaluation.metrics, evaluation.reused, self._split.classes.names)

    def cost(self, entry: Entry) -> Cost:
        """Return the cost of a network. Runs of one spec at one size are the same program and share a measurement."""
        judging = self._options.judging
        key: tuple[object, ...] = (entry.text,)
        if entry.run is not None:
            key = (entry.run.model.spec, judging.size or entry.run.model.size)
        if key not in self._costs:
            self._costs[key] = self._kept_cost(entry) or self._measured_cost(entry)
        return self._costs[key]

    def _key(self, run: Run) -> CostKey | None:
        """Return the key of a run's stored cost, or None for the user's own code, which may change under one name."""
        model, judging = run.model, self._options.judging
        if not is_listed(model.spec):
            return None
        return CostKey.of(model.spec, len(model.class_names), judging.size or model.size, judging.device)

    def _kept_cost(self, entry: Entry) -> Cost | None:
        """Return the cost that was measured before next to a run, unless all is judged anew."""
        key = None if entry.run is None or self._options.judging.fresh else self._key(entry.run)
        if key is None or entry.run is None or not self._options.repeats:
            return None
        cost = kept_cost(entry.run.folder, key, self._options.repeats)
        if cost is not None:
            self.notes.append(
                f"The time of {entry.name} at {key.size[0]}x{key.size[1]} was measured earlier, on the same "
                "processor and number of threads. Use --fresh to measure it again."
            )
        return cost

    def _measured_cost(self, entry: Entry) -> Cost:
        judging, repeats = self._options.judging, self._options.repeats
        self._progress(f"timing {entry.name}", 0, 1)
        model, description = judging.load(entry, self._split.classes)
        self.notes += () if model.load_report is None else model.load_report.notes
        if (finding := not_logits(model)) is not None:
            self.notes.append(f"{entry.text} {finding.text}: {finding.fix}")
        with memory_errors(judging.device, 1):
            cost = measure_cost(model, description.size, device=judging.device, repeats=repeats)
        if entry.run is not None and (key := self._key(entry.run)) is not None:
            note = keep_cost(entry.run.folder, key, cost, repeats)
            self.notes += [note] if note else []
        self._progress(f"timing {entry.name}", 1, 1)
        return cost


def _once(read: Callable[[Split], _Read]) -> Callable[[Split], _Read]:
    """Return a function that reads each split once, by its ids and classes."""
    known = dict[str, _Read]()

    def read_once(split: Split) -> _Read:
        if (key := split.digest()) not in known:
            known[key] = read(split)
        return known[key]

    return read_once


def _difference(
    scores: dict[str, tuple[RunScore, ...]], group: Group, rival: Group | None, blocks: Mapping[str, Blocks], task: str
) -> Difference | None:
    """Return the difference in a task's score, with its intervals over seeds and over images or sequences.

    None without a rival, and for a task that neither is judged in.
    """
    judged = task in blocks and any(score.images(task) is not None for score in scores[group.name])
    if rival is None or not judged:
        return None
    our_scores, theirs = scores[group.name], scores[rival.name]
    values = [_by_key(row, lambda score: score.value(task)) for row in (our_scores, theirs)]
    gap = difference(values[0], values[1], rival.name)
    if gap.paired:
        common = {score.key for score in our_scores} & {score.key for score in theirs}
        our_scores, theirs = (tuple(score for score in row if score.key in common) for row in (our_scores, theirs))
    folds = {score.fold for score in (*our_scores, *theirs)}
    ours, others = ([images for score in row if (images := score.images(task))] for row in (our_scores, theirs))
    known = task in blocks and (len(ours), len(others)) == (len(our_scores), len(theirs))
    return replace(
        gap,
        over="seeds" if len(folds) < 2 else "seeds and folds",
        resampled=resample(ours, others, blocks[task]) if known else None,
    )


def _row(
    group: Group,
    scores: dict[str, tuple[RunScore, ...]],
    cost: Cost,
    rivals: tuple[Group | None, Group | None],
    blocks: Mapping[str, Blocks],
    *,
    used: bool,
) -> Row:
    """Return the row of a group. `rivals` are its baseline and its control. `used`: others are measured against it."""
    run_scores, baseline = scores[group.name], rivals[0]
    judged = [task for task in TASKS if any(task in score.tasks.by_task for score in run_scores)]
    iou = [_iou(number) for number in range(len(run_scores[0].metrics.class_names))]
    gaps: list[Difference] = []
    if baseline is not None:
        theirs = scores[baseline.name]
        gaps = [difference(_by_key(run_scores, column), _by_key(theirs, column), baseline.name) for column in iou]
    return Row(
        name=group.name,
        model=group.model,
        differs=dict(group.differs),
        runs=run_scores,
        scores={
            task: {
                name: Spread.of(score.value(task, name) for score in run_scores) for name in EVALUATORS[task].figures
            }
            for task in judged
        },
        iou=tuple(Spread.of(map(column, run_scores)) for column in iou),
        gaps={task: Gaps(*(_difference(scores, group, rival, blocks, task) for rival in rivals)) for task in TASKS},
        class_differences=tuple(gaps),
        cost=cost,
        teacher=group.teacher,
        baseline=used,
        distilled=group.distilled,
    )


def _iou(number: int) -> Callable[[RunScore], float]:
    return lambda score: score.metrics.iou[number]


def _by_key(scores: Iterable[RunScore], column: Callable[[RunScore], float]) -> dict[Key, float]:
    return {score.key: column(score) for score in scores}
