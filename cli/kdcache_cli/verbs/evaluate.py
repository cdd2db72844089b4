"""`kdcache evaluate`: a trained model on labelled images."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.display import public
from kdcache.settings import entries, read_value
from kdcache.settings.removed import VERBS, removal
from kdcache.settings.shared import DepthSettings, ImageSettings, JudgeSettings, MachineSettings
from kdcache.settings.training import Data
from kdcache_cli.console import OUT, figure_table, progress_bar, warn
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.model_flags import Weights, warn_of_weights
from kdcache_cli.settings.signature import flag

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.analysis.stored_evaluations import Record
    from kdcache.data import Split
    from kdcache.metrics import DepthRange, OnDataSet, TaskMetrics


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
    """mIoU, mAcc, aAcc and IoU per class, by mmsegmentation's convention; depth by KITTI's.

    Every task is judged that the model predicts and the split has labels of, at the
    labels' own size. Classes: one confusion matrix over the split, void left out.
    Depth: rmse, abs rel, silog and the like of each image, then their mean.
    A run's tables are written into its folder, those of SPEC@FILE into the current
    one; each kind (split, fold, weights, size, class map, depths) has files of its own.
    Several data sets are judged by the classes that each shares with the model, by
    name; a class map is to those of the first. evaluations-KIND.json has all of them.

    [dim]kdcache evaluate runs/student --data camvid[/]
    [dim]kdcache evaluate runs/student --data camvid --window 288x288 --stride 192x192[/]
    [dim]kdcache evaluate runs/student --data gta5:/data/gta5 --data cityscapes:/data/city[/]
    [dim]kdcache evaluate segformer:b2@weights.safetensors --data camvid --size 288x384[/]
    """
    from kdcache.analysis.runs import check_classes, unnamed_classes
    from kdcache.analysis.stored_evaluations import Record, data_digest, judged_range, weights_of
    from kdcache.data import ClassList, classes_by_name, fold_alone
    from kdcache.metrics import OnDataSet, evaluate_tasks
    from kdcache.models import not_logits
    from kdcache.models.run import open_model, split_spec
    from kdcache.run_folder import Run
    from kdcache.run_samples import judging_notes
    from kdcache.settings import read

    part = shared_flags.parse_fold(fold, folds_by)
    if (Path(run) / "pseudo-labels.json").is_file() and (gone := removal("evaluate of pseudo labels", VERBS)):
        raise gone
    seen = {"fit": fit, "window": window, "stride": stride, "size": size}
    shared_flags.parse_framing(seen)  # what is wrong is refused before data and model are read
    where = shared_flags.use_machine(threads, device)
    which = read_value(entries(JudgeSettings)["weights"], weights)
    sources = _open(data, split or [Data.val_split])
    several = len(sources) > 1
    depth = read(DepthSettings, {"min_depth": min_depth, "max_depth": max_depth, "depth_crop": depth_crop})
    classes = next((source.classes for source in sources if len(source.classes)), unnamed_classes)
    used_size = shared_flags.parse_size(size or (window if split_spec(run) else None))
    model, description = open_model(run, classes, used_size, which, class_map=class_map)
    warn_of_weights(model)
    framing = shared_flags.parse_framing(seen, description.fit)
    if not several:
        check_classes(description, sources[0].classes, data[0])
    if part is not None:
        sources = [fold_alone(source, *part) for source in sources]
    if several:
        own = ClassList(description.class_names, description.class_colours)
        sources = [classes_by_name(source, own) for source in sources]
    if listing is not None:
        _check_listing(sources, description.class_names)
    ranges = [judged_range(description.judged_heads, source, depth) for source in sources]
    results, records = [], []
    weights_name, weights_path = weights_of(run, which)
    with progress_bar() as bar:
        for source, depth_range in zip(sources, ranges, strict=True):
            task = bar.add_task("evaluating", total=len(source), note=source.data if several else "")
            metrics = evaluate_tasks(
                model.to(where),
                source,
                description.size,
                depth=None if depth_range is None and any(ranges) else depth,
                device=where,
                batch_size=batch_size,
                at_size=at_size,
                framing=framing,
                progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
            )
            results.append(OnDataSet.of(source, metrics))
            records.append(
                Record.of(
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
                    framing=framing,
                )
            )
    if several:
        _show_several(results, description.class_names, run)
    else:
        _show(results[0].metrics, run, ranges[0])
    for source in sources if weights_name is not None else ():
        for note in judging_notes(Run.open(run).folder, source):
            warn(f"{run}: {note}")
    if (finding := not_logits(model)) and any(one.metrics.segmentation is not None for one in results):
        warn(f"{run} {finding.text}: {finding.fix}")
    if several:
        _write_several(records, results, description.class_names, run, json_file, markdown, listing)
    else:
        _write(records[0], run, results[0].metrics, json_file, markdown, listing)


def _open(data: list[str], splits: list[str]) -> "list[Split]":
    """The data sets, each with its split. Raises: RecipeError for another number of splits."""
    from kdcache.data import open_split
    from kdcache.errors import RecipeError

    if len(splits) not in (1, len(data)):
        raise RecipeError(
            "--split is given once for all data, or once for each --data, in the same order",
            received=f"{len(splits)} splits ({', '.join(splits)}) for {len(data)} data sets",
            remedy="leave out some, or repeat one",
        )
    return [open_split(one, split) for one, split in zip(data, splits * (len(data) // len(splits)), strict=True)]


def _check_listing(sources: "list[Split]", class_names: tuple[str, ...]) -> None:
    """Refuse a listing of no class before the pass. Raises: RecipeError."""
    from kdcache.data import SEGMENTATION
    from kdcache.errors import RecipeError

    if not class_names or not any(SEGMENTATION in source.tasks for source in sources):
        raise RecipeError(
            "a listing is of the IoU of classes",
            received="a model without classes" if not class_names else "data without labels of segmentation",
            remedy="leave out --listing",
        )


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


def _show_several(results: "list[OnDataSet]", class_names: tuple[str, ...], run: str) -> None:
    from kdcache.metrics import at_chance
    from kdcache.metrics.data_sets import tables

    for header, rows in tables(results, class_names):
        table = figure_table(*header)
        for cells in rows:
            table.add_row(*cells)
        OUT.print(table)
    for one in results:
        for note in one.notes():
            OUT.print(note, markup=False, highlight=False)
        if one.metrics.segmentation is not None and (nothing := at_chance(one.metrics.segmentation)) is not None:
            warn(f"{run} on {one.data} {nothing}")


def _write(
    record: "Record",
    run: str,
    metrics: "TaskMetrics",
    json_file: Path | None,
    markdown: Path | None,
    listing: Path | None,
) -> None:
    from kdcache.analysis.stored_evaluations import IMAGES, file_name, write_evaluation
    from kdcache.metrics import iou_listing, metrics_markdown

    folder, own_size = _folder(record, run)
    name = file_name(record, folder, run, own_size=own_size)
    json_path, markdown_path = json_file or folder / f"{name}.json", markdown or folder / f"{name}.md"
    write_evaluation(record, json_path, run, metrics)
    title = f"{public(run)} on {record.data}, {name.removeprefix('evaluation-')}"
    markdown_path.write_text(metrics_markdown(title, metrics), encoding="utf-8")
    written = [json_path, json_path.with_suffix(IMAGES), markdown_path]
    if listing is not None and metrics.segmentation is not None:
        listing.write_text(iou_listing(metrics.segmentation), encoding="utf-8")
        written.append(listing)
    OUT.print(f"written: {', '.join(map(str, written))}", markup=False, highlight=False)


def _write_several(
    records: "list[Record]",
    results: "list[OnDataSet]",
    class_names: tuple[str, ...],
    run: str,
    json_file: Path | None,
    markdown: Path | None,
    listing: Path | None,
) -> None:
    from kdcache.analysis.stored_evaluations import name_of_several, write_evaluations
    from kdcache.metrics.data_sets import data_sets_markdown
    from kdcache.metrics.data_sets import listing as listing_of

    folder, own_size = _folder(records[0], run)
    name = name_of_several(records, run, own_size=own_size)
    json_path, markdown_path = json_file or folder / f"{name}.json", markdown or folder / f"{name}.md"
    results = [replace(one, data=public(one.data)) for one in results]
    write_evaluations(records, json_path, run, results)
    title = f"{public(run)} on {len(results)} data sets"
    markdown_path.write_text(data_sets_markdown(title, results, class_names), encoding="utf-8")
    written = [json_path, markdown_path]
    if listing is not None:
        listing.write_text(listing_of(results), encoding="utf-8")
        written.append(listing)
    OUT.print(f"written: {', '.join(map(str, written))}", markup=False, highlight=False)


def _folder(record: "Record", run: str) -> tuple[Path, bool]:
    """Where an evaluation is written, and whether its images have the size that the model was trained at."""
    from kdcache.run_folder import Run

    if record.which is None:
        return Path(), True
    opened = Run.open(run)
    return opened.folder, opened.model.size == record.size
