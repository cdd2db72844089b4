"""`kdcache visualise`: what models see, as pictures."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kdcache.settings.shared import JudgeSettings, MachineSettings
from kdcache_cli.console import ERRORS, OUT, progress_bar
from kdcache_cli.settings import shared_flags
from kdcache_cli.verbs.compare import BatchSize, OptionalData, OptionalSplit, Runs, Smoke, Weights, judging

_Option = typer.Option


def visualise(
    runs: Runs,
    out: Annotated[Path, _Option("--out", help="Folder of the pictures: new, empty, or that of an earlier call.")],
    data: OptionalData = None,
    split: OptionalSplit = None,
    fold: shared_flags.Fold = None,
    folds_by: shared_flags.FoldsBy = None,
    teacher: Annotated[
        str | None, _Option("--teacher", metavar="RUN", help="A run or SPEC@FILE: a panel of every picture.")
    ] = None,
    num: Annotated[int, _Option("--num", min=0, help="Best and worst images of each run.")] = 10,
    ids: Annotated[
        str | None, _Option("--ids", metavar="A,B,C", help="Draw these samples instead, the same of every run.")
    ] = None,
    class_name: Annotated[
        str | None, _Option("--class", metavar="NAME", help="Rank by the IoU of this class instead of mIoU.")
    ] = None,
    weights: Weights = JudgeSettings.weights,
    size: shared_flags.Size = None,
    batch_size: BatchSize = JudgeSettings.batch_size,
    threads: shared_flags.Threads = MachineSettings.threads,
    device: shared_flags.Device = MachineSettings.device,
    smoke: Smoke = False,
) -> None:
    """The best and the worst images of each run, confusion, curves; runs side by side.

    An image's score is the mean IoU over the classes in its label or its
    prediction, void left out. Several runs are also drawn side by side: the two
    best images and the worst, by the mean over the runs.

    [dim]kdcache visualise runs/none runs/kl --data camvid --teacher teacher --out pictures[/]
    """
    from kdcache.analysis.visualise import VisualiseOptions
    from kdcache.analysis.visualise import visualise as visualise_runs
    from kdcache.metrics import percent

    judged = judging(weights, size, batch_size, device, threads)
    names = tuple(name.strip() for name in (ids or "").split(",") if name.strip())
    part = shared_flags.parse_fold(fold, folds_by)
    options = VisualiseOptions(judged, num, num, names, class_name, teacher, part, smoke)
    with progress_bar() as bar:
        task = bar.add_task("scoring", total=None, note="")
        made = visualise_runs(
            runs,
            data,
            split,
            out,
            options,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    table = Table("folder", "images", "mIoU %", "mean of images %", box=None, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, model in made.shown.items():
        scores = model.scores.known()
        mean = sum(scores) / len(scores) if scores else float("nan")
        table.add_row(str(out / name), str(len(model.scores.images)), percent(model.scores.metrics.miou), percent(mean))
    OUT.print(table)
    pictures = sum(path.suffix == ".png" for path in made.files)
    OUT.print(f"[bold]{escape(str(out))}[/]: {pictures} pictures")
    for text in made.notes:
        ERRORS.print(f"note: {text}", markup=False, highlight=False)
