"""The denominators of the loss without the loss, for processes and accumulated parts that share them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Counted
from .common import cdiv, label_pixels
from .prep import COUNT_COLUMNS, COUNT_ROWS, count_block


@triton.jit(
    do_not_specialize=["H", "W", "view_height", "view_width", "blocks"],
    do_not_specialize_on_alignment=["window_ptr", "flip_ptr"],
)
def count_kernel(
    pixels, window_ptr, flip_ptr, counts_ptr, H, W, view_height, view_width, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count the denominators of CE and KL. One program handles ROWS label rows of one image.

    Shapes and units:
        pixels: `Pixels`, the labels and pixel weights.
        window_ptr: (B, 4) float64 edges in pixels of the view, or None for the whole view. flip_ptr: (B,) uint8, 1 if
            the image is mirrored, or None.
        counts_ptr: (B * blocks, 2) float64 result. Each program writes the sum of the class weights of its labelled
            pixels, and the number of its pixels that KL counts.
        H, W: label size. view_height, view_width: size of the target's view in pixels.
        blocks: programs per image. COLUMNS: label columns that are read at a time.
    """
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    count_block(
        pixels, window_ptr, flip_ptr, counts_ptr + 2 * tl.program_id(0), image, block, H, W, view_height, view_width,
        ROWS, COLUMNS,
    )  # fmt: skip


def count(counted: Counted, device: torch.device) -> Tensor:
    """Compute the denominators of CE and KL on a GPU, without waiting for the GPU.

    The denominators are those of `kdcache_kernels.distill_denominators`.

    Args:
        counted: the labels, class weights and windows of a batch.
        device: the device of the result.
    Returns: (2,) float64, the denominator of CE, then of KL.
    """
    H, W = counted.size
    use_kl = counted.view_size is not None
    view = counted.view_size or (1, 1)
    window = counted.window.to(torch.float64).contiguous() if use_kl and counted.window is not None else None
    flip = None if window is None or counted.flip is None else counted.flip.contiguous().view(torch.uint8)
    pixels = label_pixels(
        counted.labels, counted.class_weight, counted.num_classes, counted.ignore_index,
        use_ce=counted.labels is not None, use_kl=use_kl, distill_void=counted.distill_void,
    )  # fmt: skip
    blocks = cdiv(H, COUNT_ROWS)
    counts = torch.empty((counted.batch * blocks, 2), dtype=torch.float64, device=device)
    if len(counts):
        with torch.cuda.device_of(counts):
            count_kernel[(len(counts),)](
                pixels, window, flip, counts, H, W, *view, blocks,
                ROWS=COUNT_ROWS, COLUMNS=COUNT_COLUMNS, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return counts.sum(0)
