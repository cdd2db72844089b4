"""`kdcache.evaluate`: metrics of a model on labelled data."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.analysis.runs import check_classes, unnamed_classes
from kdcache.analysis.stored_evaluations import (
    IMAGES,
    EvalSettings,
    Record,
    data_digest,
    file_name,
    judged_range,
    kept_metrics,
    memory_errors,
    name_of_several,
    weights_of,
    write_evaluation,
    write_evaluations,
)
from kdcache.data import ClassList, Fold, Split, check_folds_by, classes_by_name, fold_alone, parse_fold
from kdcache.display import public
from kdcache.errors import RecipeError
from kdcache.metrics import (
    DepthMetrics,
    DepthRange,
    Inference,
    Metrics,
    OnDataSet,
    TaskMetrics,
    at_chance,
    evaluate_tasks,
    iou_listing,
    metrics_markdown,
)
from kdcache.metrics.data_sets import data_sets_markdown
from kdcache.metrics.data_sets import listing as listing_of
from kdcache.models import SegmentationModel, not_logits
from kdcache.models.run import open_model, split_spec
from kdcache.progress import progress_bar, progress_of, warn
from kdcache.run_folder import Run, RunModel
from kdcache.run_samples import judging_notes
from kdcache.settings import training
from kdcache.settings.removed import VERBS, removal
from kdcache.settings.shared import DepthSettings, ImageSettings, JudgeSettings, MachineSettings
from kdcache.tasks import SEGMENTATION
from kdcache.teacher import Teacher, load_teacher
from kdcache.verbs.compare import judging_of
from kdcache.verbs.keywords import Data, checked, keywords, open_data

TABLES = (ImageSettings, JudgeSettings, DepthSettings, MachineSettings)


@dataclass(frozen=True, repr=False)
class Evaluated:
    """The result of `kdcache.evaluate`. Two results are equal if their metrics are.

    Attributes:
        data_sets: the metrics on each data set, over the classes that the data set shares with the model.
        class_names: names of the model's classes.
        depth_range: the range of depths that count on the first data set, or None without depth.
        reused: True if all metrics come from an earlier evaluation.
        files: paths of the files that were written.
    """

    data_sets: tuple[OnDataSet, ...]
    class_names: tuple[str, ...] = field(default=(), compare=False)
    depth_range: DepthRange | None = field(default=None, compare=False)
    reused: bool = field(default=False, compare=False)
    files: tuple[Path, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        return ", ".join(f"{result.data} {result.metrics!r}" for result in self.data_sets)

    def _repr_html_(self) -> str:
        return "".join(result.metrics._repr_html_() for result in self.data_sets)

    @property
    def metrics(self) -> TaskMetrics:
        """The metrics of all tasks on the first data set."""
        return self.data_sets[0].metrics

    @property
    def segmentation(self) -> Metrics | None:
        """The segmentation metrics on the first data set, such as mIoU, or None without a segmentation head."""
        return self.metrics.segmentation

    @property
    def depth(self) -> DepthMetrics | None:
        """The depth metrics on the first data set, or None without a depth head or depth labels."""
        return self.metrics.depth


@dataclass(frozen=True)
class _Files:
    """The files of an evaluation. None is a file in the run's folder, or in `folder` for a model that is not a run."""

    json: Path | None
    markdown: Path | None
    listing: Path | None
    folder: Path | None


