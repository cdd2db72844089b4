"""The logs of a run (`metrics.jsonl`, `environment.json`, `result.json`) and its observers."""

import json
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kdcache.bounded import parse_json, read_bytes
from kdcache.files import write_whole
from kdcache.metrics.evaluators import TaskMetric
from kdcache.run_folder import METRICS, MOST_LOG_BYTES, no_log
from kdcache.store.backend.durable import disk_space_errors
from kdcache.training.feature_validation import FeatureScore

Score = TaskMetric | FeatureScore
"""The score of a validation."""


class Observer:
    """Receives the progress of a training. Override any of its methods. The command line's progress is an observer."""

    def started(self, *, step: int, iterations: int, parameters: int) -> None:
        """Handle the start of training, or its resume at `step`."""

    def note(self, text: str) -> None:
        """Receive a note about this run for its user."""

    def advanced(self, step: int) -> None:
        """Receive the number of a finished step, from 1. Called at every step, for a progress bar."""

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """Receive a step's values every `log_every` steps: loss, its terms, lr, images_per_second, wait_share.

        If pseudo labels come from weak views, the values include weak_view_seconds.
        """

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        """Receive L2 norms of each weighted term's gradient over the student, every `gradients_every` steps."""

    def balanced(self, step: int, tasks: dict[str, dict[str, float]]) -> None:
        """Receive loss and weight of each of two tasks after `stepped`, and after `gradients` also norm and ratio.

        The norm is of the task's gradient over the parameters that both tasks reach. The ratio is to the other task's.
        """

    def validating(self, done: int, total: int) -> None:
        """Receive the number of images validated so far."""

    def validated(self, step: int, task: str, score: Score, *, best: bool, ema: bool) -> None:
        """Receive the score of a task in a validation, or the feature score (`features`) in trainings with `val_share`.

        `best`: no earlier one was better, by the task that chooses the best weights. `ema`: the score is of the
        weights' moving average, and follows the model's own scores.
        """

    def ended(self, *, completed: bool) -> None:
        """Handle the end of the training: completed, or stopped by an error or by the user."""


def _of_all(name: str) -> Any:
    """Return a method that calls the method `name` of each of several observers."""

    def call(self: "Observers", *values: Any, **named: Any) -> None:
        for observer in self.several:
            getattr(observer, name)(*values, **named)

    return call


class Observers(Observer):
    """Several observers as one, called in their order."""

    def __init__(self, several: Sequence[Observer]) -> None:
        self.several = tuple(several)

    started = _of_all("started")
    note = _of_all("note")
    advanced = _of_all("advanced")
    stepped = _of_all("stepped")
    gradients = _of_all("gradients")
    balanced = _of_all("balanced")
    validating = _of_all("validating")
    validated = _of_all("validated")
    ended = _of_all("ended")


class MetricsLog:
    """Appends to metrics.jsonl. On resume, it drops lines after the checkpoint. NaN and infinity become null.

    Raises: RecipeError for a log that cannot be read.
    """

    def __init__(self, run: Path, step: int) -> None:
        path = run / METRICS
        try:
            lines = read_bytes(path, MOST_LOG_BYTES).decode(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        except (OSError, ValueError) as error:
            raise no_log(path, str(error)) from error
        lines_before = [line for line in lines if _step(line) <= step]
        self._run = run
        with disk_space_errors(run):
            write_whole(path, "".join(f"{line}\n" for line in lines_before))
            self.file = path.open("ab", buffering=0)  # what does not fit is not tried again when it is closed

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a line of this kind with the step and its values. Raises: StoreError for a full disk."""
        line = json.dumps({"kind": kind, "step": step, **_finite(values)}).encode() + b"\n"
        with disk_space_errors(self._run):
            while line:  # a disk that is nearly full takes a part of it, and nothing the next time
                line = line[self.file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with None for those that are not finite, at any depth of mappings."""
    nested = {name: _finite(value) for name, value in values.items() if isinstance(value, dict)}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()} | nested


def environment() -> dict[str, Any]:
    """Return the machine and library versions, for repeating a run."""
    packages = ("kdcache", "torch", "torchvision", "triton", "zarr", "numcodecs", "numba", "numpy", "pillow")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write content as indented JSON, completely or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _step(line: str) -> int:
    """Return the step of a line. A line cut short by a kill counts as later than everything."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 2**63
