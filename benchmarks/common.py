"""The header of every result file: theme, machine, commit, date, command."""

import json
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdcache.bench.header import header as bench_header
from kdcache.training.run.metrics_log import environment

RESULTS = Path(__file__).parent / "results"


def header(theme: str) -> dict[str, Any]:
    """The first keys of a result file. Where folders lie on one machine is nobody's business: their names stay."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    command = "python " + shlex.join([os.path.relpath(sys.argv[0]), *words])
    return bench_header(theme, command, environment())


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of repeated measurements."""
    ordered = sorted(values)
    pick = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]  # noqa: E731
    return {"p20": pick(0.2), "p50": statistics.median(ordered), "p80": pick(0.8)}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
