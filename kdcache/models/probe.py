"""A probe of the numbers that a network returns, with artificial images: probabilities or logits."""

import torch

from kdcache.heads import SEGMENTATION
from kdcache.models.class_map import ClassMapped
from kdcache.models.ensemble import EnsembleModel
from kdcache.models.joint import JointModel
from kdcache.models.native import SegmentationModel, in_eval_mode
from kdcache.models.registry import is_listed

PROBABILITIES = "returns probabilities (in every pixel none is below 0, and they sum to 1) where logits are due"
"""The defect of such a network, for messages."""
_PROBE_PX = 128  # as the probe of foreign networks
_TOLERANCE = 1e-2
"""How far from 1 sums of probabilities may be, in float16 and of many classes."""


def returns_probabilities(model: SegmentationModel) -> bool:
    """Whether, in eval mode, a network gives probabilities where logits are due.

    That is so when on a black image, a smooth one and noise the numbers of every cell sum to 1 and none is below 0.
    For an ensemble that is when any member does; for a model whose classes are mapped, before they are.
    """
    if isinstance(model, EnsembleModel):
        return any(map(returns_probabilities, model.parts))
    if isinstance(model, ClassMapped):
        return returns_probabilities(model.model)
    if isinstance(model, JointModel):
        return any(returns_probabilities(part.model) for part in model.parts if SEGMENTATION in part.heads)
    if model.num_classes < 2 or is_listed(model.spec):  # those give logits
        return False
    like = next(model.parameters(), torch.empty(0))
    try:
        with torch.no_grad(), in_eval_mode(model):  # one by one, as much as any use of the network takes
            return all(_sums_to_one(model, image[None], like) for image in _images())
    except Exception:  # it takes no images of this size, and fails by itself where it is used
        return False


def _sums_to_one(model: SegmentationModel, image_1HW3: torch.Tensor, like: torch.Tensor) -> bool:
    values = model(model.normalise(image_1HW3.to(like.device)).to(like.dtype)).logits.float()
    return bool((values >= 0).all() and ((values.sum(1) - 1).abs() <= _TOLERANCE).all())


def _images() -> torch.Tensor:
    """Black, a ramp of light, and noise; uint8 (3, H, W, 3), always the same."""
    ramp_W = torch.linspace(0, 255, _PROBE_PX).to(torch.uint8)
    noise = torch.randint(0, 256, (_PROBE_PX, _PROBE_PX, 3), generator=torch.Generator().manual_seed(7))
    ramp = ramp_W[None, :, None].expand(_PROBE_PX, _PROBE_PX, 3)
    return torch.stack([torch.zeros_like(ramp), ramp, noise.to(torch.uint8)])
