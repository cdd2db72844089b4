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
from kdcache.data import Split
from kdcache.distill import DistillLoss
from kdcache.models import build_model
from kdcache.store import Cache
from kdcache.teacher import BuildOptions, Teacher, build_cache
from kdcache.training import make_config
from kdcache.training.run.metrics_log import environment
from kdcache.training.step.eager import EagerStep
from kdcache.training.step.optim import make_optimizer

RESULTS = Path(__file__).parent / "results"


def header(theme: str) -> dict[str, Any]:
    """Return the first keys of a result file. Paths are cut to their names: folders on this machine are private."""
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    command = "python " + shlex.join([os.path.relpath(sys.argv[0]), *words])
    return bench_header(theme, command, environment())


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result as a JSON file, make its folder if need be, and print the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return p20, p50 and p80 of repeated measurements."""
    ordered = sorted(values)
    pick = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]  # noqa: E731
    return {"p20": pick(0.2), "p50": statistics.median(ordered), "p80": pick(0.8)}


def random_cache(split: Split, spec: str, folder: Path, options: BuildOptions) -> Path:
    """Build a cache by a teacher with random weights: for speed, what is in it does not matter."""
    torch.manual_seed(0)
    teacher = Teacher(build_model(spec, len(split.classes)).eval(), f"random {spec}")
    build_cache(split, teacher, folder, options)
    return folder


def student_step(
    cache: Cache,
    spec: str,
    device: torch.device,
    *,
    kl_weight: float = 1.0,
    impl: str = "auto",
    capturable: bool = False,
) -> EagerStep:
    """Return the eager step of `train-student --method kl` with fresh weights, the same each time."""
    config = make_config(verb="train-student", model=spec, cache=str(cache.path), method="kl")
    torch.manual_seed(0)
    model = build_model(spec, cache.num_classes).to(device).train().to(memory_format=torch.channels_last)
    criterion = DistillLoss(cache, kl_weight=kl_weight, impl=impl, align_corners=model.align_corners).to(device)
    optimizer = make_optimizer(model, config.optimizer, capturable=capturable)
    return EagerStep(model, criterion, optimizer, device=device, bf16=device.type == "cuda")


def synchronise(device: torch.device) -> None:
    """Wait until a CUDA device is idle; do nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize()
