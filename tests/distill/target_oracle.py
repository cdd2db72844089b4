"""The teacher at the pixels of the student's image, by torch's grid_sample in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.distill import SEGMENTATION, Batch, Target

C, LABEL, GRID = 5, (23, 37), (6, 9)
VIEW = (22, 34)


class Format:
    """What a store tells of its targets."""

    def __init__(self, align_corners: bool = False) -> None:
        self.num_classes, self.view_size, self.align_corners = C, VIEW, align_corners


def dense_target(batch: int = 3, *, moved: bool = True, seed: int = 1) -> Batch:
    """Targets of random logits without labels; each of the first three shows another window."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(batch, C, *GRID, generator=generator)
    window = torch.tensor([0.0, 0.0, *VIEW], dtype=torch.float64).repeat(batch, 1)
    flip = torch.zeros(batch, dtype=torch.bool)
    if moved:
        window[1] = torch.tensor([3.3, 5.25, 14.8, 22.0])  # inside
        window[2] = torch.tensor([-6.5, -3.0, 30.0, 50.5])  # around
        flip[1] = True
    values = (logits - logits.amax(1, keepdim=True)).half()
    return Batch(targets={SEGMENTATION: Target(values)}, window=window, flip=flip)


def top_k(batch: Batch, k: int = 2) -> Batch:
    dense = values_of(batch).double()
    values, indices = dense.topk(k, 1)
    rest = dense.scatter(1, indices, -math.inf)
    tail = rest.logsumexp(1) - values.logsumexp(1)
    return replace(batch, targets={SEGMENTATION: Target(values.half(), indices.to(torch.uint8), tail.half())})


def labelled(batch: Batch, label: Tensor, own: Tensor | None = None) -> Batch:
    """The batch with labels, and where its pixels are its own."""
    return replace(batch, labels={SEGMENTATION: label}, own=own)


def values_of(batch: Batch) -> Tensor:
    assert batch.target is not None
    return batch.target.values


def densified(target: Target) -> Tensor:
    """A missing class gets LSE(kept) + tail - log(C - k)."""
    values = target.values.double()
    if target.indices is None or target.tail is None:
        return values
    missing = values.logsumexp(1) + target.tail.double() - math.log(C - values.shape[1])
    return missing[:, None].repeat(1, C, 1, 1).scatter(1, target.indices.long(), values)


def upsampled(batch: Batch, align_corners: bool) -> tuple[Tensor, Tensor]:
    """The target at label size through its windows, and which pixels lie in the view."""
    assert batch.target is not None
    assert batch.window is not None
    assert batch.flip is not None
    logits, images, inside = densified(batch.target), [], []
    for one, window, flip in zip(logits, batch.window, batch.flip, strict=True):
        y0, x0, y1, x1 = window.tolist()
        y = y0 + (torch.arange(LABEL[0], dtype=torch.float64) + 0.5) * (y1 - y0) / LABEL[0]
        x = x0 + (torch.arange(LABEL[1], dtype=torch.float64) + 0.5) * (x1 - x0) / LABEL[1]
        x = x.flip(0) if flip else x
        # grid_sample counts from -1 to 1 between outer edges, or between the outermost centres.
        gy, gx = (
            (2 * (p - 0.5) / (n - 1) if align_corners else 2 * p / n) - 1 for p, n in ((y, VIEW[0]), (x, VIEW[1]))
        )
        grid = torch.stack([gx.expand(*LABEL), gy[:, None].expand(*LABEL)], -1)[None]
        images.append(F.grid_sample(one[None], grid, padding_mode="border", align_corners=align_corners)[0])
        inside.append(((y >= 0) & (y <= VIEW[0]))[:, None] & ((x >= 0) & (x <= VIEW[1]))[None])
    return torch.stack(images), torch.stack(inside)


def kl_pixels(student: Tensor, target: Batch, temperature: float = 2.0) -> tuple[Tensor, Tensor]:
    """T^2 KL of every pixel (B, H, W), and which pixels lie in the view."""
    z = F.interpolate(student.double(), LABEL, mode="bilinear")
    t, inside = upsampled(target, False)
    p, q = ((x / temperature).log_softmax(1) for x in (z, t))
    return temperature**2 * F.kl_div(p, q, reduction="none", log_target=True).sum(1), inside


def inputs(seed: int = 0, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(batch, C, 7, 10, generator=generator)
    label = torch.randint(0, C, (batch, *LABEL), generator=generator, dtype=torch.uint8)
    label[torch.rand(batch, *LABEL, generator=generator) < 0.2] = 255
    return student, label
