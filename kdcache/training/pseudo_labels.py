"""Checks of a teacher's pseudo labels before a training's first step.

They report how many pixels a threshold keeps, and whether the teacher still predicts most classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from kdcache.distill import MergedTargets, Target
from kdcache.distill.terms.unlabelled.pseudo import confidence_of
from kdcache.errors import RecipeError
from kdcache.metrics.calibration import ConfidenceCounts, Coverage
from kdcache.settings.terms import PseudoLabels
from kdcache.store import Cache, Records
from kdcache.training.config import TrainConfig
from kdcache.training.criterion import label_counts, stored_targets, target_counts
from kdcache.training.input.dataset import DrawnDataset
from kdcache.training.input.resident_records import TARGET_PARTS

LOOKED_AT = 64
"""Samples on which the share of pixels with a pseudo label is estimated."""
KNOWN = 0.5
"""The share of the labels' classes that a teacher has to know, by the entropy of both."""
LITTLE = 0.5
"""The share of pixels with a pseudo label below which it is worth a note."""


def pseudo_notes(config: TrainConfig, dataset: DrawnDataset, *, pasted: bool = False) -> Iterator[str]:
    """Yield a note for each threshold of pseudo labels that keeps less than half of the pixels.

    The share of pixels is estimated on the first view of each of up to 64 samples.

    Args:
        config: the settings of a stream.
        dataset: its samples, in the training's classes.
        pasted: True if labelled samples of another stream are pasted into them.
    Raises: RecipeError if a threshold keeps no pixel, and the stream learns from nothing else.
    """
    cache = dataset.cache
    if cache is None or not config.reads_targets:
        return
    active = [term for term in config.terms if term.active]
    pseudo = [term for term in active if isinstance(term, PseudoLabels) and term.reads_teacher]
    specs = [term for term in pseudo if term.quantile is None]
    labels = config.loss.ce_weight > 0 and (pasted or (config.data.labels != "none" and bool(dataset.labelled)))
    alone = len(active) == len(specs) and not labels and not config.wants_kl
    targets = stored_targets(cache, dataset)
    for threshold in dict.fromkeys(spec.threshold for spec in specs):
        samples = cache.manifest.dataset.samples
        some = range(0, samples, -(-samples // LOOKED_AT))
        counts = count_confidences(cache, targets, some)
        coverage, half = counts.coverage(threshold), f"{counts.threshold_keeping(LITTLE):.2g}"
        if any(coverage.selected) or _keeps_any(cache, targets, threshold, counts, some):
            if coverage.total_share < LITTLE:
                yield (
                    f"the pseudo-label threshold {threshold:g} keeps {100 * coverage.total_share:.3g} % of the "
                    f"pixels ({_by_class(dataset, coverage)}), measured on {len(some)} of {samples} samples. "
                    f"{half} would keep half. Fix: check the teacher's mIoU, or lower the threshold"
                )
            continue
        none = none_confident(cache, threshold, counts)
        if alone:
            raise none
        yield f"{none.problem}. Fix: {none.fix}"


def count_confidences(cache: Cache, targets: Cache | MergedTargets, samples: range) -> ConfidenceCounts:
    """Count pixels by the teacher's best class and its probability there, over the first view of each given sample.

    Args:
        cache: an open cache.
        targets: the same cache, or its targets in the training's classes.
        samples: numbers of the samples.
    """
    records, counts = Records.of(cache), ConfidenceCounts(targets.num_classes)
    for sample in samples:
        arrays = records.target(cache.manifest.record(sample))
        parts = {name: array for name, array in arrays.items() if name in TARGET_PARTS}
        target = Target(**{name: torch.from_numpy(np.ascontiguousarray(part))[None] for name, part in parts.items()})
        mapped_target = target if isinstance(targets, Cache) else targets.merged(target)
        argmax_1HW, confidence_1HW = confidence_of(mapped_target, targets)
        counts.update(argmax_1HW[0], confidence_1HW[0], None)
    return counts


def _keeps_any(
    cache: Cache, targets: Cache | MergedTargets, threshold: float, counts: ConfidenceCounts, counted: range
) -> bool:
    """Return True if a threshold keeps a pixel of any further sample. The samples are added to `counts`."""
    for sample in range(cache.manifest.dataset.samples):
        if sample in counted:
            continue
        sample_counts = count_confidences(cache, targets, range(sample, sample + 1))
        counts.predicted_CV += sample_counts.predicted_CV
        if sample_counts.highest >= threshold:
            return True
    return False


def none_confident(cache: Cache, threshold: float, counts: ConfidenceCounts) -> RecipeError:
    """Return the error for a confidence threshold that no pixel of the cache reaches.

    The error names the largest confidence in `counts`, and advises a lower threshold. `counts` has the confidences of
    all samples.
    """
    dataset = cache.manifest.dataset
    return RecipeError(
        f"No pseudo labels from {threshold} in all {dataset.samples} samples of {cache.place} (split {dataset.split}): "
        f"the surest pixel has {counts.highest:.2g}",
        fix=f"Give a threshold of {counts.threshold_keeping(LITTLE):.2g}, which keeps half. But look at the teacher's "
        "mIoU first: below 0.5 it needs more training.",
    )


def _by_class(dataset: DrawnDataset, coverage: Coverage) -> str:
    shares = zip(dataset.classes.names, coverage.shares, strict=True)
    return ", ".join(f"{name} {100 * share:.2g} %" for name, share in shares if share == share) or "no class"


def collapse_note(config: TrainConfig, dataset: DrawnDataset, labelled: Sequence[DrawnDataset]) -> str | None:
    """Return a note if a teacher predicts few classes on samples without labels, else None.

    Few means: the effective number of classes (see `effective_classes`) of the teacher's predictions is less than half
    of the labels' number. If a student of such a teacher becomes the next teacher, classes get fewer in each round.

    Args:
        config: the settings of a stream that learns from targets without labels.
        dataset: its samples.
        labelled: the samples of all streams that learn from segmentation labels.
    """
    if dataset.cache is None or not config.reads_logits or config.loss.teacher == "labels" or not labelled:
        return None
    taught = target_counts(dataset.cache, dataset)
    label_pixels = np.sum([label_counts(samples) for samples in labelled], 0)
    of_teacher, of_labels = effective_classes(taught), effective_classes(label_pixels)
    if of_teacher >= KNOWN * of_labels:
        return None
    names = dataset.classes.names
    shares = [counts / max(1, counts.sum()) for counts in (taught, label_pixels)]
    table = ", ".join(
        f"{names[number]} {100 * shares[0][number]:.1f} % ({100 * shares[1][number]:.1f} %)"
        for number in np.argsort(-shares[1], kind="stable").tolist()
    )
    return (
        f"{dataset.cache.place}: the teacher predicts {of_teacher:.1f} classes, and the labels have {of_labels:.1f} "
        f"(by entropy). Targets (labels): {table}. Fix: check the teacher's mIoU on such images, and use an earlier "
        "round's teacher or a higher threshold"
    )


def effective_classes(counts: npt.NDArray[np.int64]) -> float:
    """Return the effective number of classes: exp of the entropy (in nats) of the classes' shares.

    N equally frequent classes give N. If all counts are 0, the result is 0. `counts` (C,) are the pixels of each class.
    """
    p = counts[counts > 0] / max(1, counts.sum())
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0
