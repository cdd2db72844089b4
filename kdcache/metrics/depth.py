r"""Depth metrics by the convention of KITTI and Eigen: per image over its valid pixels, then the mean over images.

A valid pixel has a label strictly between the minimum and the maximum depth, inside the crop. Predictions are clipped
to that range, and labels outside it do not count. Each metric is computed per image, and the result is the mean over
the images with a valid pixel. So an image of few LiDAR points weighs as much as a dense one, and the root of rmse is
taken before the mean. The KITTI benchmark and the evaluations of Monodepth, BTS and ZoeDepth do the same. Eigen's paper
states means over all pixels of a set, which differ if images have unequal numbers of points.

| metric | of an image, d the label, p the prediction, both in metres, g = log p - log d | unit |
| --- | --- | --- |
| `rmse` | sqrt(mean (p - d)^2) | metres |
| `rmse_log` | sqrt(mean g^2) | |
| `abs_rel` | mean \|p - d\| / d | |
| `sq_rel` | mean (p - d)^2 / d | metres |
| `silog` | 100 sqrt(mean g^2 - (mean g)^2) | |
| `delta1`, `delta2`, `delta3` | share of pixels with max(p / d, d / p) < 1.25, 1.25^2, 1.25^3 | fraction |

Sources: Eigen et al. 2014, arXiv 1406.2283, section 4.1; silog Uhrig et al. 2017, arXiv 1708.06500, and KITTI's
development kit; the crop Garg et al. 2016, arXiv 1603.04992, in the numbers of Monodepth's code.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kdcache.errors import DataError
from kdcache.heads import RegressionHead
from kdcache.metrics.confusion import number_of, without_nan
from kdcache.settings.shared import Crop, DepthSettings

DEPTH_METRICS = ("rmse", "rmse_log", "abs_rel", "sq_rel", "silog", "delta1", "delta2", "delta3")
"""Names of the metrics, in the order of every row of them."""
MAX_DEPTH = 80.0
"""Metres from which on labels do not count, unless another maximum is given or known of the model."""
_GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
"""Top, bottom, left and right of Garg's crop, as shares of the height and the width."""


@dataclass(frozen=True, eq=False)
class DepthImages:
    """The depth metrics of N images.

    Attributes:
        ids: the ids of the images.
        values: float64 (N, 8), a column for each metric of `DepthMetrics`, from `rmse` to `delta3`.
    """

    ids: tuple[str, ...]
    values: npt.NDArray[np.float64]

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any]) -> "DepthImages":
        """Return the metrics from two arrays of an .npz file: `depth_ids` (N,) text, and `depth` (N, 8) float64.

        `arrays` maps names to arrays, as the property `arrays` returns them. A row of `depth` is an image's metrics.

        Raises: KeyError for a missing array.
        """
        return cls(tuple(arrays["depth_ids"].tolist()), arrays["depth"])

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays to store in an .npz file, by name: `depth_ids` (N,) are the ids, `depth` (N, 8) the metrics."""
        return {"depth_ids": np.array(self.ids), "depth": self.values}

    @property
    def parts(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Each image's rmse, and an array of ones, (N, 1) each.

        Sum both over some images: the ratio of the sums is the mean rmse of these images.
        """
        rmse = self.values[:, :1]
        return rmse, np.ones_like(rmse)

    @property
    def scores(self) -> list[float]:
        """The rmse of each image in metres."""
        rmse: list[float] = self.values[:, 0].tolist()
        return rmse


