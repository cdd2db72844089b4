"""How a model sees whole images (at its own size, squashed, padded or in windows), and how its outputs are merged.

A padded image is seen as a whole, amid grey, and its outputs are read at its place. In windows, an image is cut into
parts that overlap and cover it. Their outputs are summed and divided by the number of windows per pixel
(mmsegmentation's `slide` inference: the last window of a row ends at the border). A model that learnt from crops sees
as many of them as cover the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcache.data import Fit, Window, whole_window
from kdcache.errors import RecipeError
from kdcache.models import SegmentationModel
from kdcache.settings.shared import ImageSettings, JudgeSettings

Size = tuple[int, int]


@dataclass(frozen=True)
class Framing:
    """How a model sees an image: resized to its input size, or cut into overlapping windows.

    Args:
        fit: how an image of another aspect ratio is fitted into the input size: "squash", "pad" or "crop". The
            fit "crop" cuts the image into windows of that size.
        window: (H, W) of windows in pixels. None cuts windows only for "crop".
        stride: (H, W) from one window to the next, in pixels. None takes two thirds of the window.
        whole: (H, W) that the image is resized to, by `fit`, before windows are cut. None keeps the image's size.

    Raises: RecipeError for a stride without windows, or larger than the window.
    """

    fit: Fit = "squash"
    window: Size | None = None
    stride: Size | None = None
    whole: Size | None = None

    @classmethod
    def of(cls, settings: ImageSettings, judge: JudgeSettings, trained: Fit = "squash") -> Framing:
        """Return the framing from `settings` (fit and size) and `judge` (window and stride).

        The fit "auto" becomes `trained`, the fit of the model's training.

        Raises: RecipeError for a stride without windows, or larger than the window.
        """
        fit = trained if settings.fit == "auto" else settings.fit
        return cls(fit, judge.window, judge.stride, None if judge.window is None else settings.size)

    def __post_init__(self) -> None:
        if self.stride is not None and self.window is None:
            raise RecipeError(
                f"--stride {_text(self.stride)} needs --window", fix="Add --window HxW, or leave --stride out."
            )
        if self.window is not None and any(s > w for s, w in zip(self.steps, self.window, strict=True)):
            raise RecipeError(
                f"--stride {_text(self.steps)} is larger than --window {_text(self.window)}, so windows leave gaps",
                fix=f"Leave it out, or use --stride {_text(_two_thirds(self.window))}",
            )

    @property
    def slides(self) -> bool:
        """Whether the model sees an image in windows."""
        return self.window is not None or self.fit == "crop"

    @property
    def steps(self) -> Size:
        """The distance (H, W) from one window to the next, in pixels. Only for a framing with a window."""
        assert self.window is not None
        return self.stride or _two_thirds(self.window)

    def view(self, image_size: Size, size: Size) -> Window:
        """Return the part of an image that fills the model's input if no window slides, in pixels of the image.

        If images are padded, the part reaches beyond the image.

        Args:
            image_size: (H, W) of the image.
            size: (H, W) of the model's input.
        """
        return whole_window(self.fit, image_size, size)

    def scaled(self, image_size: Size, size: Size) -> Size:
        """Return the size (H, W) that an image is resized to before windows are cut.

        With a set window, it follows from `whole`, or is the image's own size without `whole`. Otherwise it follows
        from the model's input size.

        Args:
            image_size: (H, W) of the image.
            size: (H, W) of the model's input.
        """
        target = size if self.window is None else self.whole
        if target is None:
            return image_size
        if self.fit == "squash":
            return target
        factors = [to / of for to, of in zip(target, image_size, strict=True)]
        factor = max(factors) if self.fit == "crop" else min(factors)
        least = target if self.fit == "crop" else (1, 1)
        height, width = (max(1, low, round(side * factor)) for side, low in zip(image_size, least, strict=True))
        return height, width

    def parts(self, scaled: Size, size: Size, name: str) -> list[tuple[int, int]]:
        """Return the top left corner (y, x) of each window, so that the windows cover an image of size `scaled` (H, W).

        Args:
            scaled: (H, W) of the image, in pixels, after it was resized for windows.
            size: (H, W) of the model's input. It is the size of a window if `window` is None.
            name: the image's name in the error message.
        Raises: RecipeError for windows larger than the image.
        """
        window, step = (size, size) if self.window is None else (self.window, self.steps)
        if any(w > side for w, side in zip(window, scaled, strict=True)):
            raise RecipeError(
                f"--window {_text(window)} is larger than {name}, which is {_text(scaled)} (height x width)",
                fix="Use a smaller --window, or a larger --size, which resizes the image before windows are cut.",
            )
        rows, columns = (list(_starts(side, w, s)) for side, w, s in zip(scaled, window, step, strict=True))
        return [(row, column) for row in rows for column in columns]

    def part_size(self, size: Size) -> Size:
        """Return (H, W) of a window in pixels. Without a set window, it is the model's input `size`."""
        return self.window or size


