"""`kdcache export`: a trained model as a file to deploy."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from kdcache.settings.shared import JudgeSettings
from kdcache_cli.console import OUT, bytes_text
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.model_flags import ClassesFolder, Model, Weights


def export(
    run: Model,
    out: Annotated[Path, typer.Option("--out", help="New file: .safetensors, .onnx, .pt2, or .pt for Ultralytics.")],
    format: Annotated[
        str | None,
        typer.Option("--format", help="safetensors, onnx, torch.export or ultralytics (default: by --out's suffix)."),
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

    [bold].onnx[/] and [bold].pt2[/] (torch.export) are graphs. They take float32 RGB in
    0..1 (B, 3, H, W) and return logits (B, C, H, W). Normalisation and resize are inside.
    Batch and size are free if the model allows it. [bold].safetensors[/] holds only the
    weights, for SPEC@FILE. [bold].pt[/] is YOLO26's, for YOLO("best.pt").

    Every file has class names, colours, mean, std, size and spec. kdcache compares each
    file's outputs with the model before the file gets its name.

    [dim]kdcache export runs/student --out student.onnx[/]
    """
    from kdcache.verbs import export as export_model

    done = export_model(
        run, out, format=format, raw=raw, weights=weights, size=size, classes=classes, tolerance=tolerance
    )
    free = ", ".join(done.free)
    fixed = "" if len(done.free) == 3 else f" (traced at {done.size[0]}x{done.size[1]})"
    OUT.print(f"[bold]{escape(str(done.path))}[/]  {done.format}, {bytes_text(done.size_bytes)}", highlight=False)
    for note in done.notes:
        OUT.print(f"note        {escape(note)}", highlight=False)
    if done.format not in ("safetensors", "ultralytics"):
        OUT.print(f"free axes   {free or 'none'}{fixed}", highlight=False)
    if done.checked_by is None:
        OUT.print(f"[yellow]not checked[/]: {escape(done.unchecked)}", highlight=False)
        return
    OUT.print(
        f"checked by  {done.checked_by}: largest difference {done.difference:.2g}, "
        f"{done.relative:.2g} of the largest logit",
        highlight=False,
    )
