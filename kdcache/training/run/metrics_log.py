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
    """Receives the progress of a training. Override any of its methods: by default they do nothing."""

    def started(self, *, step: int, iterations: int, parameters: int) -> None:
        """Receive the start of the training.

        Args:
            step: the number of finished steps, above 0 if the training resumes.
            iterations: the number of steps of the whole training.
            parameters: the number of the model's parameters.
        """

    def note(self, text: str) -> None:
        """Receive a note for the user, one line of text. A warning begins with `warning: `."""

    def advanced(self, step: int) -> None:
        """Receive the number of finished steps. It is called after every step, for a progress bar."""

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """Receive a step's values, every `log_every` steps.

        `values` has name -> number: `loss`, the loss terms, `lr`, `images_per_second` and `wait_share` (the share of
        time spent waiting for data). With pseudo labels of weak views it also has `weak_view_seconds`.
        """

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        """Receive gradient norms, every `gradients_every` steps.

        `norms` has name of a loss term -> the L2 norm of its weighted gradient over the model's parameters.
        """

    def balanced(self, step: int, tasks: dict[str, dict[str, float]]) -> None:
        """Receive values of each task, if the losses of two tasks are balanced.

        `tasks` has task -> (name -> number). In a call that follows `stepped`, the names are `loss` and
        `weight`. In a call that follows `gradients`, they are `loss`, `weight`, `norm` and `ratio`. The norm is of the
        task's gradient over the parameters that both tasks change. The ratio is this norm divided by the other task's.
        """

    def validating(self, done: int, total: int) -> None:
        """Receive the progress of a validation: `done` of `total` images are validated."""

    def validated(self, step: int, task: str, score: Score, *, best: bool, ema: bool) -> None:
        """Receive the score of a validation.

        Args:
            step: the number of finished steps.
            task: `segmentation`, `depth`, or `features` for the feature loss of held-out samples (`--val-share`).
            score: the score of the task.
            best: True if the score's weights are the best so far. Only the task that chooses the best weights sets it.
            ema: True if the score is of the weights' moving average. This call follows the call for the weights.
        """

    def ended(self, *, completed: bool) -> None:
        """Receive the end of the training. `completed` is False if an error or the user stopped it."""


def _of_all(name: str) -> Any:
    """Return a method that calls the method `name` of each observer."""

    def call(self: "Observers", *values: Any, **named: Any) -> None:
        for observer in self.several:
            getattr(observer, name)(*values, **named)

    return call


class Observers(Observer):
    """The observers `several` as one. Each call goes to all of them, in order."""

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
    """Appends lines to metrics.jsonl in the run's folder. NaN and infinity become null.

    Args:
        run: the run's folder.
        step: the step to resume from. Lines of later steps are dropped.
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
        """Append a JSON line to the run's metrics.jsonl, with the keys `kind` and `step` and those of `values`.

        `kind` says what the values are: `train`, `gradients` or `validation`.

        Raises: StoreError for a full disk.
        """
        line = json.dumps({"kind": kind, "step": step, **_finite(values)}).encode() + b"\n"
        with disk_space_errors(self._run):
            while line:  # a disk that is nearly full takes a part of it, and nothing the next time
                line = line[self.file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with None instead of numbers that are not finite, also in nested dicts."""
    nested = {name: _finite(value) for name, value in values.items() if isinstance(value, dict)}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()} | nested


def environment() -> dict[str, Any]:
    """Return the content of environment.json: Python, platform, CPUs, threads, GPU and the versions of packages."""
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
    """Write `content` as indented JSON to the file `path`, completely or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _step(line: str) -> int:
    """Return the step of a log line. An incomplete line counts as later than all steps."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 2**63
