"""What identifies a teacher: digests, and a probe that catches code that changed under the same weights."""

import numpy as np
import torch
from torch.nn import functional as F

from kdcache.display import bare
from kdcache.models import EnsembleModel, JointModel, SegmentationModel, state_digest
from kdcache.store import Fingerprint
from kdcache.store.format.manifest_models import Augmented, Member
from kdcache.teacher.load.forward import Precision, teach
from kdcache.teacher.load.load import Teacher

_PROBE_SIZE = (96, 128)
_PROBE_GRID = 2


def fingerprint(teacher: Teacher, precision: Precision, device: torch.device) -> Fingerprint:
    """Fingerprint of a teacher that is already on `device`."""
    model = teacher.model
    members, tta = _ensemble(model)
    probed = () if model.head_kinds else model.taps[-1:]
    outputs = teach(model, torch.from_numpy(_probe_images()), probed, precision, device)
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
    )


def _ensemble(model: SegmentationModel) -> tuple[tuple[Member, ...], Augmented | None]:
    """The members of an ensemble and its augmentation."""
    if isinstance(model, JointModel):
        return _ensemble(model.parts[0].model)
    if not isinstance(model, EnsembleModel):
        return (), None
    members = tuple(
        Member(spec=bare(member.spec), weights=state_digest(member), mean=member.mean, std=member.std, share=share)
        for member, share in zip(model.parts, model.shares, strict=True)
    )
    return members, None if model.tta is None else Augmented(flip=model.tta.flip, scales=model.tta.scales)


def _probe_images() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Two fixed images, uint8 (2, H, W, 3): smooth waves, and waves under noise."""
    height, width = _PROBE_SIZE
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9 + y / 23), np.cos(x / 17 - y / 11), np.sin(x * y / 700)], axis=-1)
    smooth = 127.5 + 110 * waves
    noise = np.random.Generator(np.random.PCG64(7)).integers(-60, 61, smooth.shape)
    return np.clip(np.stack([smooth, smooth[::-1] + noise]), 0, 255).astype(np.uint8)
