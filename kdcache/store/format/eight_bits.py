"""Features in 8 bits: a byte for each number, with a low end and a step for each record and channel.

    value = low + byte * step

| array | shape | dtype |
| --- | --- | --- |
| `features/<tap>` | (R, c, h, w) | uint8 |
| `scales/<tap>` | (R, 2, c) | float16: row 0 low, row 1 step |

Error at most half a step, and 0 for a channel without a range. Measured on features of CamVid: half of float16's bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from kdcache.errors import RecipeError
from kdcache.store.format.manifest_models import MAX_RECORDS, Feature, Nats, Part

Array = np.ndarray[Any, Any]
LEAST_CELLS = 16
"""Taps with fewer cells stay float16, because their scales would take a quarter of the bytes or more."""
_LARGEST = float(np.finfo(np.float16).max)
_FEATURES, _SCALES = "features/", "scales/"
StoredAs = Literal["fp16", "uint8"]
"""The values of --feature-dtype: how features are stored."""


class FeatureFidelity(Part):
    """The error of storing one tap's features in 8 bits, measured on a few records.

    Attributes:
        records: number of measured records.
        cosine: mean over all cells of the cosine between the stored and the original feature vector.
        cosine_least: the smallest of these cosines.
        gradient_error: relative error of the MSE gradient for a student that predicts each channel's mean. This is
            ||stored - features|| / ||features - channel means||.
    """

    records: Annotated[int, Field(ge=1, le=MAX_RECORDS)]
    cosine: Annotated[float, Field(ge=-1, le=1)]
    cosine_least: Annotated[float, Field(ge=-1, le=1)]
    gradient_error: Nats

    def describe(self) -> str:
        """Return the measured errors as one line of text."""
        return (
            f"cosine {self.cosine:.6f} (worst cell {self.cosine_least:.6f}), gradient error "
            f"{100 * self.gradient_error:.2f} %; on {self.records} records"
        )


def check_cells(wanted: StoredAs, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check that at least one tap is large enough for 8 bits, if `wanted` is `uint8`.

    `sizes` maps each tap to its grid (h, w).

    Raises: RecipeError if all taps have fewer than 16 cells.
    """
    if wanted == "uint8" and not any(feature_dtype(wanted, size) == "uint8" for size in sizes.values()):
        maps = ", ".join(f"{tap} of {size[0]}x{size[1]} cells" for tap, size in sizes.items())
        raise RecipeError(
            f"Cannot store {maps} in 8 bits: summaries and maps under {LEAST_CELLS} cells stay float16"
            if maps
            else "Cannot store features in 8 bits: there are none",
            fix="Leave out --feature-dtype uint8" if maps else "Add --features TAP, or leave out --feature-dtype",
        )


def feature_dtype(wanted: StoredAs, size: tuple[int, int]) -> Literal["float16", "uint8"]:
    """Return the dtype in which a tap with the grid `size` (h, w) is stored.

    It is `uint8` if `wanted` is `uint8` and the tap has at least 16 cells, otherwise `float16`.
    """
    return "uint8" if wanted == "uint8" and size[0] * size[1] >= LEAST_CELLS else "float16"


def pairs(size: tuple[int, int]) -> int:
    """Return the number of pairs of different cells in a grid of `size` (h, w).

    With n = h * w cells, this is n * (n - 1) / 2.
    """
    cells = size[0] * size[1]
    return cells * (cells - 1) // 2


def quantise(maps_Rchw: Array) -> tuple[Array, Array]:
    """Convert features to 8 bits, with a separate scale for each record and channel.

    Args:
        maps_Rchw: float16 or float32 (R, c, h, w), finite. Values outside float16's range are clipped.
    Returns: the bytes, uint8 (R, c, h, w), and the scales, float16 (R, 2, c): the value of byte 0, then the step per
        byte.
    """
    x_Rchw = maps_Rchw.astype(np.float32).clip(-_LARGEST, _LARGEST)
    lowest_Rc, highest_Rc = x_Rchw.min((2, 3)).astype(np.float64), x_Rchw.max((2, 3)).astype(np.float64)
    low_Rc = _rounded(lowest_Rc, down=True)
    step_Rc = _rounded((highest_Rc - low_Rc) / 255, down=False)
    low, step = (scale.astype(np.float32)[..., None, None] for scale in (low_Rc, step_Rc))
    # In place: the maps of a shard are the largest thing in memory.
    np.subtract(x_Rchw, low, out=x_Rchw)
    np.divide(x_Rchw, step, out=x_Rchw, where=step > 0)
    np.multiply(x_Rchw, step > 0, out=x_Rchw)
    return np.rint(x_Rchw, out=x_Rchw).clip(0, 255).astype(np.uint8), np.stack([low_Rc, step_Rc], 1)


def restore(bytes_Rchw: Array, scales_R2c: Array) -> Array:
    """Return float32 features (R, c, h, w) from the results of `quantise`.

    For a single record, leave the dimension R out of both arguments.

    Args:
        bytes_Rchw: uint8 (R, c, h, w).
        scales_R2c: float16 (R, 2, c): the value of byte 0, then the step per byte.
    """
    low, step = np.moveaxis(scales_R2c.astype(np.float32), -2, 0)[..., None, None]
    restored: Array = low + bytes_Rchw.astype(np.float32) * step
    return restored


