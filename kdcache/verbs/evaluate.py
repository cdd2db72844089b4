"""`kdcache.evaluate`: metrics of a model on labelled data."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcache.analysis.runs import find_runs
from kdcache.analysis.stored_evaluations import data_digest, evaluate_run, memory_errors
from kdcache.data import Split, check_folds_by, fold_alone, parse_fold
from kdcache.errors import RecipeError
from kdcache.metrics import TaskMetrics, evaluate_tasks
from kdcache.progress import progress_bar
from kdcache.run_folder import Run
from kdcache.settings.shared import DepthSettings, ImageSettings, JudgeSettings, MachineSettings
from kdcache.settings.training import Data
from kdcache.teacher import Teacher, load_teacher
from kdcache.verbs.compare import judging_of
from kdcache.verbs.keywords import checked, keywords, open_data

TABLES = (ImageSettings, JudgeSettings, DepthSettings, MachineSettings)


@keywords(*TABLES, but=("repeats",))
def evaluate(
    model: str | Path | Run | nn.Module | Teacher,
    data: str | Path | Split,
    *,
    split: str | None = None,
    fold: str | None = None,
    folds_by: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> TaskMetrics:
    """mIoU, IoU per class and metrics of depth at the labels' own size, as `kdcache evaluate` has them.

        metrics = kdcache.evaluate("runs/student", "camvid")
        metrics = kdcache.evaluate(my_module, split, size=(288, 384))

    An evaluation of a run is kept in its folder, and used again while weights and data are the same (`fresh=True` makes
    it anew).

    Args:
        model: a run, SPEC@FILE and the like, a module, or what `load_teacher` made.
        data: folder or spec of a data set, or a split: of `open_split`, or `from_dataset`.
        split: which split of the data, default val.
        fold, folds_by: judge on one fold, as --fold 0/5 of a training left it out.
        progress: shows a bar, or lines where there is no terminal.
        settings: as the flags of the verb, with their defaults: `help(kdcache.evaluate)` lists them.
    Raises: KDCacheError of every kind.
    """
    chosen = checked(evaluate, settings, *TABLES)
    source = open_data(data, None if isinstance(data, Split) and split is None else split or Data.val_split)
    check_folds_by(folds_by, folds=fold is not None)
    part = None if fold is None else parse_fold(fold, folds_by)
    if part is not None:
        source = fold_alone(source, *part)
    judging = judging_of(chosen)
    with progress_bar(progress) as bar:
        task = bar.add_task("evaluating", total=None, note="")

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if not isinstance(model, nn.Module | Teacher):
            (entry,) = _one(model, judging.which)
            evaluation = evaluate_run(entry, source, data_digest(source), judging, report, part)
            for note in evaluation.notes:
                bar.console.print(f"warning: {note}", markup=False, soft_wrap=True)
            return evaluation.metrics
        teacher = model if isinstance(model, Teacher) else load_teacher(model, source)
        size = judging.size or teacher.size or judging.window
        if size is None:
            raise RecipeError(
                "a model that is no run needs the size of its images",
                received=f"{teacher.origin} and no size",
                remedy="add size=(288, 384)",
            )
        depth = None if judging.depth == DepthSettings() else judging.depth
        with memory_errors(judging.device, judging.batch_size):
            return evaluate_tasks(
                teacher.model.to(torch.device(judging.device)),
                source,
                size,
                depth=depth,
                device=judging.device,
                batch_size=judging.batch_size,
                framing=judging.framing(teacher.fit),
                progress=report,
            )


def _one(model: str | Path | Run, which: str) -> list[Any]:
    """The one run that is named. Raises: RecipeError for a folder of several."""
    entries = find_runs([str(model)], which)
    if len(entries) != 1:
        raise RecipeError(
            "one model is evaluated at a time",
            received=f"{model}, which holds {len(entries)} runs",
            remedy="name one of them; kdcache.compare sets several side by side",
        )
    return entries
