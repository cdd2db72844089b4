"""Flags of compare, report and visualise: which runs, on what data, how they are judged."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.settings import read
from kdcache.settings.shared import CompareSettings, DepthSettings, ImageSettings, JudgeSettings, MachineSettings
from kdcache_cli.settings import shared_flags

if TYPE_CHECKING:  # the verbs import what they need: --help must not wait for torch
    from kdcache.analysis.compare import CompareOptions
    from kdcache.analysis.stored_evaluations import Judging

TABLES = (ImageSettings, CompareSettings, JudgeSettings, DepthSettings, MachineSettings)
Runs = Annotated[
    list[str], typer.Argument(help="Run folders, folders that hold runs, RUN@best-ema, or SPEC@FILE.", metavar="RUN...")
]
ROWS = ("data", "split", "teacher", "baseline", "ignore", "blocks_by", "own_fold")
DEPTH = ("min_depth", "max_depth", "depth_crop")
JUDGING = ("weights", "size", *DEPTH, "batch_size", "repeats", "threads", "device", "fresh", "smoke")


def judging(settings: Mapping[str, Any]) -> "Judging":
    """How runs are evaluated; sets torch's threads. Raises: RecipeError for a value that is none."""
    from kdcache.analysis.stored_evaluations import Judging

    judge, size = read(JudgeSettings, settings), shared_flags.parse_size(settings["size"])
    device = shared_flags.use_machine(settings["threads"], settings["device"])
    return Judging(judge.weights, size, judge.batch_size, str(device), judge.fresh, read(DepthSettings, settings))


def compare_options(settings: Mapping[str, Any]) -> "CompareOptions":
    """How runs are compared. Raises: RecipeError for a value that is none."""
    from kdcache.analysis.compare import CompareOptions

    rows = read(CompareSettings, settings)
    return CompareOptions(
        judging(settings),
        rows.teacher,
        rows.baseline,
        rows.ignore,
        rows.blocks_by,
        rows.own_fold,
        settings["repeats"],
        rows.smoke,
    )