@dataclass(frozen=True)
class DepthMetrics:
    """Depth metrics of a model on a split: the mean over the images with a valid pixel. NaN if no image has one.

    A pixel is valid if its label is in the depth range. rmse and sq_rel are in metres. delta1, delta2 and delta3 are
    the shares of pixels with an error of less than a factor of 1.25, 1.25^2 and 1.25^3.

    Attributes:
        rmse: root mean squared error.
        abs_rel, sq_rel: the means of |error| and of the squared error, each divided by the true depth.
        rmse_log: root mean square of the difference of the logarithms.
        silog: 100 times the standard deviation of this difference. A constant factor in depth does not count.
        counted_images: number of images with a valid pixel.
        pixels: number of valid pixels in these images.
        images: the metrics of each of these images, or None if they were not kept. `==` and JSON leave them out.
    """

    rmse: float
    rmse_log: float
    abs_rel: float
    sq_rel: float
    silog: float
    delta1: float
    delta2: float
    delta3: float
    counted_images: int
    pixels: int
    images: DepthImages | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as JSON values, with null for NaN. The metrics of single images are left out."""
        return without_nan({name: value for name, value in asdict(self).items() if name != "images"})

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> "DepthMetrics":
        """Return the metrics from the JSON of `to_json`. Raises: KeyError, TypeError for other content."""
        values: dict[str, Any] = {name: number_of(content[name]) for name in DEPTH_METRICS}
        return cls(**values, counted_images=int(content["counted_images"]), pixels=int(content["pixels"]))


@dataclass(frozen=True)
class DepthRange:
    """The depth labels that count in an evaluation.

    Attributes:
        min_depth, max_depth: in metres. A label counts if it lies between them. Predictions are clipped to this range.
        crop: "none", or "garg": only pixels inside Garg's crop count, as is usual on KITTI.
    Raises: DataError unless 0 < min_depth < max_depth.
    """

    min_depth: float = DepthSettings.min_depth
    max_depth: float = MAX_DEPTH
    crop: Crop = "none"

    def __post_init__(self) -> None:
        if not 0 < self.min_depth < self.max_depth < math.inf:
            raise DataError(
                f"Invalid range of depth: {self.min_depth:g} to {self.max_depth:g} m",
                fix="Give a finite 0 < minimum < maximum: 0.001 to 80 for KITTI, 0.001 to 10 for NYU.",
            )

    @classmethod
    def of(cls, head: RegressionHead | None, settings: DepthSettings | None = None) -> "DepthRange":
        """Return the range of depth labels that count, from settings. None takes the default settings.

        If the settings have no maximum, it is the head's `max_depth`, or 80 m if `head` is None or has no maximum.
        """
        used = settings or DepthSettings()
        most = MAX_DEPTH if head is None or head.max_depth is None else head.max_depth
        return cls(used.min_depth, most if used.max_depth is None else used.max_depth, used.depth_crop)

    def __str__(self) -> str:
        return f"{self.min_depth:g} to {self.max_depth:g} m" + ("" if self.crop == "none" else f", {self.crop} crop")

    def valid(self, label_HW: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return which pixels of a depth label (H, W) in metres count, bool (H, W).

        They are deeper than `min_depth`, less deep than `max_depth`, and with `crop="garg"` inside Garg's crop. NaN
        does not count.
        """
        valid: npt.NDArray[np.bool_] = (label_HW > self.min_depth) & (label_HW < self.max_depth)  # False for NaN
        if self.crop == "none":
            return valid
        height, width = label_HW.shape
        top, bottom, left, right = (
            int(share * side) for share, side in zip(_GARG, (height, height, width, width), strict=True)
        )
        inside = np.zeros_like(valid)
        inside[top:bottom, left:right] = True
        return valid & inside


class DepthErrors:
    """The depth metrics of images, collected image by image. Several processes can share the images (see `merged`).

    Args:
        depth_range: the labels that count. None takes the default range.
    """

    def __init__(self, depth_range: DepthRange | None = None) -> None:
        self.range = depth_range or DepthRange()
        self._rows: list[tuple[str, int, npt.NDArray[np.float64]]] = []

    def update(self, predicted: Tensor, label: Tensor, sample_id: str = "") -> None:
        """Add the metrics of an image: its predicted and true depth in metres, (H, W) each.

        A pixel counts if its label lies in the depth range and crop. An image without such a pixel is left out.

        `sample_id` names the image in the results. Raises: DataError if the two shapes differ.
        """
        if predicted.shape != label.shape or label.ndim != 2:
            raise DataError(
                f"Cannot compare a prediction of {tuple(predicted.shape)} with a label of {tuple(label.shape)}",
                fix="Resize the raw output to the label's size (H, W) first.",
            )
        p, d = (x.detach().cpu().numpy().astype(np.float64) for x in (predicted, label))
        valid = self.range.valid(d)
        if valid.any():
            p = np.clip(p[valid], self.range.min_depth, self.range.max_depth)
            self._rows.append((sample_id, int(valid.sum()), _metrics_of(p, d[valid])))

    @classmethod
    def merged(cls, parts: Iterable["DepthErrors"]) -> "DepthErrors":
        """Return the metrics of all `parts` together. Each part measured different images with the same depth range.

        Raises: DataError if the ranges differ.
        """
        first, *rest = parts
        total = cls(first.range)
        for part in (first, *rest):
            if part.range != total.range:
                raise DataError(
                    f"Cannot merge depth metrics of different ranges: {total.range} and {part.range}",
                    fix="Measure all parts with one range and crop.",
                )
            total._rows += part._rows
        return total

    def metrics(self) -> DepthMetrics:
        """Return the mean metrics over all images added so far, the same bits for any order of the images."""
        values = np.stack([row for _, _, row in self._rows]) if self._rows else np.empty((0, len(DEPTH_METRICS)))
        means = [math.fsum(column) / len(column) if len(column) else math.nan for column in values.T]
        return DepthMetrics(
            **dict(zip(DEPTH_METRICS, means, strict=True)),
            counted_images=len(self._rows),
            pixels=sum(pixels for _, pixels, _ in self._rows),
            images=DepthImages(tuple(sample_id for sample_id, _, _ in self._rows), values),
        )


def _metrics_of(p: npt.NDArray[np.float64], d: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the metrics (8,) of one image's valid pixels (P,)."""
    error, g = p - d, np.log(p) - np.log(d)
    ratio = np.maximum(p / d, d / p)
    return np.array(
        [
            np.sqrt(np.square(error).mean()),
            np.sqrt(np.square(g).mean()),
            (np.abs(error) / d).mean(),
            (np.square(error) / d).mean(),
            100 * g.std(),
            *((ratio < 1.25**power).mean() if np.isfinite(ratio).all() else math.nan for power in (1, 2, 3)),
        ]
    )
