"""Audit a teacher's classes from the cache only: where it is good, how sure it is, what it would teach wrongly.

One pass over the whole images collects confusion with the labels, confidences, and the worst images. Counts are exact
and small (`ConfusionMatrix`, `ConfidenceCounts`), so memory does not grow with the number of records.
"""

import heapq
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kdcache.data import IGNORE_INDEX
from kdcache.metrics import ConfusionMatrix, Metrics
from kdcache.metrics.calibration import Calibration, ConfidenceCounts, Coverage
from kdcache.metrics.confusion import without_nan
from kdcache.store import Records, evenly_spread
from kdcache.teacher.audit.first_views import Progress, Whole, read_wholes, whole_records
from kdcache.teacher.audit.pseudo_quality import PseudoCounts, PseudoQuality
from kdcache.teacher.audit.topk_error import GradientErrors, gradient_errors
from kdcache.teacher.audit.verify import packed_target
from kdcache.teacher.build.render import Array

THRESHOLDS = (*(round(0.5 + 0.05 * step, 2) for step in range(10)), 0.97, 0.99)
CONFUSED = 10  # pairs that are named
_GRADIENT_RECORDS = 16
_GRADIENT_NUMBERS = 200_000_000  # at view size, all classes: about a minute on one core


@dataclass(frozen=True)
class Confused:
    """A class of the labels and another class that the teacher predicts instead.

    Attributes:
        label: name of the labelled class.
        predicted: name of the predicted class.
        share: fraction of the pixels labelled `label` that are predicted as `predicted`, 0 to 1.
        pixels: number of pixels that are labelled `label` and predicted as `predicted`.
    """

    label: str
    predicted: str
    share: float
    pixels: int


@dataclass(frozen=True)
class Scored:
    """The teacher's score on one image.

    Attributes:
        record: number of the record.
        sample: the sample's id.
        miou: mean IoU, 0 to 1, over the classes in the image's label or in its prediction.
    """

    record: int
    sample: str
    miou: float


@dataclass(frozen=True)
class Audit:
    """The quality of a teacher's classes, measured from its cache. C is the number of classes.

    Attributes:
        class_names: names of the C classes.
        class_colours: RGB of the C classes, 0 to 255.
        images: number of images.
        labelled: number of images with a label.
        counts: int64 (C, C), number of pixels by label (rows) and predicted class (columns).
        metrics: the scores against labels, or None without labels.
        calibration: how well the teacher's confidence matches its accuracy, or None without labels.
        confused: the 10 most confused pairs (labelled class, predicted class), the largest share of the labelled
            class's pixels first.
        coverage: for each confidence in THRESHOLDS (0.5 to 0.99), the number of pixels with at least that confidence.
        quality: for each confidence in THRESHOLDS, the predictions of these pixels, used as pseudo labels and compared
            with labels. Empty without labels.
        gradient: the error of the KL gradient for caches that would keep fewer classes per pixel than this one.
        worst: the images with the lowest mIoU, the lowest first.
    """

    class_names: tuple[str, ...]
    class_colours: tuple[tuple[int, int, int], ...]
    images: int
    labelled: int
    counts: Array
    metrics: Metrics | None
    calibration: Calibration | None
    confused: tuple[Confused, ...]
    coverage: tuple[Coverage, ...]
    quality: tuple[PseudoQuality, ...]
    gradient: GradientErrors
    worst: tuple[Scored, ...]

    def coverage_at(self, threshold: float) -> Coverage:
        """Return the number of pixels of each class whose confidence is at least `threshold`.

        `threshold` must be one of THRESHOLDS, such as 0.7 or 0.9.
        """
        return self.coverage[THRESHOLDS.index(threshold)]

    def confused_with(self, label: int) -> Confused | None:
        """Return the most frequent wrong prediction for the class number `label`, or None if there is none."""
        return next(iter(_pairs(self.class_names, self.counts[label : label + 1], label)), None)

    def to_json(self) -> dict[str, Any]:
        """Return the audit as JSON values, with null for NaN."""
        by_threshold = [{"beside_labels": quality.to_json()} for quality in self.quality] or [{}] * len(self.coverage)
        return without_nan(
            {
                "images": self.images,
                "labelled": self.labelled,
                "teacher": None if self.metrics is None else self.metrics.to_json(),
                "calibration": None if self.calibration is None else asdict(self.calibration),
                "confused": [
                    {"label": x.label, "said": x.predicted, "share": x.share, "pixels": x.pixels} for x in self.confused
                ],
                "pixels_by_label_and_said": self.counts.tolist(),
                "pseudo_labels": [
                    {"threshold": threshold, **coverage_json(self.class_names, coverage), **labels}
                    for threshold, coverage, labels in zip(THRESHOLDS, self.coverage, by_threshold, strict=True)
                ],
                "kl_gradient_error": asdict(self.gradient),
                "worst": [asdict(scored) for scored in self.worst],
            }
        )


