"""The header of every result: theme, date, commit, command, machine.

A number without its machine and commit cannot be reproduced, so no result is written without them.
"""

import datetime
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from kdcache.metrics.timing import cpu_name


def header(theme: str, command: str, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dict with which a result file begins: "theme", "date", "commit", "command" and "machine".

    Args:
        theme: what was measured, in one word.
        command: the command that the user typed.
        environment: library versions and thread counts, to store under "machine". They are from
            `kdcache.training.run.metrics_log.environment`.
    """
    memory_gib = round(psutil.virtual_memory().total / 2**30, 1)
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gib": memory_gib, **environment}
    if torch.cuda.is_available():
        machine |= _gpu()
    return {
        "theme": theme,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "command": command,
        "machine": machine,
    }


def _commit() -> str:
    """Return the commit of this file's tree. An installed copy may lie in the tree of another project."""
    here = Path(__file__)
    try:
        for words in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty"]):
            done = subprocess.run(
                ["git", "-C", str(here.parent), *words], capture_output=True, text=True, check=True, timeout=10
            )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
