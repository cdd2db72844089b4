"""Flags that name a trained model."""

from pathlib import Path
from typing import Annotated

import typer

from kdcache.settings.shared import JudgeSettings
from kdcache_cli.settings.signature import flag

Model = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run folder, RUN@best-ema, SPEC@FILE (weights from elsewhere, or exported) or SPEC@default.",
    ),
]
Weights = Annotated[str, flag(JudgeSettings, "weights")]
ClassesFolder = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        help="Folder with classes.txt, the class names of a SPEC@FILE.",
    ),
]