def coverage_json(class_names: tuple[str, ...], coverage: Coverage) -> dict[str, Any]:
    """Return `coverage`, the counts of confident pixels, as JSON values: `share`, `precision` and `classes`.

    The first two are totals. `classes` is a list with a dict for each class. `class_names` are the names of all
    classes. NaN becomes null.
    """
    columns = (coverage.thresholds, coverage.predicted, coverage.selected, coverage.shares, coverage.precision)
    keys = ("name", "threshold", "said", "kept", "share", "precision")
    classes = [dict(zip(keys, row, strict=True)) for row in zip(class_names, *columns, strict=True)]
    return without_nan({"share": coverage.total_share, "precision": coverage.total_precision, "classes": classes})


def audit_cache(records: Records, *, worst: int = 10, progress: Progress | None = None) -> Audit:
    """Measure the quality of the teacher's classes, from its cache and on whole images at view size.

    Args:
        records: the cache with its pixels and labels.
        worst: number of images with the lowest mIoU to list.
        progress: called with (images done, total images).
    Raises: MismatchError for a missing or changed data set; CorruptError for a damaged cache.
    """
    records.check_complete()
    cache = records.cache
    names = cache.manifest.dataset.class_names
    confusion = ConfusionMatrix(names, IGNORE_INDEX)
    confidences = ConfidenceCounts(len(names))
    pseudo = PseudoCounts(names, THRESHOLDS)
    heap: list[tuple[float, int, Scored]] = []  # a heap whose smallest is the best of the worst
    labelled = 0
    numbers = whole_records(cache)
    for done, prediction in enumerate(read_wholes(records), 1):
        confidences.update(prediction.argmax, prediction.confidence, prediction.label, prediction.inside)
        if prediction.label is not None and (image_confusion := _confusion(prediction, names)) is not None:
            labelled += 1
            pseudo.update(prediction.argmax.numpy(), prediction.confidence.numpy(), prediction.label, prediction.inside)
            confusion.counts += image_confusion.counts
            scored = Scored(prediction.record, prediction.sample, image_confusion.metrics().miou)
            heapq.heappush(heap, (-scored.miou, -scored.record, scored))
            if len(heap) > worst:
                heapq.heappop(heap)
        if progress is not None:
            progress(done, len(numbers))
    return Audit(
        class_names=names,
        class_colours=cache.manifest.dataset.class_colours,
        images=len(numbers),
        labelled=labelled,
        counts=confusion.counts.numpy(),
        metrics=confusion.metrics() if labelled else None,
        calibration=confidences.calibration() if labelled else None,
        confused=tuple(_pairs(names, confusion.counts.numpy())[:CONFUSED]),
        coverage=tuple(confidences.coverage(threshold) for threshold in THRESHOLDS),
        quality=tuple(pseudo.quality(number) for number in range(len(THRESHOLDS))) if labelled else (),
        gradient=_gradient(records, numbers),
        worst=tuple(scored for *_, scored in sorted(heap, reverse=True)),
    )


def _confusion(prediction: Whole, names: tuple[str, ...]) -> ConfusionMatrix | None:
    """Return the confusion matrix of one image, or None if no pixel of it has a label."""
    if prediction.label is None:
        return None
    confusion = ConfusionMatrix(names, IGNORE_INDEX)
    confusion.update(prediction.argmax, torch.from_numpy(prediction.label))
    return confusion if confusion.counts.any() else None


def _pairs(names: tuple[str, ...], counts_LC: Array, first: int = 0) -> list[Confused]:
    """Return confused pairs, the largest share first. `first` is the class of the first row."""
    pairs = []
    for label, row_C in enumerate(counts_LC, first):
        for predicted in row_C.nonzero()[0]:
            if predicted != label:
                pixels = int(row_C[predicted])
                pairs.append(Confused(names[label], names[predicted], pixels / int(row_C.sum()), pixels))
    return sorted(pairs, key=lambda pair: (-pair.share, pair.label, pair.predicted))


def _gradient(records: Records, numbers: list[int]) -> GradientErrors:
    """Return the top-k gradient errors on up to 16 records, fewer if they are large."""
    cache = records.cache
    height, width = cache.view_size
    most = max(1, min(_GRADIENT_RECORDS, _GRADIENT_NUMBERS // (cache.num_classes * height * width)))
    sample = [numbers[place] for place in evenly_spread(len(numbers), most)]
    logits = (packed_target(records, [record]).densify()[0] for record in sample)
    return gradient_errors(logits, cache.head.k, cache.view_size, align_corners=cache.align_corners)
