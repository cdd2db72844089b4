"""`kdcache predict`: images of no data set, segmented."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kdcache.settings.shared import JudgeSettings, MachineSettings
from kdcache_cli.console import OUT, figure_table, progress_bar
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.model_flags import ClassesFolder, Model, Weights, open_model


def predict(
    run: Model,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, folders (with all below) or quoted patterns.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New or empty folder for labels/, overlays/ and classes.txt.")],
    opacity: Annotated[
        float, typer.Option("--opacity", min=0.0, max=1.0, help="Opacity of the classes' colours over the image.")
    ] = 0.5,
    weights: Weights = JudgeSettings.weights,
    size: shared_flags.Size = None,
    classes: ClassesFolder = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")] = 4,
    threads: shared_flags.Threads = MachineSettings.threads,
    device: shared_flags.Device = MachineSettings.device,
) -> None:
    """Segment images that are in no data set.

    For every image a label PNG, whose pixels are class ids and whose palette shows
    their colours, and an overlay, both of the image's own size, upright as its
    camera meant it. The model sees the image at --size (default: the size that it
    was trained at).

    [dim]kdcache predict runs/student photos --out predicted[/]
    """
    from kdcache.analysis.predict import find_images, predict_images
    from kdcache.data import ClassList

    where = shared_flags.use_machine(threads, device)
    inputs = find_images(images)
    model, description = open_model(run, size, weights, classes)
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
            opacity=opacity,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    table = figure_table("class", "pixels %")
    for number in sorted(range(len(named)), key=lambda number: -pixels_C[number]):
        table.add_row(named.names[number], f"{100 * pixels_C[number] / pixels_C.sum():.2f}")
    OUT.print(table)
    OUT.print(f"[bold]{len(inputs)}[/] images: {escape(str(out))}/labels, {escape(str(out))}/overlays", highlight=False)
