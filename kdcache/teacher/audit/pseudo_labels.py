"""Export pseudo labels from a cache: the teacher's class at confident pixels, void elsewhere, as PNGs of a data folder.

    OUT/classes.txt                 names and colours
    OUT/labels/<split>/<id>.png     ids at view size without padding, 255 where not sure enough, in the classes' colours
    OUT/images/<split>/<id>.png     on demand: the images at view size, which make OUT a complete data folder
    OUT/pseudo-labels.json          the cache and the rule: existing files are kept only if these are equal

There are two passes over the cache. The first counts confidences, which gives every class its threshold, and the table
of what is kept. The second writes the missing files, each completely or not at all.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from kdcache.data import IGNORE_INDEX, ClassList
from kdcache.data.classes import write_classes
from kdcache.errors import CorruptError, MismatchError, RecipeError
from kdcache.files import check_own_folder
from kdcache.metrics.calibration import ConfidenceCounts, Coverage
from kdcache.metrics.figures import palette_png, png_bytes
from kdcache.store import Cache, Records
from kdcache.store.backend.durable import disk_space_errors, write_durably
from kdcache.teacher.audit.first_views import Whole, read_wholes
from kdcache.teacher.build.render import Array

Progress = Callable[[str, int, int], None]
SETTINGS = "pseudo-labels.json"


@dataclass(frozen=True)
class Rule:
    """The rule by which a pixel's prediction becomes a pseudo label.

    Set exactly one of the two fields, between 0 and 1. The other stays None.

    Attributes:
        threshold: the smallest probability that is kept.
        quantile: the fraction of each class's pixels that is kept, the most confident pixels first.
    Raises: RecipeError for other values.
    """

    threshold: float | None = None
    quantile: float | None = None

    def __post_init__(self) -> None:
        given = {f"--{name}": value for name, value in vars(self).items() if value is not None}
        fix = "Give for example --threshold 0.7, or --quantile 0.5 for the surer half of every class."
        if not given:
            raise RecipeError("Missing --threshold or --quantile", fix=fix)
        if len(given) > 1:
            raise RecipeError(f"Use either {' or '.join(f'{k} {v}' for k, v in given.items())}, not both", fix=fix)
        flag, value = next(iter(given.items()))
        if not 0 < value < 1:
            raise RecipeError(f"Invalid value of {flag}: {value}, which is not between 0 and 1", fix=fix)


@dataclass(frozen=True)
class Exported:
    """The result of exporting pseudo labels.

    Attributes:
        class_names: names of the classes.
        coverage: how many pixels of each class are kept, over all files.
        half: the probability threshold, equal for all classes, that would keep half of the pixels.
        written: number of files that this call wrote.
        kept: number of files that existed before.
    """

    class_names: tuple[str, ...]
    coverage: Coverage
    half: float
    written: int
    kept: int


def export_pseudo_labels(
    records: Records,
    out: Path,
    rule: Rule,
    *,
    images: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the teacher's confident predictions as a label PNG for each sample.

    After an interruption, the same call continues.

    Args:
        records: the cache. To measure precision, it needs labels or its data set.
        out: a new or empty folder, or the folder of an earlier export.
        rule: which pixels are kept. Other pixels become 255.
        images: whether the images are also written.
        progress: called with (description of the step, samples done, total samples).
    Raises: RecipeError if the folder holds something else, or if no pixel is kept; MismatchError if the folder holds
        pseudo labels of another cache or rule, or if the cache has only crops.
    """
    cache = records.cache
    if images:
        records.check_complete()
    _check_views(cache)
    dataset = cache.manifest.dataset
    classes = ClassList(dataset.class_names, dataset.class_colours)
    files = [label_file(sample) for sample in cache.ids]
    _check_out(out, settings := _settings(cache, rule))
    counts = ConfidenceCounts(len(classes))
    for prediction in _with_progress(read_wholes(records), "counting confidences", len(files), progress):
        counts.update(prediction.argmax, prediction.confidence, prediction.label, prediction.inside)
    least = rule.threshold if rule.threshold is not None else counts.quantile_thresholds(rule.quantile or 0.0)
    coverage, half = counts.coverage(least), counts.threshold_keeping(0.5)
    if not any(coverage.selected):
        raise RecipeError(
            f"No pixel is as sure as {rule.threshold or max(coverage.thresholds)} in all {len(files)} samples of "
            f"{cache.place} (split {dataset.split}): the surest pixel has {counts.highest:.2g}",
            fix=f"Use --threshold {half:.2g}, which keeps half of the pixels. Look at the teacher's mIoU first: below "
            "0.5 it needs more training.",
        )
    written = 0
    with disk_space_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_durably(out / SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
        write_classes(out, classes)
        labels, pictures = out / "labels" / dataset.split, out / "images" / dataset.split
        least_C = np.array(coverage.thresholds)
        wholes = _with_progress(read_wholes(records, labels=False), "writing labels", len(files), progress)
        for file, prediction in zip(files, wholes, strict=True):
            if not (path := labels / file).exists():
                _write(path, palette_png(prediction.of_image(pseudo_label(prediction, least_C)), classes.colours))
                written += 1
            if images and not (path := pictures / file).exists():
                _write(path, png_bytes(Image.fromarray(prediction.of_image(records.pixels(prediction.record)))))
    return Exported(classes.names, coverage, half, written, len(files) - written)


def pseudo_label(whole: Whole, thresholds_C: Array) -> Array:
    """Return a pseudo label, uint8 (H, W): the most likely class, or 255 where its probability is too low.

    Args:
        whole: the teacher's prediction.
        thresholds_C: the smallest probability that is kept, for each of the C classes.
    """
    argmax = whole.argmax.numpy()
    sure = whole.confidence.numpy().astype(np.float64) >= thresholds_C[argmax]
    label: Array = np.where(sure, argmax, IGNORE_INDEX).astype(np.uint8)
    return label


def _settings(cache: Cache, rule: Rule) -> dict[str, Any]:
    """Return everything that the labels depend on, as JSON."""
    manifest = cache.manifest
    return {
        "store": {
            "created": manifest.created,
            "ledger": "" if cache.ledger is None else cache.ledger.completion.ledger_sha256,
            "samples": manifest.dataset.ids_digest,
            "teacher": manifest.teacher.weights,
            "size": list(manifest.view.size),
        },
        "threshold": rule.threshold,
        "quantile": rule.quantile,
    }


def _check_views(cache: Cache) -> None:
    view = cache.manifest.view
    if view.kind != "full" or view.fit == "crop":
        raise MismatchError(
            f"Cannot write pseudo labels of whole images: {cache.place} has only crops"
            + (" (--fit crop)" if view.kind == "full" else ""),
            fix="Build a cache without --crop and --fit crop: its first view of every sample is the whole image.",
        )


def _check_out(out: Path, settings: dict[str, Any]) -> None:
    check_own_folder(out, SETTINGS)
    if not (out / SETTINGS).is_file():
        return
    try:
        before = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"Cannot read {out / SETTINGS}: {error}", fix="Remove the folder, or give another one with --out"
        ) from error
    if before != settings:
        recorded = before if isinstance(before, dict) else {}
        changed = [name for name, value in settings.items() if recorded.get(name) != value]
        raise MismatchError(
            f"Cannot write here: the pseudo labels in {out} have another {' and '.join(changed) or 'version'}",
            fix="Give another folder with --out, or remove that one.",
        )


def label_file(sample: str) -> PurePosixPath:
    """Return the path of a sample's label below the folder of labels, such as `a/b.png` for the id `a/b`.

    Raises: CorruptError for an id that would lead out of the folder.
    """
    path = PurePosixPath(sample + ".png")
    if path.is_absolute() or ".." in path.parts or {"\\", "\0"} & set(sample) or sample.endswith("/") or not sample:
        raise CorruptError(
            f"Cannot write a label of the sample {sample!r}: its id is not a path below the data folder",
            fix="Build the cache again from a data set whose ids are plain paths.",
        )
    return path


def _with_progress(wholes: Iterator[Whole], what: str, total: int, progress: Progress | None) -> Iterator[Whole]:
    for done, prediction in enumerate(wholes, 1):
        yield prediction
        if progress is not None:
            progress(what, done, total)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, content)
