"""`kdcache evaluate`: a trained model on labelled images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.settings import entries
from kdcache.settings.shared import DepthSettings, JudgeSettings, MachineSettings
from kdcache.settings.training import TrainSettings
from kdcache_cli.console import OUT, figure_table, progress_bar, warn
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.model_flags import Weights
from kdcache_cli.settings.signature import flag

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.analysis.stored_evaluations import Record
    from kdcache.metrics import DepthRange, TaskMetrics


def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run folder, RUN@best-ema, SPEC@FILE (weights from elsewhere) or SPEC@default (downloads).",
        ),
    ],
    data: shared_flags.Data,
    split: shared_flags.Split = TrainSettings.val_split,
    fold: shared_flags.Fold = None,
    folds_by: shared_flags.FoldsBy = None,
    weights: Weights = JudgeSettings.weights,
    class_map: Annotated[
        Path | None, typer.Option("--class-map", help="Which class of the data each class of the model becomes.")
    ] = None,
    size: shared_flags.Size = None,
    at_size: Annotated[
        bool, typer.Option("--at-size", help="Compare at the run's size instead of the labels' own.")
    ] = False,
    min_depth: Annotated[float, flag(DepthSettings, "min_depth")] = DepthSettings.min_depth,
    max_depth: Annotated[float | None, flag(DepthSettings, "max_depth")] = DepthSettings.max_depth,
    depth_crop: Annotated[str, flag(DepthSettings, "depth_crop")] = DepthSettings.depth_crop,
    batch_size: Annotated[int, flag(JudgeSettings, "batch_size")] = JudgeSettings.batch_size,
    threads: shared_flags.Threads = MachineSettings.threads,
    device: shared_flags.Device = MachineSettings.device,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="(default: evaluation-KIND.json in the run, else here)")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="(default: evaluation-KIND.md in the run, else here)")
    ] = None,
) -> None:
    """mIoU, mAcc, aAcc and IoU per class, by mmsegmentation's convention; depth by KITTI's.

    Every task is judged that the model predicts and the split has labels of, at the
    labels' own size. Classes: one confusion matrix over the split, void left out.
    Depth: rmse, abs rel, silog and the like of each image, then their mean.
    A run's tables are written into its folder, those of SPEC@FILE into the current
    one; each kind (split, fold, weights, size, class map, depths) has files of its own.

    [dim]kdcache evaluate runs/student --data camvid[/]
    [dim]kdcache evaluate segformer:b2@weights.safetensors --data camvid --size 288x384[/]
    """
    from kdcache.analysis.runs import check_classes, unnamed_classes
    from kdcache.analysis.stored_evaluations import Record, data_digest, judged_range, weights_of
    from kdcache.data import fold_alone, open_split
    from kdcache.metrics import evaluate_tasks
    from kdcache.models import PROBABILITIES, returns_probabilities
    from kdcache.models.run import open_model
    from kdcache.settings import read

    where = shared_flags.use_machine(threads, device)
    which = entries(JudgeSettings)["weights"].read(weights)
    source = open_split(data, split)
    depth = read(DepthSettings, {"min_depth": min_depth, "max_depth": max_depth, "depth_crop": depth_crop})
    classes = source.classes if len(source.classes) else unnamed_classes
    model, description = open_model(run, classes, shared_flags.parse_size(size), which, class_map=class_map)
    check_classes(description, source.classes, data)
    part = shared_flags.parse_fold(fold, folds_by)
    if part is not None:
        source = fold_alone(source, *part)
    with progress_bar() as bar:
        task = bar.add_task("evaluating", total=len(source), note="")
        metrics = evaluate_tasks(
            model.to(where),
            source,
            description.size,
            depth=depth,
            device=where,
            batch_size=batch_size,
            at_size=at_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    depth_range = judged_range(description.judged_heads, source, depth)
    _show(metrics, run, depth_range)
    if metrics.segmentation is not None and returns_probabilities(model):
        warn(f"{run} {PROBABILITIES}")
    weights_name, weights_path = weights_of(run, which)
    record = Record.of(
        description,
        weights_path,
        source,
        data_digest(source),
        description.size,
        which=weights_name,
        fold=part,
        at_size=at_size,
        class_map=class_map,
        depth=depth_range,
    )
    _write(record, run, metrics, json_file, markdown)


def _show(metrics: "TaskMetrics", run: str, depth_range: "DepthRange | None") -> None:
    from kdcache.metrics import at_chance, class_rows, percent
    from kdcache.metrics.tables import depth_rows

    if (classes := metrics.segmentation) is not None:
        table = figure_table("class", "IoU %", "Acc %", "pixels %")
        for row in class_rows(classes):
            table.add_row(*row)
        OUT.print(table)
        OUT.print(f"[bold]mIoU {percent(classes.miou)}[/]  mAcc {percent(classes.macc)}  aAcc {percent(classes.aacc)}")
        if (nothing := at_chance(classes)) is not None:
            warn(f"{run} {nothing}")
    if (depth := metrics.depth) is not None:
        table = figure_table("depth", "mean of images")
        for cells in depth_rows(depth):
            table.add_row(*cells)
        OUT.print(table)
        OUT.print(f"[bold]rmse {depth.rmse:.4g} m[/]  {depth.counted_images} images, labels of {depth_range}")


def _write(record: "Record", run: str, metrics: "TaskMetrics", json_file: Path | None, markdown: Path | None) -> None:
    from kdcache.analysis.stored_evaluations import IMAGES, file_name, write_evaluation
    from kdcache.metrics import metrics_markdown
    from kdcache.run_folder import Run

    folder, own_size = Path(), True
    if record.which is not None:
        opened = Run.open(run)
        folder, own_size = opened.folder, opened.model.size == record.size
    name = file_name(record, folder, run, own_size=own_size)
    json_path, markdown_path = json_file or folder / f"{name}.json", markdown or folder / f"{name}.md"
    write_evaluation(record, json_path, run, metrics)
    title = f"{run} on {record.data}, {name.removeprefix('evaluation-')}"
    markdown_path.write_text(metrics_markdown(title, metrics), encoding="utf-8")
    written = ", ".join(map(str, (json_path, json_path.with_suffix(IMAGES), markdown_path)))
    OUT.print(f"written: {written}", markup=False, highlight=False)
