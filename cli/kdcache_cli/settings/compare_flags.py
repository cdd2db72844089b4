"""Flags of compare and report: which runs, on what data, how they are judged."""

from typing import Annotated

import typer

from kdcache.settings.shared import CompareSettings, DepthSettings, ImageSettings, JudgeSettings, MachineSettings

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
