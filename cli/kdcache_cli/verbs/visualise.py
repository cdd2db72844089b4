"""`kdcache visualise`: what models see, as pictures."""

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.markup import escape

from kdcache.errors import RecipeError
from kdcache_cli.console import ERRORS, OUT, figure_table, progress_of_steps
from kdcache_cli.settings import compare_flags, shared_flags
from kdcache_cli.settings.signature import takes

_Option = typer.Option


@takes(
    *compare_flags.TABLES,
    order=(
        *("runs", "out", "data", "split", "fold", "folds_by", "teacher", "baseline", "num", "ids", "class_name"),
        *("layout", "formats"),
        *("weights", *compare_flags.FRAMING, *compare_flags.DEPTH, "batch_size", "threads", "device", "smoke"),
    ),
    wording={
        "teacher": {"help": "A run or SPEC@FILE: a panel of every picture."},
        "baseline": {"help": "A run or SPEC@FILE: a panel of every picture of another run.", "metavar": "RUN"},
    },
)
def visualise(
    settings: dict[str, Any],
    runs: compare_flags.Runs,
    out: Annotated[Path, _Option("--out", help="Folder of the pictures: new, empty, or that of an earlier call.")],
    fold: shared_flags.Fold = None,
    folds_by: shared_flags.FoldsBy = None,
    num: Annotated[int, _Option("--num", min=0, help="Best and worst images of each run.")] = 10,
    ids: Annotated[
        str | None, _Option("--ids", metavar="A,B,C", help="Draw these samples instead, the same of every run.")
    ] = None,
    class_name: Annotated[
        str | None, _Option("--class", metavar="NAME", help="Rank by the IoU of this class instead of mIoU.")
    ] = None,
    layout: Annotated[
        str,
        _Option(
            "--layout",
            metavar="grid|row",
            help="grid: also overlay and errors, below each other; row: image, ground truth, teacher, baseline and "
            "prediction in one row without a title, as for a paper.",
        ),
    ] = "grid",
    formats: Annotated[
        str, _Option("--format", metavar="png,svg,pdf", help="Formats beside PNG, whose text stays text.")
    ] = "png",
) -> None:
    """The best and the worst images of each run, confusion, curves; runs side by side.

    An image's score is the mean IoU over the classes in its label or its
    prediction, void left out; of a run that predicts depth alone it is the rmse of
    its depth. Depth, its label and its error stand below the classes. Several runs are also drawn side by side: the two
    best images and the worst, by the mean over the runs. A contact sheet has all pictures of a run, small.

    [dim]kdcache visualise runs/none runs/kl --data camvid --teacher teacher --out pictures[/]

    [dim]kdcache visualise runs/kl --teacher teacher --baseline runs/none --layout row --format pdf --out paper[/]
    """
    from kdcache.analysis.per_image import MIOU, RMSE
    from kdcache.analysis.visualise import VisualiseOptions
    from kdcache.analysis.visualise import visualise as visualise_runs
    from kdcache.heads import SEGMENTATION
    from kdcache.metrics import percent
    from kdcache.metrics.figures import Layout, check_formats
    from kdcache.metrics.tables import depth_figure

    names = tuple(name.strip() for name in (ids or "").split(",") if name.strip())
    part = shared_flags.parse_fold(fold, folds_by)
    if layout not in get_args(Layout):
        raise RecipeError("--layout is grid or row", received=repr(layout), remedy="use --layout row")
    options = VisualiseOptions(
        compare_flags.judging(settings),
        num,
        num,
        names,
        class_name,
        settings["teacher"],
        settings["baseline"],
        cast("Layout", layout),
        check_formats([name.strip() for name in formats.split(",")]),
        part,
        settings["smoke"],
    )
    with progress_of_steps("scoring") as report:
        made = visualise_runs(runs, settings["data"], settings["split"], out, options, report)
    every = [model.scores for model in made.shown.values()]
    of_classes, of_depth = any(SEGMENTATION in one.tasks for one in every), any(one.depth for one in every)
    headers = [*(["mIoU %", "mean of images %"] if of_classes else []), *(["rmse m"] if of_depth else [])]
    table = figure_table("folder", "shows", "images", *headers)
    table.columns[0].overflow = "fold"  # names of rows often differ at their end alone
    for name, model in made.shown.items():
        scores = model.scores.known(MIOU)
        mean = sum(scores) / len(scores) if scores else float("nan")
        miou = model.scores.metrics.miou if SEGMENTATION in model.scores.tasks else float("nan")
        cells = [percent(miou), percent(mean)] if of_classes else []
        rmse = float("nan") if model.scores.depth is None else model.scores.depth.rmse
        cells += [depth_figure(RMSE.name, rmse)] if of_depth else []
        table.add_row(name, ", ".join(model.heads), str(len(model.scores.images)), *cells)
    OUT.print(table)
    pictures = sum(path.suffix != ".txt" for path in made.files)
    OUT.print(f"[bold]{escape(str(out))}[/]: {pictures} pictures")
    for text in made.notes:
        ERRORS.print(f"note: {text}", markup=False, highlight=False)
