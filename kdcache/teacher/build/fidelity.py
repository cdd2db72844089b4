"""Measure what storing loses: stored targets against the teacher's raw logits.

They are compared after bilinear upsampling to the view's size, where the loss reads them: between target pixels
rounding errors mix, and near-ties change sides. T is 1 and 4, because the temperature lifts classes of no probability.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.store import Codec, Fidelity, round_targets
from kdcache_kernels import LOGIT_LIMIT, densify, pack

BAND_NUMBERS = 2_000_000  # of a band of rows of the view, all classes: 16 MB in float64


@torch.inference_mode()
def measure_fidelity(
    logits: Iterable[Tensor], k: int, codec: Codec, size: tuple[int, int], *, align_corners: bool
) -> Fidelity:
    """Measure what a cache loses of its teacher's logits by keeping k classes and rounding.

    Raw and stored logits are compared after bilinear upsampling to the view's size.

    Args:
        logits: raw logits, float32 (C, h, w), of each measured image. At least one.
        k: number of stored classes.
        codec: how arrays are compressed: `default`, `small` or `none`.
        size: (H, W) of the view in pixels.
        align_corners: whether the upsampling aligns corners.
    Memory: O(C*h*w), and a few rows of the view.
    """
    means = torch.zeros(3, dtype=torch.float64)  # KL at T = 1 and at T = 4, argmax agreement
    worst, records = 0.0, 0
    for raw_Chw in logits:
        records += 1
        exact_Chw = (raw_Chw - raw_Chw.amax(0)).clamp_(min=-LOGIT_LIMIT)  # -inf would be NaN beside anything finite
        stored_Chw = _as_stored(raw_Chw, k, codec)
        for exact_CbW, stored_CbW in zip(
            _bands(exact_Chw, size, align_corners), _bands(stored_Chw, size, align_corners), strict=True
        ):
            kl_t1_bW, kl_t4_bW = kl_of_pixels(exact_CbW, stored_CbW)
            agreeing_bW = exact_CbW.argmax(0) == stored_CbW.argmax(0)
            means += torch.stack([kl_t1_bW.sum(), kl_t4_bW.sum(), agreeing_bW.sum()]).cpu()
            worst = max(worst, float(kl_t1_bW.max()))
    kl_t1, kl_t4, agreement = (means / (records * size[0] * size[1])).tolist()
    return Fidelity(
        records=records,
        kl_t1=_figure(kl_t1),
        kl_t1_max=_figure(worst),
        kl_t4=_figure(kl_t4),
        argmax_agreement=round(agreement, 7),
    )


def _as_stored(raw_Chw: Tensor, k: int, codec: Codec) -> Tensor:
    """Return dense logits (C, h, w), as a reader of the cache would make them."""
    parts = zip(("values", "indices", "tail"), pack(raw_Chw[None], k), strict=True)
    rows = {f"targets/segmentation/{name}": part.cpu().numpy() for name, part in parts if part is not None}
    values, *others = (torch.from_numpy(part).to(raw_Chw.device) for part in round_targets(rows, codec).values())
    indices, tail = others or (None, None)
    return densify(values, indices, tail, len(raw_Chw))[0]


def _bands(x_Chw: Tensor, size: tuple[int, int], align_corners: bool) -> Iterator[Tensor]:
    """Yield the bilinear upsampling to `size` in float64, a band of rows (C, b, W) at a time."""
    (H, W), (C, h, _) = size, x_Chw.shape
    row_H = torch.arange(H, dtype=torch.float64, device=x_Chw.device)
    at_H = row_H * (h - 1) / max(H - 1, 1) if align_corners else (row_H + 0.5) * h / H - 0.5
    for at_b in torch.split(at_H.clamp(0, h - 1), max(1, BAND_NUMBERS // (C * W))):
        above_b = at_b.long()
        below_b = (above_b + 1).clamp(max=h - 1)
        band_Cbw = torch.lerp(x_Chw[:, above_b].double(), x_Chw[:, below_b].double(), (at_b - above_b)[:, None])
        yield F.interpolate(band_Cbw[None], (len(at_b), W), mode="bilinear", align_corners=align_corners)[0]


def kl_of_pixels(exact_CbW: Tensor, stored_CbW: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(exact || stored) of each pixel in nats, at temperature 1 and at temperature 4.

    Args:
        exact_CbW: raw logits of b rows of pixels, (C, b, W).
        stored_CbW: stored logits of the same pixels, (C, b, W).
    Returns: two tensors (b, W).
    """
    exact_CbW, stored_CbW = (x - x.amax(0) for x in (exact_CbW, stored_CbW))
    excess_CbW = exact_CbW - stored_CbW
    # Exponentials are what this costs: e^x is the fourth power of e^(x/4).
    p_CbW, q_CbW = (exact_CbW / 4).exp_(), (stored_CbW / 4).exp_()
    kl_t4_bW = _divergence(p_CbW, q_CbW, excess_CbW / 4)
    return _divergence(p_CbW.square_().square_(), q_CbW.square_().square_(), excess_CbW), kl_t4_bW


def _divergence(p_CbW: Tensor, q_CbW: Tensor, excess_CbW: Tensor) -> Tensor:
    """Return KL(p || q) for each pixel from unnormalised probabilities p and q, and their log ratio."""
    mass_bW = p_CbW.sum(0)
    return (p_CbW * excess_CbW).sum(0) / mass_bW + (q_CbW.sum(0) / mass_bW).log()


def _figure(nats: float) -> float:
    """Round to three digits, because the last bits differ between machines. Values below 0 are rounding errors."""
    return max(0.0, float(f"{nats:.3g}"))
