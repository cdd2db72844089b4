"""`kdcache predict`: classes and depth of images of no data set."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kdcache.settings.shared import ImageSettings, JudgeSettings, MachineSettings
from kdcache_cli.console import OUT, figure_table
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.model_flags import ClassesFolder, Model, Weights


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

    Writes an overlay and a label PNG for every image. The label's pixels are class ids,
    and its palette shows the class colours. A model with a depth head also writes the
    depth, and a coloured depth map with a bar in metres. All files have the image's own
    size, after its EXIF rotation. The model sees the image at --size. The default is
    the training size.

    [dim]kdcache predict runs/student photos --out predicted[/]
    [dim]kdcache predict runs/student photos --window 512x512 --stride 341x341 --out predicted[/]
    """
    from kdcache.verbs import predict as predict_images

    done = predict_images(
        run,
        images,
        out,
        depth_format=depth_format,
        weights=weights,
        size=size,
        fit=fit,
        window=window,
        stride=stride,
        classes=classes,
        batch_size=batch_size,
        threads=threads,
        device=device,
    )
    if done.pixels:
        table = figure_table("class", "pixels %")
        for name, pixels in done.pixels.items():
            table.add_row(name, f"{100 * pixels / sum(done.pixels.values()):.2f}")
        OUT.print(table)
    OUT.print(
        f"[bold]{done.images}[/] images: {', '.join(escape(str(path)) for path in done.folders)}", highlight=False
    )
