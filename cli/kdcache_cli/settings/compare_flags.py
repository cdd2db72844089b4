"""Flags of compare and report: which runs, on what data, how they are judged."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.settings.shared import CompareSettings, DepthSettings, ImageSettings, JudgeSettings, MachineSettings

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.analysis.compare import CompareOptions
    from kdcache.analysis.stored_evaluations import EvalSettings

TABLES = (ImageSettings, CompareSettings, JudgeSettings, DepthSettings, MachineSettings)
Runs = Annotated[
    list[str], typer.Argument(help="Run folders, folders that hold runs, RUN@best-ema, or SPEC@FILE.", metavar="RUN")
]
ROWS = ("data", "split", "teacher", "baseline", "blocks_by", "own_fold")
FRAMING = ("size", "fit", "window", "stride")
DEPTH = ("min_depth", "max_depth", "depth_crop")
JUDGING = ("weights", *FRAMING, *DEPTH, "batch_size", "repeats", "threads", "device", "fresh", "smoke")
COMMON = ("runs", *ROWS, "weights", "size", "window", "threads", "device", "fresh")
"""Flags that -h shows of both verbs."""


def judging(settings: Mapping[str, Any]) -> "EvalSettings":
    """How runs are evaluated; sets torch's threads. Raises: RecipeError for a value that is none."""
    from kdcache.verbs.compare import judging_of

    return judging_of(settings)


def compare_options(settings: Mapping[str, Any]) -> "CompareOptions":
    """How runs are compared. Raises: RecipeError for a value that is none."""
    from kdcache.verbs.compare import options_of

    return options_of(settings)
