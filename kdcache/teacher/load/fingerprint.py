"""The identity of a teacher: digests, and a probe that detects changed code with the same weights."""

from dataclasses import asdict

import numpy as np
import torch
from torch.nn import functional as F

from kdcache.display import bare
from kdcache.errors import ModelError
from kdcache.models import EnsembleModel, Outputs, SegmentationModel, state_digest
from kdcache.models.foreign.peel import whole_answers
from kdcache.models.foreign.processor import Processor as Expected
from kdcache.store import Fingerprint
from kdcache.store.format.teacher_models import Augmented, Member, Processor
from kdcache.teacher.load.forward import Precision, teach
from kdcache.teacher.load.load import Teacher

_PROBE_SIZE = (96, 128)
_PROBE_GRID = 2


def fingerprint(teacher: Teacher, precision: Precision, device: torch.device) -> Fingerprint:
    """Return the fingerprint of a teacher: digests of its weights, and its outputs for two fixed images.

    The teacher must already be on `device`. `precision` is the floating-point precision of the forward pass.
    """
    model = teacher.model
    members, tta = _ensemble(model)
    size, outputs = _probe(model, precision, device)
    # A network without a head is known by its features.
    maps = outputs.heads or {tap: feature.float().mean(1, keepdim=True) for tap, feature in outputs.features.items()}
    pooled = torch.cat([F.adaptive_avg_pool2d(x.double(), _PROBE_GRID).flatten() for x in maps.values()]).cpu()
    return Fingerprint(
        spec=bare(model.spec),
        weights=state_digest(model),
        precision=precision,
        mean=model.mean,
        std=model.std,
        class_map=teacher.class_map,
        members=members,
        tta=tta,
        folds=teacher.folds,
        folds_by=teacher.folds_by,
        trainings=teacher.trainings,
        parents=teacher.parents,
        probe=tuple(float(f"{value:.6g}") for value in pooled.tolist()),
        probe_size=None if size == _PROBE_SIZE else size,
        processor=None if model.processor == Expected() else Processor(**asdict(model.processor)),
    )


def _probe(model: SegmentationModel, precision: Precision, device: torch.device) -> tuple[tuple[int, int], Outputs]:
    """Return the (H, W) of two fixed images, and the model's outputs for them.

    The size is 96x128 if the model accepts it. Heads include the network's own last resize, as in earlier versions.
    """
    takes_usual = model.fixed_size in (None, _PROBE_SIZE)
    for size in (*((_PROBE_SIZE,) if takes_usual else ()), model.probe_size):
        images = torch.from_numpy(_probe_images(size))
        try:
            with whole_answers():
                return size, teach(model, images, model.probed_taps, precision, device)
        except ModelError:
            if size == model.probe_size:
                raise
    raise AssertionError("the last size returns or raises")


def _ensemble(model: SegmentationModel) -> tuple[tuple[Member, ...], Augmented | None]:
    """Return the members of an ensemble and its augmentation. For a single model, () and None."""
    if not isinstance(model, EnsembleModel):
        return (), None
    members = tuple(
        Member(spec=bare(member.spec), weights=state_digest(member), mean=member.mean, std=member.std, share=share)
        for member, share in zip(model.parts, model.shares, strict=True)
    )
    return members, None if model.tta is None else Augmented(flip=model.tta.flip, scales=model.tta.scales)


def _probe_images(size: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return two fixed images, uint8 (2, H, W, 3): smooth waves, and waves under noise."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9 + y / 23), np.cos(x / 17 - y / 11), np.sin(x * y / 700)], axis=-1)
    smooth = 127.5 + 110 * waves
    noise = np.random.Generator(np.random.PCG64(7)).integers(-60, 61, smooth.shape)
    return np.clip(np.stack([smooth, smooth[::-1] + noise]), 0, 255).astype(np.uint8)
