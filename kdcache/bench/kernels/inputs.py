"""The tensors of a case.

Logits are random with a spread of 3 and a fixed seed, so a case has the same tensors in every process and on every
device. Labels lie in blobs, as in images: the 4 rows of 124 pixels that a warp of the Triton kernel takes at stride 4
show 2 classes of CamVid, and as many here. A tenth of the pixels is void, also in blobs. (Labels drawn pixel by pixel
put every class into every warp, which costs a quarter more instructions.)

Everything that a rival may prepare before the clock starts is prepared here (int64 labels, masks and their sums, dense
float32 teacher logits, sampling positions), so a rival never pays for our storage format.

Legend: B batch, C classes, k kept classes, H W label size, h w logits' own size, H* W* the size at which student and
teacher are compared: the labels', or the logits' if a kind compares cells.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.bench.kernels.shapes import DTYPES, KINDS, Case, Shape
from kdcache.data import draw_window
from kdcache_kernels import PackedTarget, pack
from kdcache_kernels.target_cells import area_mean
from kdcache_kernels.window import view_positions

VOID_SHARE = 0.1
LOGIT_SPREAD = 3.0
BLOBS, LABEL_STEP = 4, 4
"""Blobs along an axis of an image, and pixels to which their edges are drawn."""
RARITY = 0.8
"""Spread of what classes have in common over an image, in units of what varies: some are rare."""
ZOOM = (0.5, 2.0)
"""The default of `--scale`."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case of the benchmark.

    (H*, W*) is the size at which the loss compares student and teacher: (H, W), or (h, w) if `Kind.on_cells`.

    Attributes:
        student: (B, C, h, w) logits, the leaf that receives the gradient.
        labels: (B, H, W) uint8, or int16 if 255 is a class.
        target: packed teacher logits.
        class_weight: (C,) float32 for the cross-entropy, or None for weights of 1.
        window, flip: (B, 4) float64 and (B,) bool, as in `kdcache_kernels.distill_loss`, or None.
        teacher: (B, C, h, w) float32, the target's logits of all classes. Only the rivals, the implementations that
            kdcache is compared with, use this field and the fields below.
        labels_int64: (B, H, W) int64, the same labels.
        mask: (B, H*, W*) float32, 1 for pixels that count in the loss against the teacher, else 0. If `Kind.on_cells`,
            the share of each cell's area whose pixels count.
        grid: (B, H*, W*, 2) float32, where `grid_sample` samples the teacher, or None for whole views.
        ce_count, kl_count: 0-dimensional float32: the sum of the labelled pixels' class weights, and the sum of the
            mask.
    """

    student: Tensor
    labels: Tensor
    target: PackedTarget
    class_weight: Tensor | None
    window: Tensor | None
    flip: Tensor | None
    teacher: Tensor
    labels_int64: Tensor
    mask: Tensor
    grid: Tensor | None
    ce_count: Tensor
    kl_count: Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the tensors of a case from a fixed seed, so that they are equal in every process and on every device.

    On the meta device, the tensors have shapes but no values.
    """
    shape, kind = case.shape, KINDS[case.kind]
    B, C = shape.batch, shape.num_classes
    generator, meta = torch.Generator().manual_seed(0), device.type == "meta"

    def logits() -> Tensor:
        if meta:
            return torch.empty(B, C, *shape.native, device=device)
        return (torch.randn(B, C, *shape.native, generator=generator) * LOGIT_SPREAD).to(device)

    student = logits().to(DTYPES[case.dtype]).requires_grad_()
    target = PackedTarget(*pack(logits(), case.k), C, shape.size)
    labels = torch.empty((B, *shape.size), dtype=torch.int64, device=device) if meta else draw_labels(shape, generator)
    labels = labels.to(device)
    labelled = labels != shape.ignore_index
    class_weight = _class_weight(C, generator).to(device) if kind.trained else None
    window, flip = _windows(shape, device) if kind.drawn else (None, None)
    counted, grid = labelled if not kind.trained else torch.ones_like(labelled), None
    compared = shape.native if kind.on_cells else shape.size
    if window is not None:
        counted = view_positions(window, flip, shape.size, shape.size, device).inside()
        at = view_positions(window, flip, shape.size, compared, device)
        grid = _grid(at.y, at.x, shape.size, compared)
    mask = counted.float() if compared == shape.size else area_mean(counted[:, None].float(), compared)[:, 0]
    weight_BHW = labelled.float() if class_weight is None else class_weight[labels.clamp(0, C - 1)] * labelled
    return Inputs(
        student=student,
        labels=labels.to(torch.uint8 if shape.ignore_index == 255 else torch.int16),
        target=target,
        class_weight=class_weight,
        window=window,
        flip=flip,
        teacher=target.densify().contiguous(),
        labels_int64=labels,
        mask=mask,
        grid=grid,
        ce_count=weight_BHW.double().sum().float(),
        kl_count=mask.double().sum().float(),
    )


def draw_labels(shape: Shape, generator: torch.Generator) -> Tensor:
    """Draw random labels in which each class fills smooth blobs of pixels. Return (B, H, W) int64.

    A tenth of the pixels is void (`shape.ignore_index`). `generator` is the source of the random numbers.
    """
    H, W = shape.size
    rarity_C11 = RARITY * torch.randn(shape.num_classes, 1, 1, generator=generator)
    images = []
    for _ in range(shape.batch):  # one after the other: 150 classes of a batch would not be small
        classes_hw = (_noise(shape.num_classes, shape, generator) + rarity_C11).argmax(0)
        void_hw = _noise(1, shape, generator)[0]
        classes_hw[void_hw < void_hw.quantile(VOID_SHARE)] = shape.ignore_index
        images.append(classes_hw.repeat_interleave(LABEL_STEP, 0).repeat_interleave(LABEL_STEP, 1)[:H, :W])
    return torch.stack(images)


def _noise(channels: int, shape: Shape, generator: torch.Generator) -> Tensor:
    """Smooth noise (channels, H / LABEL_STEP, W / LABEL_STEP), rounded up."""
    coarse = torch.randn(1, channels, BLOBS + 1, BLOBS + 1, generator=generator)
    size = tuple(-(-n // LABEL_STEP) for n in shape.size)
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False)[0]


def _class_weight(num_classes: int, generator: torch.Generator) -> Tensor:
    """Draw class weights like `--class-weights sqrt`: within a factor of about 10, 1 on average."""
    weight_C = (0.6 * torch.randn(num_classes, generator=generator)).exp()
    return weight_C / weight_C.mean()


def _windows(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw a window and a flip of every image as trainings do that warp."""
    rng = np.random.default_rng(0)
    drawn = [draw_window(rng, shape.size, ZOOM, True) for _ in range(shape.batch)]
    corners = [(window.y0, window.x0, window.y1, window.x1) for window, _ in drawn]
    flips = [flip for _, flip in drawn]
    return torch.tensor(corners, dtype=torch.float64, device=device), torch.tensor(flips, device=device)


def _grid(y_BH: Tensor, x_BW: Tensor, view: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return positions in a view, in pixels, as `grid_sample` takes them: from -1 to 1, edge to edge, x first."""
    y_BHW = (2 * y_BH / view[0] - 1)[:, :, None].expand(-1, *size)
    x_BHW = (2 * x_BW / view[1] - 1)[:, None, :].expand(-1, *size)
    return torch.stack((x_BHW, y_BHW), -1).float()
