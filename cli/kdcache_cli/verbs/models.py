"""`kdcache models`: what can teach and learn."""

import json as json_module
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from kdcache.errors import ModelError
from kdcache.model_table import list_models, missing_models
from kdcache_cli.console import OUT

_NOTES = (
    "Yours: [bold]module:function[/] or [bold]path/to/file.py:function[/], called with num_classes=...",
    "[bold]MODEL+depth[/] adds a depth head. In MODEL+depth,tap=NAME,as=exp,max=10, tap is its input (default: the "
    "last tap), as is softplus (default) or exp, and max is the largest depth in metres (default: 80).",
    "smp: any ARCH-ENCODER of segmentation_models_pytorch, also with tu-ENCODER of timm.",
    "timm: any NAME of timm, as a backbone. [bold]kdcache models timm:NAME[/] lists its taps.",
    "Weights 'default' of segformer:* and of mit_* encoders are NVIDIA's: for research, not for commerce.",
)

_OPEN = ("smp:", "timm:")
"""Families with more models than the table lists."""


def models(
    pattern: Annotated[
        str, typer.Argument(help="A part of the names, or one spec: timm:resnet18.", show_default=False)
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List model specs: parameters, native stride, feature taps.

    For your own model, give [bold]module:function[/] or [bold]path/to/file.py:function[/]. The function takes
    num_classes and returns a torch module. Nothing is downloaded.
    """
    infos, missing = list_models(pattern), missing_models(pattern)
    if not infos and not missing and pattern.startswith(_OPEN) and pattern not in _OPEN:
        from kdcache.models.registry import describe_model

        infos = [describe_model(pattern)]
    if not infos and not missing and not pattern.startswith(("timm", "hf")):
        raise ModelError(f"No model matches {pattern!r}", fix="List all names: kdcache models")
    if json:
        rows = [
            {
                "spec": info.spec,
                "parameters": info.parameters,
                "stride": info.stride,
                "align_corners": info.align_corners,
                "heads": list(info.heads),
                "taps": {tap: {"channels": t.channels, "stride": t.stride} for tap, t in info.taps.items()},
            }
            for info in infos
        ]
        rows += [{"spec": spec, "install": command} for command, specs in missing.items() for spec in specs]
        typer.echo(json_module.dumps(rows, indent=1))
        return
    table = Table("spec", "parameters", "stride", "taps (channels @ stride)", box=None, header_style="dim")
    table.columns[0].no_wrap = True
    table.columns[1].justify = table.columns[2].justify = "right"
    for info in infos:
        taps = ", ".join(
            f"{tap} {t.channels}" if tap == "summary" else f"{tap} {t.channels}@{t.stride}"
            for tap, t in info.taps.items()
        )
        table.add_row(info.spec, f"{info.parameters / 1e6:.2f} M", str(info.stride) if info.heads else "-", taps)
    if infos:
        OUT.print(table)
    for command, specs in missing.items():
        OUT.print(f"\nWith {escape(command)}:\n  {escape(', '.join(specs))}", highlight=False)
    OUT.print("\n" + "\n".join(_NOTES))
