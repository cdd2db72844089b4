"""Probe a network's numbers with artificial images: logits, or something else."""

from contextlib import suppress
from typing import NamedTuple

import torch

from kdcache.models.added_heads.wrapper import Wrapper
from kdcache.models.class_map import ClassMapped
from kdcache.models.ensemble import EnsembleModel
from kdcache.models.logits import AsLogits
from kdcache.models.native import SegmentationModel, in_eval_mode
from kdcache.models.registry import is_listed

_TOLERANCE = 1e-2
"""How far sums of probabilities may be from 1, in float16 and with many classes."""


class NotLogits(NamedTuple):
    """The reason why a network's outputs are not logits.

    Attributes:
        text: what the outputs are, as the end of a sentence that begins with the network's name.
        fix: what the user can do.
        certain: False if they may be logits after all.
    """

    text: str
    fix: str
    certain: bool


def not_logits(model: SegmentationModel, size: tuple[int, int] | None = None) -> NotLogits | None:
    """Return why a network's outputs are not logits, or None if they seem to be or the network fails.

    The network runs on a black image, a smooth image and noise. If all outputs lie in 0 to 1, they are not logits. If
    no output is negative, they may not be logits, and the result has `certain` False. If the model declares other
    outputs, such as `outputs=sigmoid`, the numbers must match that declaration instead. A listed model, a
    model of one class, and `outputs=logits` give None without a run.

    Args:
        model: the network. For an ensemble, its members are tested in turn. For a class-mapped model, the classes
            before the map are tested.
        size: (H, W) of the images to try if the network fails on images of its `probe_size`. None tries no others.
    """
    if isinstance(model, EnsembleModel):
        found = [not_logits(part, size) for part in model.parts]
        return next((each for each in found if each is not None), None)
    while isinstance(model, ClassMapped | Wrapper) and not isinstance(model, AsLogits):
        model = model.model
    stated, asked = None, model
    while isinstance(asked, AsLogits):
        stated, asked = asked.outputs or stated, asked.model
    if model.num_classes < 2 or stated == "logits" or (stated is None and is_listed(model.spec)):  # these give logits
        return None
    findings = _seen(asked, size)
    return None if findings is None else _judged(*findings, stated, one=asked.num_classes == 1)


def _judged(low: float, high: float, sums_to_one: bool, stated: str | None, *, one: bool) -> NotLogits | None:
    within = low >= 0 and 0 < high <= 1 + 1e-3
    numbers = f"returns numbers from {low:.3g} to {high:.3g}"
    if stated is not None:
        if not within:
            return NotLogits(f"{numbers}, which are not of outputs={stated}", f"leave out ,outputs={stated}", True)
        if sums_to_one != (stated == "probabilities") and not one:
            better = "probabilities" if sums_to_one else "sigmoid"
            sums = "sum to 1" if sums_to_one else "do not sum to 1"
            return NotLogits(f"returns numbers that {sums} in every pixel", f"write ,outputs={better}", False)
        return None
    if within:
        sums_to_one = sums_to_one and not one
        kind = "probabilities" if sums_to_one else "sigmoid"
        words = "probabilities (no number is below 0, and those of a pixel sum to 1)"
        return NotLogits(
            f"returns {words}" if sums_to_one else f"{numbers}, as after a sigmoid",
            f"return what comes before the {'softmax' if sums_to_one else 'sigmoid'}, or write MODEL,outputs={kind}; "
            "if they are logits all the same, MODEL,outputs=logits",
            True,
        )
    if low >= 0 and high > 0:
        return NotLogits(
            f"{numbers} and none below 0",
            "check that they are logits, without a ReLU, a softmax in percent or class numbers; MODEL,outputs=logits "
            "says that they are",
            False,
        )
    return None


def _seen(model: SegmentationModel, size: tuple[int, int] | None) -> tuple[float, float, bool] | None:
    """Return the smallest output, the largest, and whether each pixel sums to 1. None if the network fails."""
    like = next(model.parameters(), torch.empty(0))
    for tried in dict.fromkeys((model.probe_size, size or model.probe_size)):
        with suppress(Exception), torch.no_grad(), in_eval_mode(model):  # one by one, as much as any use takes
            lows, highs, sums_to_one = [], [], True
            for image_HW3 in _images(tried):
                x_13HW = model.normalise(image_HW3[None].to(like.device)).to(like.dtype)
                values = model(x_13HW).logits.float()
                lows.append(float(values.min()))
                highs.append(float(values.max()))
                sums_to_one = sums_to_one and bool(((values.sum(1) - 1).abs() <= _TOLERANCE).all())
            return min(lows), max(highs), sums_to_one
    return None


def _images(size: tuple[int, int]) -> torch.Tensor:
    """Return three fixed images, uint8 (3, H, W, 3): black, a ramp of light, and noise."""
    ramp_W = torch.linspace(0, 255, size[1]).to(torch.uint8)
    noise = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(7))
    ramp = ramp_W[None, :, None].expand(*size, 3)
    return torch.stack([torch.zeros_like(ramp), ramp, noise.to(torch.uint8)])