def slide(
    model: SegmentationModel,
    pixels_HW3: Tensor,
    framing: Framing,
    size: Size,
    heads: tuple[str, ...],
    *,
    batch_size: int,
    name: str = "an image",
) -> dict[str, Tensor]:
    """Run a model on overlapping windows of an image. Return each head's mean output, float32 (C, H, W), by name.

    Args:
        model: the model.
        pixels_HW3: the image, uint8, on the model's device, resized to `Framing.scaled`.
        framing: the windows.
        size: (H, W) of the model's input, which is the window if `framing` has none.
        heads: names of the heads to return.
        batch_size: windows per forward pass.
        name: the image's name in error messages.
    Raises: RecipeError for windows larger than the image.
    """
    height, width = pixels_HW3.shape[:2]
    starts, (h, w) = framing.parts((height, width), size, name), framing.part_size(size)
    sums: dict[str, Tensor] = {}
    counts_HW = torch.zeros(height, width, device=pixels_HW3.device)
    for first in range(0, len(starts), batch_size):
        some = starts[first : first + batch_size]
        windows = torch.stack([pixels_HW3[y : y + h, x : x + w] for y, x in some])
        outputs = model(model.normalise(windows)).heads
        for head in heads:
            output_BChw = model.upsample(outputs[head].float(), (h, w))
            if head not in sums:
                sums[head] = output_BChw.new_zeros(output_BChw.shape[1], height, width)
            for output_Chw, (y, x) in zip(output_BChw, some, strict=True):
                sums[head][:, y : y + h, x : x + w] += output_Chw
        for y, x in some:
            counts_HW[y : y + h, x : x + w] += 1
    return {head: total.div_(counts_HW) for head, total in sums.items()}


def at_image(
    model: SegmentationModel, output_Chw: Tensor, image_size: Size, view: Window | None = None, size: Size | None = None
) -> Tensor:
    """Resize a head's output (C, h, w) bilinearly to an image's size. Return (C, H, W).

    Args:
        model: the model, whose `align_corners` the resize uses.
        output_Chw: the head's output.
        image_size: (H, W) of the image.
        view: the part of the image that the model saw, in pixels of the image. None is the whole image. Pixels outside
            it get the values at its edge.
        size: (H, W) of the model's input. Needed with `view`.
    """
    if view is None or view == Window.full(*image_size) or size is None:
        return model.upsample(output_Chw[None], image_size)[0]
    edges = ((view.y0, view.y1), (view.x0, view.x1))
    (top, bottom, rows), (left, right, columns) = (
        _taps(edge, image_size[axis], size[axis], output_Chw.shape[1 + axis], model.align_corners)
        for axis, edge in enumerate(edges)
    )
    rows_H1 = torch.from_numpy(rows).to(output_Chw)[:, None]
    columns_W = torch.from_numpy(columns).to(output_Chw)
    wide_ChW = torch.lerp(output_Chw[:, :, left], output_Chw[:, :, right], columns_W)
    return torch.lerp(wide_ChW[:, top], wide_ChW[:, bottom], rows_H1)


def _taps(
    edge: tuple[float, float], length: int, seen: int, stored: int, align_corners: bool
) -> tuple[list[int], list[int], np.ndarray]:
    """Return the two output elements next to each of `length` pixels, and the pixel's position between them.

    `edge` is the view's, in the image's pixels. `seen` counts pixels of the view, and `stored` elements of the output.
    """
    at = (np.arange(length) + 0.5 - edge[0]) / (edge[1] - edge[0])  # of the view, 0 to 1
    place = (at * seen - 0.5) * ((stored - 1) / max(seen - 1, 1)) if align_corners else at * stored - 0.5
    place = place.clip(0, stored - 1)
    low = np.floor(place).astype(np.int64)
    return low.tolist(), np.minimum(low + 1, stored - 1).tolist(), (place - low).astype(np.float32)


def _starts(side: int, window: int, step: int) -> Iterator[int]:
    """Yield the starts of windows along an axis: every step, the last one moved back to the border."""
    for number in range(math.ceil(max(side - window, 0) / step) + 1):
        yield min(number * step, side - window)


def _two_thirds(window: Size) -> Size:
    return max(1, 2 * window[0] // 3), max(1, 2 * window[1] // 3)


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
