"""Check stored targets: scores against labels, and a sample against new predictions of the teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kdcache.data import IGNORE_INDEX
from kdcache.errors import MismatchError
from kdcache.metrics import ConfusionMatrix, Metrics
from kdcache.models.foreign.wrapped import answer_as
from kdcache.store import Cache, Records, evenly_spread
from kdcache.store.format.eight_bits import FeatureFidelity, Loss
from kdcache.tasks import SEGMENTATION
from kdcache.teacher.build.render import Array
from kdcache.teacher.build.statistics import measure
from kdcache.teacher.load.fingerprint import fingerprint
from kdcache.teacher.load.forward import Precision, place, teach
from kdcache.teacher.load.load import Teacher
from kdcache_kernels import PackedTarget, densify, pack, target_argmax_confidence

# Other hardware rounds differently; another teacher differs by orders of magnitude more.
MIN_AGREEMENT = 0.995
MAX_KL = 1e-3
MAX_DOUBT = 0.15
MAX_VALUE_ERROR = 1e-2
"""The largest error of a regression's values or of features, as a part of the largest stored value."""


@dataclass(frozen=True)
class Agreement:
    """Stored targets compared with new outputs of the teacher, on some records.

    Attributes:
        records: number of compared records.
        fingerprint: differences between the cache's teacher and the teacher that ran now, as texts. Empty if none.
        drifted: ids of samples whose images no longer render to the pixels that the teacher saw.
        argmax: fraction of target pixels with the same most likely class, 0 to 1.
        kl: mean KL(teacher || stored) in nats at temperature 1.
        largest_error: largest absolute error of a logit. Logits of negligible probability are ignored.
        values: path of each compared array that does not hold logits -> its largest relative error over all records.
            The error is max |new - stored| / max |stored| of one record, or infinity if the shapes differ.
        features: name of each tap stored in 8 bits -> its stored features compared with the teacher's.
    """

    records: int
    fingerprint: tuple[str, ...]
    drifted: tuple[str, ...]
    argmax: float
    kl: float
    largest_error: float
    values: Mapping[str, float] = field(default_factory=dict)
    features: Mapping[str, FeatureFidelity] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True if the teacher is the same, no image has changed, and the targets agree.

        They agree if `argmax` is at least 0.995, `kl` at most 0.001 nats, and every error in `values` at most 0.01.
        """
        same = not self.fingerprint and not self.drifted and all(e <= MAX_VALUE_ERROR for e in self.values.values())
        return same and self.argmax >= MIN_AGREEMENT and self.kl <= MAX_KL


@dataclass(frozen=True)
class Score:
    """The teacher's predictions compared with labels.

    Attributes:
        metrics: mIoU and further scores.
        confidence: mean probability of the predicted class over all labelled pixels, 0 to 1. NaN if a target has NaN.
    """

    metrics: Metrics
    confidence: float

    @property
    def doubt(self) -> str | None:
        """A warning that the teacher's outputs may not be logits, or None.

        It appears if the share of correct pixels (aAcc) is more than 0.15 above the mean confidence.
        """
        if not self.metrics.aacc - self.confidence > MAX_DOUBT:
            return None
        return (
            f"is right in {100 * self.metrics.aacc:.1f} % of the pixels, and its mean top probability is "
            f"{self.confidence:.3f}. A student would learn targets that are too even: check that the outputs are "
            "logits (MODEL,outputs=sigmoid or probabilities for others)"
        )


def score_cache(records: Records, limit: int = 512) -> Score | None:
    """Compare the teacher's stored predictions with labels, on up to `limit` whole images at view size.

    `records` is the cache, with its data set if it stores no labels. If a cache has only crops, the first crop of each
    image is used. Returns None without a segmentation head or labels.

    Raises: MismatchError if pixels and labels are not available, or if the data set has changed.
    """
    cache = records.cache
    if cache.manifest.segmentation is None:
        return None
    confusion = ConfusionMatrix(cache.manifest.dataset.class_names, IGNORE_INDEX)
    sure, counted = 0.0, 0
    for sample in evenly_spread(cache.manifest.dataset.samples, limit):
        record = cache.manifest.record(sample)
        if not cache.labelled[SEGMENTATION][sample]:
            continue
        argmax, confidence = target_argmax_confidence(packed_target(records, [record]), cache.view_size)
        label = torch.from_numpy(records.label(record))
        confusion.update(argmax[0], label)
        labelled = confidence[0][label != IGNORE_INDEX]
        sure, counted = sure + float(labelled.double().sum()), counted + labelled.numel()
    return Score(confusion.metrics(), sure / counted) if counted else None


def packed_target(records: Records, numbers: Sequence[int]) -> PackedTarget:
    """Return the stored segmentation targets of a cache as one batch for the loss kernels.

    `records` is the cache, and `numbers` are the numbers of the records in the batch.
    """
    rows = [records.target(number) for number in numbers]
    parts = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    cache = records.cache
    return PackedTarget(
        values=parts["values"],
        indices=parts.get("indices"),
        tail=parts.get("tail"),
        num_classes=cache.num_classes,
        view_size=cache.view_size,
        align_corners=cache.align_corners,
    )


def compare_teacher(records: Records, teacher: Teacher, device: torch.device, limit: int = 16) -> Agreement:
    """Run the teacher on `device` on up to `limit` records of a cache, and compare its outputs with the stored targets.

    `records` is the cache with its data set. Without a data set, the stored pixels are used, and changed images are not
    detected.

    Raises: MismatchError if the pixels that the teacher saw are not available.
    """
    _check_split(records)
    cache = records.cache
    precision: Precision = cache.manifest.teacher.precision  # type: ignore[assignment]
    place(teacher.model, device)
    answer_as(teacher.model, cache.manifest.heads, cache.manifest.view.teacher_size or cache.view_size)
    differences = cache.manifest.teacher.differences(fingerprint(teacher, precision, device))
    folds = cache.column("fold").tolist() if teacher.folds and "records/fold" in cache.specs else [None] * len(cache)
    manifest, head = cache.manifest, cache.manifest.segmentation
    grid = head.size if head is not None and head.resampled else None
    losses = {tap: Loss() for tap, feature in manifest.features.items() if feature.dtype == "uint8"}
    stored_taps = tuple(losses if manifest.heads else manifest.features)
    similar = {name: statistic for name, statistic in manifest.statistics.items() if statistic.kind == "similarity"}
    taps = tuple(dict.fromkeys([*stored_taps, *(str(statistic.tap) for statistic in similar.values())]))
    agreeing = pixels_seen = 0
    kl_sum = largest = 0.0
    values = dict[str, float]()
    drifted = []
    numbers = evenly_spread(len(cache), limit)
    for record in numbers:
        pixels, drift = _pixels(records, record)
        if drift:
            drifted.append(records.sample(record))
        model = teacher.model_for(folds[record])
        outputs = teach(model, torch.from_numpy(pixels)[None], taps, precision, device, grid)
        numbers_now = {f"targets/{name}/values": outputs.heads.get(name) for name in manifest.regressions}
        numbers_now |= {f"features/{tap}": outputs.features[tap] for tap in stored_taps}
        numbers_now |= measure(similar, outputs.features)
        for tap, loss in losses.items():
            if outputs.features[tap].shape[1:] == cache.specs[f"features/{tap}"].shape:
                loss.add(outputs.features[tap][0].float().cpu().numpy(), cache.feature(record, tap))
        for path, error in _value_errors(cache, record, numbers_now).items():
            values[path] = max(values.get(path, 0.0), error)
        if head is None:
            continue
        repeated, stored = pack(outputs.logits.cpu(), head.k), packed_target(records, [record])
        if repeated[0].shape != stored.values.shape:
            differences.append("targets: the teacher gives another number of classes or another size")
            break
        now = densify(*repeated, cache.num_classes).double()
        then = densify(stored.values, stored.indices, stored.tail, cache.num_classes).double()
        agreeing += int((now.argmax(1) == then.argmax(1)).sum())
        pixels_seen += now[0, 0].numel()
        p = now.softmax(1)
        kl_sum += float((p * (now.log_softmax(1) - then.log_softmax(1))).sum())
        # Far below the maximum a logit carries no probability, and fp16 is coarse there.
        relevant = (now > -20) | (then > -20)
        largest = max(largest, float((now - then).abs()[relevant].max()))
    return Agreement(
        records=len(numbers),
        fingerprint=tuple(differences),
        drifted=tuple(drifted),
        argmax=agreeing / pixels_seen if pixels_seen or head is not None else 1.0,
        kl=kl_sum / max(pixels_seen, 1),
        largest_error=largest,
        values=values,
        features={tap: loss.figures() for tap, loss in losses.items() if loss.records},
    )


def _value_errors(cache: Cache, record: int, now: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """Return each array's largest error in a record, relative to its largest magnitude, inf for another shape."""
    errors = {}
    for path, value in now.items():
        room, _, name = path.partition("/")
        row = cache.feature(record, name) if room == "features" else cache.read(record, [path])[path]
        stored = torch.from_numpy(row).double()
        if value is None or value.shape[1:] != stored.shape:
            errors[path] = float("inf")
            continue
        largest = float(stored.abs().max())
        errors[path] = float((value[0].cpu().double() - stored).abs().max()) / (largest or 1.0)
    return errors


def _check_split(records: Records) -> None:
    """Raise MismatchError for records whose original pixels are not available."""
    cache, taught = records.cache, records.cache.manifest.view.teacher_size
    if records.split is None and taught is not None:
        raise MismatchError(
            f"Missing --data: {cache.place} was built at {taught[0]}x{taught[1]}, and does not keep these pixels",
            fix=f"Add --data (the folder of {cache.manifest.dataset.name!r}).",
        )
    records.check_complete()


def _pixels(records: Records, record: int) -> tuple[Array, bool]:
    """Return a record's pixels as the teacher saw them, and whether the data set now renders other pixels.

    The comparison is with the checksum of the student's view, which shows the same image.
    """
    if records.split is None:
        return records.pixels(record), False
    pixels, _ = records.render(record)
    drift = not records.is_same(record, pixels)
    if (teacher_size := records.cache.manifest.view.teacher_size) is not None:
        pixels, _ = records.render(record, teacher_size)
    elif records.cache.pixels_stored:
        pixels = records.pixels(record)
    return pixels, drift
