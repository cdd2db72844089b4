"""Evaluations that are kept beside the weights, and used again while weights and data are the same.

A kept file (`evaluation-*.json` in the run's folder) counts when the SHA-256 of the weights, that of the data (every
image and label of the split) and the size that the model sees are those of today; then it is as good as a new pass.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache.data import Split, prefetch
from kdcache.data.files import file_digest
from kdcache.errors import ModelError
from kdcache.evaluate.memory import is_out_of_memory
from kdcache.evaluate.metrics import Metrics
from kdcache.evaluate.run import Progress, evaluate_model
from kdcache.evaluate.runs import Run
from kdcache.models.run import read_run_model, weights_path


@dataclass(frozen=True)
class Judging:
    """How runs are evaluated.

    Attributes:
        which: weights, `best` or `last`.
        size: (H, W) that the models see; None is that of each run.
        fresh: evaluate also what is kept.
    """

    which: str = "best"
    size: tuple[int, int] | None = None
    batch_size: int = 8
    device: str = "cpu"
    fresh: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one run; `reused` when an earlier pass had them; `note` when they could not be kept."""

    metrics: Metrics
    size: tuple[int, int]
    reused: bool
    note: str | None = None


def data_digest(split: Split, threads: int = 2) -> str:
    """SHA-256 over class names, ids, and the contents of every labelled image and its label; reads them all."""
    labelled = [index for index in range(len(split)) if split.has_label(index)]
    found = hashlib.sha256(split.digest().encode())
    for image, label in prefetch(split.content_digests, labelled, threads=threads, ahead=16):
        found.update(f"{image} {label}\n".encode())
    return found.hexdigest()


def evaluate_run(
    run: Run, split: Split, name: str, digest: str, judging: Judging, progress: Progress | None = None
) -> Evaluation:
    """Metrics of a run on a split, from an earlier evaluation where that is the same.

    Args:
        name: of the split for the file: `val`, `train-fold-0-of-4`.
        digest: `data_digest` of the split.
    Raises: MismatchError for other classes; DataError without labels; ModelError when memory does not suffice.
    """
    if run.folder is None:
        return _evaluate(run, split, judging, progress)
    about = read_run_model(run.folder)
    about.check_classes(split.classes.names, f"{split.data}, split {split.split!r}")
    size = judging.size or about.size
    weights = file_digest(weights_path(run.folder, judging.which))
    identity = {"weights_sha256": weights, "data_sha256": digest, "size": list(size)}
    kept = None if judging.fresh else _kept(run.folder, identity, split.classes.names)
    if kept is not None:
        return Evaluation(kept, size, reused=True)
    found = _evaluate(run, split, judging, progress)
    said = {"run": run.text, "weights": judging.which, "data": split.data, "split": split.split, **identity}
    which = "" if judging.which == "best" else f"-{judging.which}"
    other = "" if size == about.size else f"-{size[0]}x{size[1]}"
    return replace(found, note=_keep(run.folder / f"evaluation-{name}{which}{other}.json", said, found.metrics))


def _evaluate(run: Run, split: Split, judging: Judging, progress: Progress | None) -> Evaluation:
    model, about = run.open(split.classes, judging.which, judging.size)
    with memory_errors(judging.device, judging.batch_size):
        metrics = evaluate_model(
            model.to(judging.device),
            split,
            about.size,
            device=judging.device,
            batch_size=judging.batch_size,
            progress=progress,
        )
    return Evaluation(metrics, about.size, reused=False)


def metrics_of(found: Mapping[str, Any]) -> Metrics:
    """The metrics that `Metrics.to_json` described. Raises KeyError, TypeError for something else."""
    classes = found["classes"]
    return Metrics(
        class_names=tuple(str(row["name"]) for row in classes),
        iou=tuple(_number(row["iou"]) for row in classes),
        acc=tuple(_number(row["acc"]) for row in classes),
        label_pixels=tuple(int(row["label_pixels"]) for row in classes),
        miou=_number(found["miou"]),
        macc=_number(found["macc"]),
        aacc=_number(found["aacc"]),
    )


@contextmanager
def memory_errors(device: str, batch_size: int) -> Iterator[None]:
    """Say what to do when a batch does not fit into memory. Raises ModelError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        words = str(error)
        less = f"--batch-size {batch_size // 2}" if batch_size > 1 else "a smaller --size, or --device cpu"
        raise ModelError(
            "a batch of the evaluation must fit into memory",
            received=f"{batch_size} images at a time on {device}: {words.splitlines()[0] if words else 'no memory'}",
            remedy=f"use {less}",
        ) from error


def _kept(folder: Path, identity: Mapping[str, Any], class_names: tuple[str, ...]) -> Metrics | None:
    for path in sorted(folder.glob("evaluation-*.json")):
        try:
            found = json.loads(path.read_bytes())
            if all(found[key] == value for key, value in identity.items()) and not found.get("at_size"):
                metrics = metrics_of(found)
                if metrics.class_names == class_names:
                    return metrics
        except (OSError, ValueError, KeyError, TypeError):  # another file, or one of another version
            continue
    return None


def _keep(path: Path, said: Mapping[str, Any], metrics: Metrics) -> str | None:
    """Write an evaluation whole or not at all; a folder that may not be written to costs the next pass, no more."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps({**said, **metrics.to_json()}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        return f"the evaluation of {path.parent} could not be kept there ({error.strerror})"
    return None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
