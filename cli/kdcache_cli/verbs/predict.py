"""`kdcache predict`: classes and depth of images of no data set."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kdcache.errors import RecipeError
from kdcache.settings.shared import ImageSettings, JudgeSettings, MachineSettings
from kdcache_cli.console import OUT, figure_table, progress_bar
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.model_flags import ClassesFolder, Model, Weights, open_model


def predict(
    run: Model,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Files, folders (with all below) or quoted patterns.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New or empty folder for labels/, overlays/, depth/.")],
    depth_format: Annotated[
        str | None,
        typer.Option("--depth-format", help="png (16 bits, its unit in depth.toml; the default) or npy (float32)."),
    ] = None,
    weights: Weights = JudgeSettings.weights,
    size: shared_flags.Size = None,
    fit: shared_flags.Fit = ImageSettings.fit,
    window: shared_flags.SlidingWindow = None,
    stride: shared_flags.Stride = None,
    classes: ClassesFolder = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")] = 4,
    threads: shared_flags.Threads = MachineSettings.threads,
    device: shared_flags.Device = MachineSettings.device,
) -> None:
    """Predict classes and depth of images that are in no data set.

    For every image a label PNG, whose pixels are class ids and whose palette shows
    their colours, and an overlay; of a model with a depth head its depth, and that
    in colours with a bar in metres. All are of the image's own size, upright as its
    camera meant it. The model sees the image at --size (default: the size that it
    was trained at).

    [dim]kdcache predict runs/student photos --out predicted[/]
    [dim]kdcache predict runs/student photos --window 512x512 --stride 341x341 --out predicted[/]
    """
    from kdcache.analysis.predict import (
        DEPTH_COLOURS,
        DEPTHS,
        LABELS,
        OVERLAYS,
        PredictOptions,
        find_images,
        predict_images,
    )
    from kdcache.data import DEPTH, SEGMENTATION, ClassList
    from kdcache.models.run import split_spec

    seen = {"fit": fit, "window": window, "stride": stride, "size": size}
    shared_flags.parse_framing(seen)  # what is wrong is refused before the model is read
    where = shared_flags.use_machine(threads, device)
    options = PredictOptions(depth_format or "png")
    inputs = find_images(images)
    model, description = open_model(run, size or (window if split_spec(run) else None), weights, classes)
    framing = shared_flags.parse_framing(seen, description.fit)
    has_depth, has_classes = DEPTH in model.learnt_heads, SEGMENTATION in model.learnt_heads
    if depth_format is not None and not has_depth:
        raise RecipeError(
            "--depth-format is for a model with a depth head",
            received=f"{run}, which has {', '.join(model.learnt_heads)}",
            remedy="leave it out, or give a model that predicts depth, such as one trained as MODEL+depth",
        )
    named = ClassList(description.class_names, description.class_colours)
    with progress_bar() as bar:
        task = bar.add_task("predicting", total=len(inputs), note="")
        pixels_C = predict_images(
            model,
            named,
            inputs,
            out,
            description.size,
            device=where,
            batch_size=batch_size,
            options=options,
            framing=framing,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if has_classes:
        table = figure_table("class", "pixels %")
        for number in sorted(range(len(named)), key=lambda number: -pixels_C[number]):
            table.add_row(named.names[number], f"{100 * pixels_C[number] / pixels_C.sum():.2f}")
        OUT.print(table)
    folders = [LABELS, OVERLAYS] * has_classes + [DEPTHS, DEPTH_COLOURS] * has_depth
    written = ", ".join(escape(f"{out}/{folder}") for folder in folders)
    OUT.print(f"[bold]{len(inputs)}[/] images: {written}", highlight=False)
