"""Flags that name a trained model, and opening what they name."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcache.errors import RecipeError
from kdcache.settings import entries, read_value
from kdcache.settings.shared import JudgeSettings
from kdcache_cli.console import warn
from kdcache_cli.settings import shared_flags
from kdcache_cli.settings.signature import flag

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.models import SegmentationModel
    from kdcache.run_folder import RunModel

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


def open_model(run: str, size: str | None, weights: str, classes: Path | None) -> "tuple[SegmentationModel, RunModel]":
    """The model of a run or of SPEC@FILE, and its description. Raises: RecipeError, ModelError, MismatchError."""
    from kdcache.analysis.runs import unnamed_classes
    from kdcache.data.classes import read_classes
    from kdcache.models import not_logits
    from kdcache.models import run as runs

    which = read_value(entries(JudgeSettings)["weights"], weights)
    named = None if classes is None else read_classes(classes)
    if named is not None and runs.split_spec(run) is None:
        raise RecipeError(
            "a run knows its classes", received=f"--classes {classes} with the run {run}", remedy="leave out --classes"
        )
    model, description = runs.open_model(run, named or unnamed_classes, shared_flags.parse_size(size), which)
    if named is not None:
        description.check_classes(named.names, str(classes))
    warn_of_weights(model)
    if (finding := not_logits(model, description.size)) is not None:
        warn(f"{run} {finding.text}: {finding.fix}")
    return model, description


def warn_of_weights(model: "SegmentationModel") -> None:
    """Print what a user should know of the file of weights that a model was made of."""
    for note in () if model.load_report is None else model.load_report.notes:
        warn(note)
