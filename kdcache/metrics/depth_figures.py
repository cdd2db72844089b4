"""Depth and its errors in colours: a perceptual map, grey for unknown values, and a bar in metres."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from kdcache.metrics.figures import Array, hex_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

UNKNOWN_RGB = (128, 128, 128)
"""The colour of pixels without a depth: no colour of the maps is grey."""
Kind = Literal["depth", "error"]
MAPS: dict[Kind, str] = {"depth": "viridis", "error": "inferno"}
"""matplotlib's maps, whose lightness rises evenly with the value."""
_SHOWN = 99.0  # percentile of the values at which a bar ends: one far pixel must not darken all others
_NICE = (1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0)  # a quarter of each is short to write
_TICKS = 4


@dataclass(frozen=True)
class DepthMap:
    """A map (H, W) of depths or depth errors, to draw in colours. Values that are NaN or infinite are drawn grey.

    Attributes:
        values: the map, float (H, W).
        high: the value at the upper end of the colour bar, which begins at 0. Larger values have the last colour.
        kind: "depth" or "error", which have different colour maps.
        unit: text at the end of the bar.
    """

    values: npt.NDArray[np.floating]
    high: float
    kind: Kind = "depth"
    unit: str = "m"

    def rgb(self) -> Array:
        """Return the map in colours, uint8 (H, W, 3)."""
        return colours_of(self.values / self.high, self.kind)

    def draw(self, axes: "Axes") -> None:
        """Draw the map and its colour bar into matplotlib axes."""
        from matplotlib import colormaps

        colours = colormaps[MAPS[self.kind]].with_extremes(bad=hex_colours([UNKNOWN_RGB])[0])
        known = np.ma.masked_invalid(self.values)
        image = axes.imshow(known, cmap=colours, vmin=0, vmax=self.high, interpolation="nearest")
        beyond = bool((known > self.high).any())
        figure = axes.get_figure()
        assert figure is not None
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, extend="max" if beyond else "neither")
        bar.set_label(self.unit, fontsize=9)
        bar.ax.tick_params(labelsize=8)

    def picture(self) -> "Image":
        """Return the map in colours as a PIL image, with the colour bar below it."""
        from PIL import Image

        height, width = self.values.shape
        bar = self.bar(width)
        picture = Image.new("RGB", (bar.width, height + bar.height), "white")
        picture.paste(Image.fromarray(self.rgb()), (0, 0))
        picture.paste(bar, (0, height))
        return picture

    def bar(self, width: int) -> "Image":
        """Return the colour bar as a PIL image of `width` pixels, or wider if its ticks need it."""
        from PIL import Image, ImageDraw, ImageFont

        text = max(10, min(36, width // 40))
        width, band = max(width, 16 * text), max(8, text)
        picture = Image.new("RGB", (width, band + 2 * text + 4), "white")
        ramp = colours_of(np.linspace(0, 1, width)[None].repeat(band, 0), self.kind)
        picture.paste(Image.fromarray(ramp), (0, 4))
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(text)
        for tick in range(_TICKS + 1):
            place = round(tick / _TICKS * (width - 1))
            label = f"{self.high * tick / _TICKS:g}" + (f" {self.unit}" if tick == _TICKS else "")
            anchor = "la" if tick == 0 else "ra" if tick == _TICKS else "ma"
            draw.line([(place, 4 + band), (place, 6 + band)], fill="black")
            draw.text((place, 8 + band), label, fill="black", font=font, anchor=anchor)
        return picture


def colours_of(shares: npt.NDArray[np.floating], kind: Kind) -> Array:
    """Return colours, uint8 (..., 3), for values from 0 (start of the colour bar) to 1 (its end).

    `kind` chooses the colour map: "depth" or "error". NaN and infinity become grey.
    """
    from matplotlib import colormaps

    known = np.isfinite(shares)
    rgb: Array = colormaps[MAPS[kind]](np.where(known, np.clip(shares, 0, 1), 0), bytes=True)[..., :3].copy()
    rgb[~known] = UNKNOWN_RGB
    return rgb


def bar_end(maps: Iterable[npt.NDArray[np.floating]]) -> float:
    """Return a round value for the end of a colour bar of several maps.

    At least 99 % of each map's values are at or below it. NaN and infinity do not count. Without values, return 1.0.
    """
    known = [values[np.isfinite(values)] for values in maps]
    largest = max((float(np.percentile(values, _SHOWN)) for values in known if values.size), default=1.0)
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return power * next(step for step in _NICE if largest <= step * power * (1 + 1e-6))


def absolute_error(predicted: npt.NDArray[np.floating], label: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Return |predicted - label|, for depths in metres (H, W). A pixel is NaN if its label is NaN or infinite."""
    error: npt.NDArray[np.floating] = np.abs(predicted - np.where(np.isfinite(label), label, np.nan))
    return error