@keywords(*TABLES, but=("repeats",))
def evaluate(
    model: str | Path | Run | nn.Module | Teacher,
    data: Data | Sequence[Data],
    *,
    split: str | Sequence[str] | None = None,
    fold: str | None = None,
    folds_by: str | None = None,
    class_map: str | Path | None = None,
    at_size: bool = False,
    json_file: str | Path | None = None,
    markdown: str | Path | None = None,
    listing: str | Path | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Evaluated:
    """Evaluate a model on labelled data: mIoU, IoU per class and depth metrics, as `kdcache evaluate` does.

    >>> import kdcache
    >>> evaluated = kdcache.evaluate("runs/student", "streets", progress=False)
    >>> 0 <= evaluated.segmentation.miou <= 1
    True

    Predictions are compared at the labels' own size. An evaluation of a run is stored in the run's folder, and reused
    until weights or data change (`fresh=True` evaluates again).

    Args:
        model: a run, SPEC@FILE, a module, or the result of `load_teacher`.
        data: folder or spec of a data set, or a split from `open_split` or `from_dataset`. Several data sets are
            evaluated separately, each over the classes that it shares with the model.
        split: name of the split. Default: val. Give one for all data sets, or one for each.
        fold: evaluate only this fold, such as "0/5", which the training left out by `--fold`. None evaluates the whole
            split.
        folds_by: regular expression whose match in a sample id names its sequence. A sequence is never divided between
            folds. None treats each sample on its own.
        class_map: file that names the data class for each class of the model. None if both have the same classes.
        at_size: resize labels to the model's input size, instead of comparing at the labels' own size.
        json_file: file for the metrics as JSON. Default: a file in the run's folder.
        markdown: file for the metrics as Markdown. Default: a file in the run's folder.
        listing: text file with one line per class. None writes none.
        folder: folder for the default files of a model that is not a run. None writes none.
        progress: show a progress bar, or lines without a terminal.
        settings: the other flags of `kdcache evaluate`, with the same defaults. `help(kdcache.evaluate)` lists them.
    Raises: KDCacheError, the base class of all errors of kdcache.
    """
    values = checked(evaluate, settings, *TABLES)
    check_folds_by(folds_by, folds=fold is not None)
    part = None if fold is None else parse_fold(fold, folds_by)
    sources = _open(data, split)
    judging = judging_of(values)
    if isinstance(model, nn.Module | Teacher):
        source = sources[0] if part is None else fold_alone(sources[0], *part)
        return Evaluated((OnDataSet.of(source, _of_module(model, source, judging, progress)),))
    files = _Files(*(None if path is None else Path(path) for path in (json_file, markdown, listing, folder)))
    judged = _Judged.of(str(model), sources, judging, None if class_map is None else Path(class_map), part)
    if files.listing is not None:
        judged.check_listing()
    return judged.evaluate(files, at_size, progress)


@dataclass(frozen=True)
class _Judged:
    """A run or SPEC@FILE, the data sets on which it is evaluated, and the settings of the evaluation."""

    text: str
    model: SegmentationModel
    description: RunModel
    sources: tuple[Split, ...]
    judging: EvalSettings
    class_map: Path | None
    fold: Fold | None

    @classmethod
    def of(
        cls, text: str, sources: Sequence[Split], judging: EvalSettings, class_map: Path | None, fold: Fold | None
    ) -> "_Judged":
        if (Path(text) / "pseudo-labels.json").is_file() and (gone := removal("evaluate of pseudo labels", VERBS)):
            raise gone
        classes = next((source.classes for source in sources if len(source.classes)), unnamed_classes)
        size = judging.size or (judging.window if split_spec(text) else None)
        model, description = open_model(text, classes, size, judging.which, class_map=class_map)
        for note in () if model.load_report is None else model.load_report.notes:
            warn(note)
        if len(sources) == 1:
            check_classes(description, sources[0].classes, sources[0].data)
        parts = sources if fold is None else [fold_alone(source, *fold) for source in sources]
        if len(parts) > 1:
            named = ClassList(description.class_names, description.class_colours)
            parts = [classes_by_name(source, named) for source in parts]
        return cls(text, model, description, tuple(parts), judging, class_map, fold)

    def check_listing(self) -> None:
        """Check before the evaluation that there are classes to list. Raises: RecipeError."""
        if not self.description.class_names or not any(SEGMENTATION in source.tasks for source in self.sources):
            what = "the model has no classes" if not self.description.class_names else "the data have no class labels"
            raise RecipeError(f"Cannot list the IoU of classes: {what}", fix="Leave out --listing.")

    def evaluate(self, files: _Files, at_size: bool, progress: bool) -> Evaluated:
        """Evaluate the model on every data set, warn of problems, and write the files."""
        description, judging = self.description, self.judging
        ranges = [judged_range(description.judged_heads, source, judging.depth) for source in self.sources]
        weights_name, weights = weights_of(self.text, judging.which)
        framing = judging.framing(description.fit)
        records = [
            Record.of(
                description,
                weights,
                source,
                data_digest(source),
                description.size,
                which=weights_name,
                fold=self.fold,
                at_size=at_size,
                class_map=self.class_map,
                depth=depth,
                framing=framing,
            )
            for source, depth in zip(self.sources, ranges, strict=True)
        ]
        kept = [self._kept(record, source) for record, source in zip(records, self.sources, strict=True)]
        results = []
        with progress_bar(progress) as bar, memory_errors(judging.device, judging.batch_size):
            for source, depth, earlier in zip(self.sources, ranges, kept, strict=True):
                metrics = earlier or evaluate_tasks(
                    self.model.to(judging.device),
                    source,
                    Inference(description.size, judging.device, judging.batch_size, at_size, framing=framing),
                    depth=None if depth is None and any(ranges) else judging.depth,
                    progress=progress_of(bar, "evaluating", source.data if len(self.sources) > 1 else ""),
                )
                results.append(OnDataSet.of(source, metrics))
        self._warn(results)
        own_size = weights_name is None or Run.open(self.text).model.size == description.size
        place = Run.open(self.text).folder if weights_name is not None else files.folder
        return Evaluated(
            tuple(results),
            description.class_names,
            ranges[0],
            all(kept),
            tuple(self._write(records, results, place, files, own_size=own_size)),
        )

    def _kept(self, record: Record, source: Split) -> TaskMetrics | None:
        """Return the metrics of an earlier evaluation of the same weights on the same data, or None."""
        if record.which is None or self.judging.fresh:
            return None
        return kept_metrics(Run.open(self.text).folder, record, source.classes.names)

    def _warn(self, results: Sequence[OnDataSet]) -> None:
        for result, source in zip(results, self.sources, strict=True):
            where = f"{self.text} on {result.data}" if len(results) > 1 else self.text
            if result.metrics.segmentation is not None and (nothing := at_chance(result.metrics.segmentation)):
                warn(f"{where} {nothing}")
            if split_spec(self.text) is None:
                for note in judging_notes(Run.open(self.text).folder, source):
                    warn(f"{self.text}: {note}")
        if (finding := not_logits(self.model)) and any(result.metrics.segmentation is not None for result in results):
            warn(f"{self.text} {finding.text}: {finding.fix}")

    def _write(
        self, records: Sequence[Record], results: list[OnDataSet], place: Path | None, files: _Files, *, own_size: bool
    ) -> list[Path]:
        """Write the files of one data set, or of several together. Return the paths."""
        several = len(records) > 1
        name = ""
        if place is not None:
            name = (
                name_of_several(records, self.text, own_size=own_size)
                if several
                else file_name(records[0], place, self.text, own_size=own_size)
            )
        json_path = files.json or (None if place is None else place / f"{name}.json")
        markdown = files.markdown or (None if place is None else place / f"{name}.md")
        results = [replace(result, data=public(result.data)) for result in results]
        segmentation = results[0].metrics.segmentation
        written = []
        if json_path is not None and several:
            write_evaluations(records, json_path, self.text, results)
            written.append(json_path)
        elif json_path is not None:
            write_evaluation(records[0], json_path, self.text, results[0].metrics)
            written += [json_path, json_path.with_suffix(IMAGES)]
        if markdown is not None and several:
            title = f"{public(self.text)} on {len(results)} data sets"
            markdown.write_text(data_sets_markdown(title, results, self.description.class_names), encoding="utf-8")
        elif markdown is not None:
            kind = (name or records[0].name(own_size=own_size)).removeprefix("evaluation-")
            title = f"{public(self.text)} on {records[0].data}, {kind}"
            markdown.write_text(metrics_markdown(title, results[0].metrics), encoding="utf-8")
        written += [] if markdown is None else [markdown]
        if files.listing is not None and (several or segmentation is not None):
            text = listing_of(results) if several or segmentation is None else iou_listing(segmentation)
            files.listing.write_text(text, encoding="utf-8")
            written.append(files.listing)
        return written


def _open(data: Data | Sequence[Data], split: str | Sequence[str] | None) -> list[Split]:
    """Return the split of each data set. Raises: RecipeError if the number of splits does not fit."""
    places = [data] if isinstance(data, str | Path | Split) else list(data)
    if not places:
        raise RecipeError("Missing --data", fix="Give a data set, or several.")
    splits = [split] if split is None or isinstance(split, str) else list(split)
    if len(splits) not in (1, len(places)):
        raise RecipeError(
            f"Cannot take {len(splits)} splits ({', '.join(map(str, splits))}) for {len(places)} data sets",
            fix="Give --split once for all data, or once for each --data, in the same order.",
        )
    return [
        open_data(place, name if name is not None or isinstance(place, Split) else training.Data.val_split)
        for place, name in zip(places, splits * (len(places) // len(splits)), strict=True)
    ]


def _of_module(model: nn.Module | Teacher, source: Split, judging: EvalSettings, progress: bool) -> TaskMetrics:
    """Return the metrics of a module or a loaded teacher. Raises: RecipeError if no size is known."""
    teacher = model if isinstance(model, Teacher) else load_teacher(model, source)
    size = judging.size or teacher.size or judging.window
    if size is None:
        raise RecipeError(f"Missing the size of images for {teacher.origin}", fix="Add size=(288, 384).")
    with progress_bar(progress) as bar, memory_errors(judging.device, judging.batch_size):
        return evaluate_tasks(
            teacher.model.to(torch.device(judging.device)),
            source,
            Inference(size, judging.device, judging.batch_size, framing=judging.framing(teacher.fit)),
            depth=None if judging.depth == DepthSettings() else judging.depth,
            progress=progress_of(bar, "evaluating"),
        )
