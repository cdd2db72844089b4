"""`kdcache export` and `kdcache predict`: a trained model put to use."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kdcache.errors import RecipeError
from kdcache.settings import entries
from kdcache.settings.shared import JudgeSettings, MachineSettings
from kdcache_cli.console import OUT, bytes_text, progress_bar
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.models import SegmentationModel
    from kdcache.run_folder import RunModel

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run folder, SPEC@FILE (weights trained or exported elsewhere) or SPEC@default."
    ),
]
Weights = Annotated[str, typer.Option("--weights", help="Of a run: best or last.")]
ClassesFolder = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        help="Folder with a classes.txt, which names the classes of a SPEC@FILE (default: what the file says of them, "
        "or numbers).",
    ),
]


def export(
    run: Model,
    out: Annotated[Path, typer.Option("--out", help="New file: .safetensors, .onnx or .pt2.")],
    format: Annotated[
        str | None,
        typer.Option("--format", help="safetensors, onnx or torch.export (default: by the suffix of --out)."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Logits at the native stride, without the resize to the image's size.")
    ] = False,
    weights: Weights = JudgeSettings.weights,
    size: shared_flags.Size = None,
    classes: ClassesFolder = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0.0, help="Largest difference from the model, by its largest logit.")
    ] = 1e-4,
) -> None:
    """Write a model for deployment and check it.

    [bold].onnx[/] and [bold].pt2[/] (torch.export) are graphs: float32 RGB in 0..1
    (B, 3, H, W) in, logits (B, C, H, W) out, the normalisation and the resize
    inside, any batch and size where the model allows it.
    [bold].safetensors[/] holds the weights alone, for SPEC@FILE. Class names and
    colours, mean, std, size and spec travel in all of them. What was written is
    run beside the model before it gets its name.

    [dim]kdcache export runs/student --out student.onnx[/]
    """
    from kdcache.models.export import export_model

    model, about = _open(run, size, weights, classes)
    done = export_model(model, about, out, format=format, raw=raw, tolerance=tolerance)
    free = ", ".join(done.free)
    fixed = "" if len(done.free) == 3 else f" (traced at {about.size[0]}x{about.size[1]})"
    OUT.print(f"[bold]{escape(str(done.path))}[/]  {done.format}, {bytes_text(done.size_bytes)}", highlight=False)
    if done.format != "safetensors":
        OUT.print(f"free axes   {free or 'none'}{fixed}", highlight=False)
    if done.checked_by is None:
        OUT.print(f"[yellow]not checked[/]: {escape(done.unchecked)}", highlight=False)
        return
    OUT.print(
        f"checked by  {done.checked_by}: largest difference {done.difference:.2g}, "
        f"{done.relative:.2g} of the largest logit",
        highlight=False,
    )


def predict(
    run: Model,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, folders (with all below) or quoted patterns.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New or empty folder for labels/, overlays/ and classes.txt.")],
    opacity: Annotated[
        float, typer.Option("--opacity", min=0.0, max=1.0, help="Of the classes' colours over the image.")
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
    import torch

    from kdcache.analysis.predict import find_images, predict_images
    from kdcache.data import ClassList
    from kdcache.train import pick_device

    if threads:
        torch.set_num_threads(threads)
    found = find_images(images)
    model, about = _open(run, size, weights, classes)
    named = ClassList(about.class_names, about.class_colours)
    with progress_bar() as bar:
        task = bar.add_task("predicting", total=len(found), note="")
        pixels_C = predict_images(
            model,
            named,
            found,
            out,
            about.size,
            device=pick_device(device),
            batch_size=batch_size,
            opacity=opacity,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    table = Table("class", "pixels %", box=None, header_style="dim")
    table.columns[1].justify = "right"
    for number in sorted(range(len(named)), key=lambda number: -pixels_C[number]):
        table.add_row(named.names[number], f"{100 * pixels_C[number] / pixels_C.sum():.2f}")
    OUT.print(table)
    OUT.print(f"[bold]{len(found)}[/] images: {escape(str(out))}/labels, {escape(str(out))}/overlays", highlight=False)


def _open(run: str, size: str | None, weights: str, classes: Path | None) -> "tuple[SegmentationModel, RunModel]":
    from kdcache.analysis.predict import unnamed_classes
    from kdcache.data.classes import read_classes
    from kdcache.models.run import open_model, split_spec

    chosen = entries(JudgeSettings)["weights"].read(weights)
    named = None if classes is None else read_classes(classes)
    if named is not None and split_spec(run) is None:
        raise RecipeError(
            "a run knows its classes", received=f"--classes {classes} with the run {run}", remedy="leave out --classes"
        )
    model, about = open_model(run, named or unnamed_classes, shared_flags.parse_size(size), chosen)
    if named is not None:
        about.check_classes(named.names, str(classes))
    return model, about
