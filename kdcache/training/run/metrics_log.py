"""The logs of a run: `metrics.jsonl`, `environment.json`, `result.json`; and its observers."""

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
from kdcache.metrics import DepthMetrics, Metrics
from kdcache.run_folder import METRICS, MOST_LOG_BYTES, no_log
from kdcache.store.backend.durable import disk_space_errors
from kdcache.training.feature_validation import FeatureScore


class Observer:
    """Watches a training; every method may be overridden. The command line's progress is one."""

    def started(self, *, step: int, iterations: int, parameters: int) -> None:
        """Training begins, or goes on at `step`."""

    def note(self, text: str) -> None:
        """A note about this run for its user."""

    def advanced(self, step: int) -> None:
        """A step is done: its number from 1. Called at every one, so that a bar can move."""

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """Values of a step, every `log_every` steps: loss, its terms, lr, images_per_second, wait_share.

        Where pseudo labels are made of weak views, weak_view_seconds of a step, too.
        """

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        """L2 norms of each weighted term's gradient over the student's parameters, every `gradients_every` steps."""

    def balanced(self, step: int, tasks: dict[str, dict[str, float]]) -> None:
        """Loss and weight of each of two tasks, after `stepped`; and after `gradients` with its norm and ratio.

        The norm is of its gradient over the parameters that both tasks reach, its ratio to the other's.
        """

    def validating(self, done: int, total: int) -> None:
        """A number of images is validated so far."""

    def validated(self, step: int, metrics: Metrics, best: bool) -> None:
        """A validation ended."""

    def validated_ema(self, step: int, metrics: Metrics, best: bool) -> None:
        """A validation of the weights' moving average ended; of trainings with `ema`, after `validated`."""

    def validated_depth(self, step: int, metrics: DepthMetrics) -> None:
        """A validation of depth ended, after `validated`; of models with a depth head on data with such labels."""

    def validated_ema_depth(self, step: int, metrics: DepthMetrics) -> None:
        """A validation of the moving average's depth ended, after `validated_ema`."""

    def validated_features(self, step: int, score: FeatureScore) -> None:
        """A validation by features ended; of trainings with `val_share`."""

    def validated_ema_features(self, step: int, score: FeatureScore) -> None:
        """A validation of the moving average's features ended, after `validated_features`."""

    def ended(self, *, completed: bool) -> None:
        """The training ended: at its last step, or before it by an error or by the user's wish."""


def _of_all(name: str) -> Any:
    """A method that calls the method `name` of each of several observers."""

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
    validated_ema = _of_all("validated_ema")
    validated_depth = _of_all("validated_depth")
    validated_ema_depth = _of_all("validated_ema_depth")
    validated_features = _of_all("validated_features")
    validated_ema_features = _of_all("validated_ema_features")
    ended = _of_all("ended")


class MetricsLog:
    """Appends to metrics.jsonl; on resume, forgets what came after the checkpoint. NaN and infinity become null.

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
            self._file = path.open("ab", buffering=0)  # what does not fit is not tried again when it is closed

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"kind": kind, "step": step, **_finite(values)}).encode() + b"\n"
        with disk_space_errors(self._run):
            while line:  # a disk that is nearly full takes a part of it, and nothing the next time
                line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values with None for those that are not finite, at any depth of mappings."""
    nested = {name: _finite(value) for name, value in values.items() if isinstance(value, dict)}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()} | nested


def environment() -> dict[str, Any]:
    """The machine and the versions of libraries, for repeating a run."""
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
    write_whole(path, json.dumps(content, indent=1) + "\n")


def _step(line: str) -> int:
    """Step of a line; a line cut short by a kill counts as later than everything."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 2**63
