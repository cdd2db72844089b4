"""How much of a teacher's pseudo labels a training keeps, looked at before its first step."""

from collections.abc import Iterator

import numpy as np
import torch

from kdcache.distill import MergedTargets, Target
from kdcache.distill.terms.pseudo import Pseudo, confidence_of
from kdcache.errors import RecipeError
from kdcache.metrics.calibration import ConfidenceCounts, Coverage
from kdcache.store import Cache, Records
from kdcache.train.config import TrainConfig
from kdcache.train.criterion import stored_targets
from kdcache.train.input.dataset import DrawnDataset
from kdcache.train.input.resident_records import TARGET_PARTS

LOOKED_AT = 64
"""Samples on which the share of pixels with a pseudo label is estimated."""
LITTLE = 0.5
"""The share of pixels with a pseudo label below which it is worth a note."""


def pseudo_notes(config: TrainConfig, dataset: DrawnDataset) -> Iterator[str]:
    """Notes on thresholds that keep less than half of the pixels, of the first views of some samples.

    Args:
        dataset: its classes are the training's: where a class map merges a store's, a pseudo label is as sure as the
            sum of their probabilities.
    Raises: RecipeError for a threshold that keeps none of any sample, where nothing else is learnt.
    """
    cache = dataset.cache
    if cache is None or not config.reads_targets:
        return
    active = [term for term in config.terms if term.weight != 0]
    specs = [term for term in active if term.kind == "pseudo" and term.quantile is None]
    alone = len(active) == len(specs) and config.ce_weight == 0 and not config.wants_kl
    targets = stored_targets(cache, dataset)
    for threshold in dict.fromkeys(spec.threshold or Pseudo.default_threshold for spec in specs):
        samples = cache.manifest.dataset.samples
        some = range(0, samples, -(-samples // LOOKED_AT))
        counts = _counts(cache, targets, some)
        coverage, half = counts.coverage(threshold), f"{counts.threshold_keeping(LITTLE):.2g}"
        if any(coverage.selected) or _keeps_any(cache, targets, threshold, counts):
            if coverage.total_share < LITTLE:
                yield (
                    f"pseudo labels from {threshold:g} are on {100 * coverage.total_share:.3g} % of the pixels "
                    f"({_by_class(dataset, coverage)}), by {len(some)} of {samples} samples; {half} would keep half. "
                    "Look at the teacher's mIoU, or lower the threshold"
                )
            continue
        none = _none_found(cache, threshold, counts)
        if alone:
            raise none
        yield f"no pseudo labels: {none.received}. Remedy: {none.remedy}"


def _counts(cache: Cache, targets: Cache | MergedTargets, samples: range) -> ConfidenceCounts:
    """The confidences of the first views of samples, in the classes of `targets`."""
    records, counts = Records.of(cache), ConfidenceCounts(targets.num_classes)
    for sample in samples:
        arrays = records.target(cache.manifest.record(sample))
        parts = {name: array for name, array in arrays.items() if name in TARGET_PARTS}
        target = Target(**{name: torch.from_numpy(np.ascontiguousarray(part))[None] for name, part in parts.items()})
        own = target if isinstance(targets, Cache) else targets.merged(target)
        argmax_1HW, confidence_1HW = confidence_of(own, targets)
        counts.update(argmax_1HW[0], confidence_1HW[0], None)
    return counts


def _keeps_any(cache: Cache, targets: Cache | MergedTargets, threshold: float, counts: ConfidenceCounts) -> bool:
    """Whether a threshold keeps a pixel of any sample; adds what it looks at to `counts`."""
    for sample in range(cache.manifest.dataset.samples):
        own = _counts(cache, targets, range(sample, sample + 1))
        counts.predicted_CV += own.predicted_CV
        if own.highest >= threshold:
            return True
    return False


def _none_found(cache: Cache, threshold: float, counts: ConfidenceCounts) -> RecipeError:
    dataset = cache.manifest.dataset
    return RecipeError(
        "pseudo labels are pixels of which the teacher is sure, and something must be learnt",
        received=f"none from {threshold:g} in all {dataset.samples} samples of {cache.place} (split {dataset.split}): "
        f"the surest pixel has {counts.highest:.2g}",
        remedy=f"give a threshold of {counts.threshold_keeping(LITTLE):.2g}, which keeps half; but look at the "
        "teacher's mIoU first: below 0.5 it needs more training",
    )


def _by_class(dataset: DrawnDataset, coverage: Coverage) -> str:
    shares = zip(dataset.classes.names, coverage.shares, strict=True)
    return ", ".join(f"{name} {100 * share:.2g} %" for name, share in shares if share == share) or "no class"