def stored_features(rows: Mapping[str, Array], features: Mapping[str, Feature]) -> dict[str, Array]:
    """Convert the features among `rows` to the dtype in which the cache stores them: uint8 with scales, or float16.

    Args:
        rows: path in the cache -> array. Arrays other than features are returned unchanged.
        features: the manifest's entry for each tap, which names the dtype.
    Returns: `rows` with converted `features/<tap>` arrays, and with a `scales/<tap>` array for each tap in uint8.
    """
    stored = dict(rows)
    for tap, feature in features.items():
        path = f"{_FEATURES}{tap}"
        if path in stored and feature.dtype == "uint8" and stored[path].dtype != np.uint8:
            stored[path], stored[f"{_SCALES}{tap}"] = quantise(stored[path])
        elif path in stored and feature.dtype == "float16" and stored[path].dtype != np.float16:
            maps = stored[path]
            maps = restore(maps, stored.pop(f"{_SCALES}{tap}")) if maps.dtype == np.uint8 else maps
            stored[path] = maps.clip(-_LARGEST, _LARGEST).astype(np.float16)
    return stored


class Loss:
    """An accumulator for the error of storing one tap's features in 8 bits. It is not a training loss.

    Call `add` for each record, then `figures`.

    Attributes:
        records: number of records added.
        beyond: True if a value was outside float16's range, so that 8 bits cannot store this tap.
    """

    def __init__(self) -> None:
        self.beyond = False
        self.records = self._cells = 0
        self._error = self._cosine = 0.0
        self._least = 1.0
        self._sums: tuple[Array, Array] | None = None

    def add(self, map_chw: Array, kept_chw: Array | None = None) -> None:
        """Add the error of storing one record.

        Args:
            map_chw: the teacher's features (c, h, w), finite.
            kept_chw: the stored features (c, h, w). None computes them from `map_chw`.
        """
        self.beyond = self.beyond or bool(np.abs(map_chw).max() > _LARGEST)
        exact_cn = map_chw.reshape(len(map_chw), -1).astype(np.float64)
        kept_chw = restore(*quantise(map_chw[None])) if kept_chw is None else kept_chw
        kept_cn = kept_chw.reshape(exact_cn.shape).astype(np.float64)
        norms_n = np.sqrt(np.square(exact_cn).sum(0) * np.square(kept_cn).sum(0))
        cosine_n = np.divide((exact_cn * kept_cn).sum(0), norms_n, out=np.ones_like(norms_n), where=norms_n > 0)
        sums = exact_cn.sum(1), np.square(exact_cn).sum(1)
        self._sums = sums if self._sums is None else (self._sums[0] + sums[0], self._sums[1] + sums[1])
        self._error += float(np.square(exact_cn - kept_cn).sum())
        self._cosine += float(cosine_n.sum())
        self._least = min(self._least, float(cosine_n.min()))
        self.records, self._cells = self.records + 1, self._cells + len(cosine_n)

    def figures(self) -> FeatureFidelity:
        """Return the errors of 8-bit storage over all records passed to `add`. Call `add` at least once before."""
        assert self._sums is not None
        sum_c, square_c = self._sums
        spread = float(np.maximum(square_c - np.square(sum_c) / self._cells, 0).sum())
        return FeatureFidelity(
            records=self.records,
            cosine=_figure(self._cosine / self._cells),
            cosine_least=_figure(self._least),
            gradient_error=float(f"{np.sqrt(self._error / spread) if spread else 0.0:.3g}"),
        )


def measure(maps: Iterable[Array]) -> FeatureFidelity:
    """Measure the error of storing one tap's features in 8 bits.

    `maps` yields the tap's features for each measured record: float (c, h, w), finite.
    """
    loss = Loss()
    for map_chw in maps:
        loss.add(map_chw)
    return loss.figures()


def describe(
    features: Mapping[str, Feature], lost: Mapping[str, FeatureFidelity], *, wanted: StoredAs = "fp16"
) -> Iterator[str]:
    """Yield a line of text for each tap in 8 bits, and for each tap that stays float16 although `wanted` is `uint8`.

    Args:
        features: the manifest's entry for each tap.
        lost: tap -> measured error of storing it in 8 bits. Taps that were not measured are missing.
        wanted: the requested dtype.
    """
    for tap, feature in features.items():
        if feature.dtype == "uint8":
            yield f"{tap} in 8 bits: " + (lost[tap].describe() if tap in lost else "what is lost was not measured")
        elif wanted == "uint8":
            few = feature_dtype(wanted, feature.size) == "float16"
            why = f"it has {feature.size[0]}x{feature.size[1]} cells" if few else "its range is beyond float16"
            yield f"{tap} stays float16: {why}"


def _figure(cosine: float) -> float:
    return min(1.0, max(-1.0, round(float(cosine), 7)))


def _rounded(values: Array, *, down: bool) -> Array:
    """Return float64 values rounded to float16 in one direction."""
    nearest = values.astype(np.float16)
    wrong = nearest > values if down else nearest < values
    towards = np.float16(-np.inf if down else np.inf)
    rounded: Array = np.nextafter(nearest, towards, out=nearest.copy(), where=wrong)
    return rounded
