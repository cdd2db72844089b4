"""Is what the store holds what the teacher says? Scores against labels, and a sample against the teacher itself."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.data import IGNORE_INDEX, Split, pixel_checksum
from kdcache.errors import MismatchError
from kdcache.evaluate import ConfusionMatrix, Metrics
from kdcache.store import Cache, check_origin
from kdcache.teacher.build import pack_batch
from kdcache.teacher.fingerprint import fingerprint
from kdcache.teacher.forward import Precision, place, teach
from kdcache.teacher.records import Array, render_again
from kdcache.teacher.source import Teacher
from kdcache_kernels import PackedTarget, densify, target_argmax_confidence

# Other hardware rounds differently; another teacher differs by orders of magnitude more.
MIN_AGREEMENT = 0.995
MAX_KL = 1e-3


@dataclass(frozen=True)
class Agreement:
    """Stored targets beside the teacher's own, over a sample of records.

    Attributes:
        fingerprint: what differs between the store's teacher and this one, in words.
        drifted: records whose pixels are no longer those that were taught on.
        argmax: share of target pixels with the same best class.
        kl: mean KL(teacher || stored) in nats at T = 1; largest_error: of any probability-relevant logit.
    """

    records: int
    fingerprint: tuple[str, ...]
    drifted: tuple[str, ...]
    argmax: float
    kl: float
    largest_error: float

    @property
    def ok(self) -> bool:
        return not self.fingerprint and not self.drifted and self.argmax >= MIN_AGREEMENT and self.kl <= MAX_KL


def _spread(there: int, limit: int) -> list[int]:
    """At most `limit` numbers below `there`, evenly spread."""
    return sorted({int(number) for number in np.linspace(0, there - 1, min(limit, there)).round()})


def score_cache(cache: Cache, split: Split | None, limit: int = 512) -> Metrics | None:
    """The teacher's metrics on the labels of whole images at view size, read back; None without labels.

    Of a store that has crops alone, on the first crop of each image.

    Args:
        split: gives the labels of a store that keeps none.
    """
    labelled = cache.column("labelled")
    confusion = ConfusionMatrix(cache.manifest.dataset.class_names, IGNORE_INDEX)
    for record in map(cache.manifest.record, _spread(cache.manifest.dataset.samples, limit)):
        if not labelled[record]:
            continue
        target = packed_target(cache, [record])
        argmax, _ = target_argmax_confidence(target, cache.view_size)
        confusion.update(argmax[0], torch.from_numpy(_label(cache, split, record)))
    return confusion.metrics() if confusion.counts.sum() else None


def packed_target(cache: Cache, records: list[int]) -> PackedTarget:
    """The segmentation target of some records, as the kernels take it."""
    rows = [cache.read(record, cache.target_paths()) for record in records]
    parts = {
        path.rsplit("/", 1)[1]: torch.from_numpy(np.stack([r[path] for r in rows])) for path in cache.target_paths()
    }
    return PackedTarget(
        values=parts["values"],
        indices=parts.get("indices"),
        tail=parts.get("tail"),
        num_classes=cache.num_classes,
        view_size=cache.view_size,
        align_corners=cache.align_corners,
    )


def compare_teacher(
    cache: Cache, teacher: Teacher, split: Split | None, device: torch.device, limit: int = 16
) -> Agreement:
    """Run the teacher again on a sample of records and compare.

    Args:
        split: the data set; needed when the store keeps no pixels, used to find drift otherwise.
    Raises: MismatchError when the store keeps no pixels and no data set is given, or another one than it was
        built from.
    """
    _check_split(cache, split)
    precision: Precision = cache.manifest.teacher.precision  # type: ignore[assignment]
    place(teacher.model, device)
    differences = cache.manifest.teacher.differences(fingerprint(teacher, precision, device))
    folds = cache.column("fold").tolist() if teacher.folds and "records/fold" in cache.specs else [None] * len(cache)
    grid = cache.head.size if cache.head.resampled else None
    agreeing = pixels_seen = 0
    kl_sum = largest = 0.0
    drifted = []
    records = _spread(len(cache), limit)
    for record, pixels, drift in _pixels(cache, split, records):
        if drift:
            drifted.append(cache.ids[record // cache.manifest.view.views_per_sample])
        model = teacher.speaker(folds[record])
        logits, _ = teach(model, torch.from_numpy(pixels)[None], (), precision, device, grid)
        again = pack_batch(logits.cpu(), {}, cache.head.k)
        stored = packed_target(cache, [record])
        if again["targets/segmentation/values"].shape != stored.values.shape:
            differences.append("targets: the teacher gives another number of classes or another size")
            break
        now = densify(
            again["targets/segmentation/values"],
            again.get("targets/segmentation/indices"),
            again.get("targets/segmentation/tail"),
            cache.num_classes,
        ).double()
        then = densify(stored.values, stored.indices, stored.tail, cache.num_classes).double()
        agreeing += int((now.argmax(1) == then.argmax(1)).sum())
        pixels_seen += now[0, 0].numel()
        p = now.softmax(1)
        kl_sum += float((p * (now.log_softmax(1) - then.log_softmax(1))).sum())
        # Far below the maximum a logit carries no probability, and fp16 is coarse there.
        relevant = (now > -20) | (then > -20)
        largest = max(largest, float((now - then).abs()[relevant].max()))
    return Agreement(
        records=len(records),
        fingerprint=tuple(differences),
        drifted=tuple(drifted),
        argmax=agreeing / max(pixels_seen, 1),
        kl=kl_sum / max(pixels_seen, 1),
        largest_error=largest,
    )


def _check_split(cache: Cache, split: Split | None) -> None:
    """What the teacher saw must be there."""
    about, taught = cache.manifest.dataset, cache.manifest.view.teacher_size
    if split is None and taught is not None:
        raise MismatchError(
            "a teacher is asked again about what it saw, which no store keeps where it was larger than the views",
            received=f"{cache.place} was taught at {taught[0]}x{taught[1]}, and no data set was given",
            remedy=f"add --data (the folder of {about.name!r})",
        )
    check_origin(cache, split, needed=True)


def _pixels(cache: Cache, split: Split | None, records: list[int]) -> Iterator[tuple[int, Array, bool]]:
    """(record, pixels as taught, whether the data set now renders other pixels).

    The checksum is of the view alone: both renderings are of one image, and what moves no byte of the student's is
    no drift to it.
    """
    checksums, teacher_size = cache.column("pixel_checksum"), cache.manifest.view.teacher_size
    for record in records:
        drift = False
        pixels = None
        if split is not None:
            pixels, _ = render_again(split, cache, record)
            drift = pixel_checksum(pixels) != int(checksums[record])
        if teacher_size is not None:
            assert split is not None
            pixels, _ = render_again(split, cache, record, teacher_size)
        elif cache.pixels_stored:
            pixels = cache.read(record, ["pixels/image"])["pixels/image"]
        assert pixels is not None
        yield record, pixels, drift


def _label(cache: Cache, split: Split | None, record: int) -> Array:
    if cache.pixels_stored:
        return cache.read(record, ["labels/segmentation"])["labels/segmentation"]
    assert split is not None
    return render_again(split, cache, record)[1]
