"""Class trust: a weight per class of the teacher, by how far it beats a run on labels only.

    trust_c = clip((IoU_teacher,c - IoU_student,c) / 0.05, 0, 1)

A student learns from the teacher if the teacher is better than training on labels only, and otherwise from the labels.
Both are scored on images that neither was trained on: the fold that the run left out. A class that does not occur there
has trust 1.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.bounded import parse_json, parse_toml, read_text
from kdcache.data import IGNORE_INDEX
from kdcache.distill import Batch
from kdcache.errors import MismatchError, RecipeError, plain_logger, suggest
from kdcache.metrics import ConfusionMatrix
from kdcache.models.run import load_run
from kdcache.store import Cache, Records
from kdcache.training.config import read_config
from kdcache.training.input.cache_dataset import CacheDataset
from kdcache.training.leakage import check_same_samples, doubt

_log = plain_logger("kdcache.training")
FULL = 0.05
"""Difference of IoU from which trust is 1."""


def read_trust(path: str, names: Sequence[str]) -> list[float]:
    """Read how much each class of a teacher is trusted, and return these weights in the order of `names`.

    Args:
        path: a TOML or JSON file: class name -> weight, a number of at least 0.
        names: names of all classes. The file must have each of them.

    Raises: RecipeError if the file cannot be read, lacks a class, or has an unknown class or an invalid weight.
    """
    try:
        text = read_text(Path(path))
        table: Any = parse_json(text) if path.endswith(".json") else parse_toml(text)
    except FileNotFoundError as error:
        raise RecipeError(f"Trust file not found: {path}", fix="Check the path, or use --class-trust auto") from error
    except UnicodeDecodeError as error:
        raise _refused(path, "it is not UTF-8 text") from error
    except (OSError, ValueError) as error:
        raise _refused(path, getattr(error, "strerror", None) or str(error).splitlines()[0]) from error
    if not isinstance(table, dict):
        raise _refused(path, "it is no table of classes")
    for name, weight in table.items():
        if name not in names:
            raise _refused(path, f"there is no class {name!r}. {suggest(name, names)}".rstrip())
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise _refused(path, f"{name} is {weight!r}")
    absent = [name for name in names if name not in table]
    if absent:
        raise _refused(path, f"it has no {', '.join(absent)}")
    return [float(table[name]) for name in names]


def trust_from_run(
    records: Records, run: str, device: torch.device, note: Callable[[str], None] = _log.warning
) -> list[float]:
    """Return the trust in the teacher for each class, in 0..1, by comparing it with a run on labels only.

    Teacher and run are scored on the fold that the run left out. Trust is 0 if the teacher's IoU is not higher. It
    rises linearly to 1 at a difference of 0.05. A class that does not occur has trust 1.

    Args:
        records: the cache, with its data set if it stores no pixels.
        run: the run on labels only: a run folder of `train-student --method none` or `train-teacher`, with `--fold`.
        device: where the run's model is evaluated.
        note: is called with warnings, for example that the teacher may have seen the fold.
    Raises: RecipeError for a cache of crops, a run with a teacher or without a fold, or a fold without labels.
        MismatchError for a run with other classes or samples.
    """
    cache = records.cache
    if cache.manifest.view.kind == "crop":
        raise RecipeError(
            f"Cannot measure --class-trust auto on {cache.place}: it is a cache of crops, and what a crop shows is "
            "chance",
            fix="Give --class-trust FILE, or a cache that was built without --crop.",
        )
    config = read_config(Path(run))
    if config.teaches or config.left_out is None:
        raise RecipeError(
            f"Cannot compare the teacher with --trust-against {run}: it has method {config.loss.method} and "
            + (f"fold {config.data.fold}" if config.data.fold else "no --fold"),
            fix="Train it with --method none --fold 0/5",
        )
    model, run_model = load_run(run)
    names = cache.manifest.dataset.class_names
    if run_model.class_names != names:
        raise MismatchError(
            f"The run has other classes than the teacher: {', '.join(run_model.class_names)} in {run} against "
            f"{', '.join(names)}",
            fix="Give a run of this cache's classes.",
        )
    for text in (check_same_samples(cache, run, run_model.trained_on, config), doubt(cache, config.left_out)):
        if text is not None:
            note(text)
    dataset = CacheDataset(records, augment="none", size=cache.view_size)
    held_out = np.flatnonzero(config.left_out.holds(cache.ids)).tolist()
    teacher, student = (ConfusionMatrix(names, IGNORE_INDEX) for _ in range(2))
    model.eval().to(device)
    for number in held_out:
        sample = dataset[number]
        if bool((sample.label != IGNORE_INDEX).any()):
            teacher.update(_target_argmax(cache, sample), sample.label)
            student.update(_student_argmax(model, sample, device), sample.label)
    if not teacher.counts.sum():
        raise RecipeError(
            f"Cannot measure trust: no sample of fold {config.data.fold} is labelled", fix="Give --class-trust FILE."
        )
    ious = [np.array(confusion.metrics().iou) for confusion in (teacher, student)]
    difference = np.where(np.isfinite(ious[0]) & np.isfinite(ious[1]), ious[0] - ious[1], FULL)
    return [float(weight) for weight in np.clip(difference / FULL, 0, 1).round(4)]


def _target_argmax(cache: Cache, sample: Batch) -> torch.Tensor:
    argmax_BHW, _ = sample.map(lambda part: part[None]).argmax_confidence(cache, sample.size)
    return argmax_BHW[0]


def _student_argmax(model: Any, sample: Batch, device: torch.device) -> torch.Tensor:
    assert sample.pixels is not None
    with torch.inference_mode():
        logits = model(model.normalise(sample.pixels[None].to(device))).logits.float()
        argmax: torch.Tensor = model.upsample(logits, tuple(sample.label.shape))[0].argmax(0).cpu()
    return argmax


def _refused(path: str, what: str) -> RecipeError:
    return RecipeError(
        f"Invalid trust file {path}: {what}",
        fix='Give every class a number of 0 or more, in TOML or JSON, for example "Sky = 1.0". --class-trust auto '
        "measures them.",
    )
