"""`kdcache evaluate`: a trained model on labelled images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.settings.shared import DepthSettings, ImageSettings, JudgeSettings, MachineSettings
from kdcache.settings.training import Data
from kdcache.tasks import DEPTH, SEGMENTATION
from kdcache_cli.console import OUT, figure_table
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.model_flags import Weights
from kdcache_cli.settings.signature import flag

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.verbs.evaluate import Evaluated


def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run folder, RUN@best-ema, SPEC@FILE (weights from elsewhere) or SPEC@default (downloads).",
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            help="Data folder or LAYOUT:DIR. Repeat it for one table over all.",
        ),
    ],
    split: Annotated[
        list[str] | None,
        typer.Option("--split", help=f"Which split (default: {Data.val_split}); one for all data, or for each."),
    ] = None,
    fold: shared_flags.Fold = None,
    folds_by: shared_flags.FoldsBy = None,
    weights: Weights = JudgeSettings.weights,
    class_map: Annotated[
        Path | None, typer.Option("--class-map", help="Which class of the data each class of the model becomes.")
    ] = None,
    size: shared_flags.Size = None,
    fit: shared_flags.Fit = ImageSettings.fit,
    window: shared_flags.SlidingWindow = None,
    stride: shared_flags.Stride = None,
    at_size: Annotated[
        bool, typer.Option("--at-size", help="Compare at the run's size instead of the labels' own.")
    ] = False,
    min_depth: Annotated[float, flag(DepthSettings, "min_depth")] = DepthSettings.min_depth,
    max_depth: Annotated[float | None, flag(DepthSettings, "max_depth")] = DepthSettings.max_depth,
    depth_crop: Annotated[str, flag(DepthSettings, "depth_crop")] = DepthSettings.depth_crop,
    batch_size: Annotated[int, flag(JudgeSettings, "batch_size")] = JudgeSettings.batch_size,
    fresh: Annotated[bool, flag(JudgeSettings, "fresh")] = JudgeSettings.fresh,
    threads: shared_flags.Threads = MachineSettings.threads,
    device: shared_flags.Device = MachineSettings.device,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="(default: evaluation-KIND.json in the run, else here)")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="(default: evaluation-KIND.md in the run, else here)")
    ] = None,
    listing: Annotated[
        Path | None, typer.Option("--listing", help="Write IoU as plain text too, a line per class: ===>road: 65.35.")
    ] = None,
) -> None:
    """Measure mIoU, mAcc, aAcc and IoU per class by mmsegmentation's convention, and depth by KITTI's.

    Measures each task that the model predicts and the split has labels for, at the
    labels' own size. Classes: one confusion matrix over the split, without void pixels.
    Depth: rmse, abs rel, silog and others for each image, then their mean.

    A run's tables go into its folder. Tables of SPEC@FILE go into the current folder.
    KIND in a file's name tells split, fold, weights, size and other options, so that
    evaluations with different options do not replace each other.

    Several data sets are evaluated one by one, each over the classes whose names the
    model has. A class map must map to the classes of the first data set.
    One more file, evaluations-KIND.json, then has all results.

    [dim]kdcache evaluate runs/student --data camvid[/]
    [dim]kdcache evaluate runs/student --data camvid --window 288x288 --stride 192x192[/]
    [dim]kdcache evaluate runs/student --data gta5:/data/gta5 --data cityscapes:/data/city[/]
    [dim]kdcache evaluate segformer:b2@weights.safetensors --data camvid --size 288x384[/]
    """
    from kdcache.verbs import evaluate as evaluate_model

    done = evaluate_model(
        run,
        data,
        split=split,
        fold=fold,
        folds_by=folds_by,
        weights=weights,
        class_map=class_map,
        size=size,
        fit=fit,
        window=window,
        stride=stride,
        at_size=at_size,
        min_depth=min_depth,
        max_depth=max_depth,
        depth_crop=depth_crop,
        batch_size=batch_size,
        fresh=fresh,
        threads=threads,
        device=device,
        json_file=json_file,
        markdown=markdown,
        listing=listing,
        folder=Path(),
    )
    if len(done.data_sets) > 1:
        _show_several(done)
    else:
        _show(done)
    if done.reused:
        OUT.print("weights and data are those of an earlier evaluation: --fresh evaluates again", highlight=False)
    OUT.print(f"written: {', '.join(map(str, done.files))}", markup=False, highlight=False)


def _show(done: "Evaluated") -> None:
    from kdcache.metrics.evaluators import EVALUATORS

    for task, metrics in done.metrics.by_task.items():
        _, (header, rows) = EVALUATORS[task].table(metrics)
        table = figure_table(*header)
        for cells in rows:
            table.add_row(*cells)
        OUT.print(table)
        if task in _SUMMARIES:
            OUT.print(_SUMMARIES[task](done))


def _of_classes(done: "Evaluated") -> str:
    from kdcache.metrics import percent

    metrics = done.segmentation
    return (
        ""
        if metrics is None
        else f"[bold]mIoU {percent(metrics.miou)}[/]  mAcc {percent(metrics.macc)}  aAcc {percent(metrics.aacc)}"
    )


def _of_depth(done: "Evaluated") -> str:
    metrics = done.depth
    images = "" if metrics is None else f"[bold]rmse {metrics.rmse:.4g} m[/]  {metrics.counted_images} images"
    return f"{images}, labels of {done.depth_range}"


_SUMMARIES = {SEGMENTATION: _of_classes, DEPTH: _of_depth}
"""The line below the table of a task."""


def _show_several(done: "Evaluated") -> None:
    from kdcache.metrics.data_sets import tables

    for header, rows in tables(done.data_sets, done.class_names):
        table = figure_table(*header)
        for cells in rows:
            table.add_row(*cells)
        OUT.print(table)
    for data_set in done.data_sets:
        for note in data_set.notes():
            OUT.print(note, markup=False, highlight=False)
