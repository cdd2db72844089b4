"""The machine that figures come from."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's model as the system names it, "unknown" where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
