"""Stored targets of samples, seen through the windows of your augmentation.

The target of a sample's whole image moves with a window, as `--augment warp` moves it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.data import Window, zoom_of
from kdcache.errors import DataError, RecipeError, suggest
from kdcache.store.format.codec import Array


@dataclass(frozen=True)
class SampleTargets:
    """The stored targets of B samples, with the part of each view that your augmentation shows.

    Give them to `DistillLoss` together with your labels.

    Attributes:
        arrays: path, such as `targets/segmentation/values` -> stored array of the B samples' whole views, (B, ...).
        window: float64 (B, 4), edges (y0, x0, y1, x1) of your crops in pixels of the stored views.
        flip: bool (B,), whether the crop is mirrored left to right.
        inside: float64 (B, 4), edges of the part of each stored view that shows the image. The rest is grey. None means
            that the whole view shows the image.
        zoom: float64 (B,), by which targets in metres are divided. None divides nothing.
    """

    arrays: dict[str, Array]
    window: Array
    flip: Array
    inside: Array | None = None
    zoom: Array | None = None

    def __len__(self) -> int:
        return len(self.window)

    def to_dict(self) -> dict[str, Array]:
        """Return all arrays as one dict. Those of `arrays` have paths as names, such as `targets/depth/values`.

        The other arrays have the names of their fields. Fields that are None are left out.
        """
        geometry = {"window": self.window, "flip": self.flip, "inside": self.inside, "zoom": self.zoom}
        return self.arrays | {name: array for name, array in geometry.items() if array is not None}


def sample_numbers(ids: Sequence[str], numbers: Mapping[str, int], place: object) -> list[int]:
    """Return the index of each sample, given its id.

    Args:
        ids: the sample ids to look up.
        numbers: sample id -> index, for all samples of the cache.
        place: the cache's location, for messages.
    Raises: DataError for an unknown id, or if `ids` is a single string.
    """
    if isinstance(ids, str):
        raise DataError(
            f"targets_for takes a list of ids, not the text {ids!r}", fix=f"Give a list: targets_for([{ids!r}], ...)"
        )
    unknown = [sample for sample in ids if sample not in numbers]
    if unknown:
        raise DataError(
            f"Unknown id {unknown[0]!r}: {place} does not have {len(unknown)} of these {len(ids)} ids",
            fix=suggest(
                str(unknown[0]),
                list(numbers)[:5000],
                f"Give ids that cache.ids lists, such as {next(iter(numbers))!r}.",
                cutoff=0.3,
            ),
        )
    return [numbers[sample] for sample in ids]


def view_windows(windows: Any, flips: Any, shown_B4: Array, view_size: tuple[int, int]) -> tuple[Array, Array]:
    """Convert crops from pixels of their images to pixels of the stored views.

    Args:
        windows: (B, 4) edges (y0, x0, y1, x1) in pixels of the images. None stands for all of each view.
        flips: bool (B,), whether each crop is mirrored left to right. None mirrors nothing.
        shown_B4: float64 (B, 4), the part of its image that each stored view shows, in pixels of the image.
        view_size: (H, W) of the stored views in pixels.
    Returns: the crops, float64 (B, 4), and the flips, bool (B,).
    Raises: DataError for arrays of another shape, crops without an area, and crops outside their view.
    """
    count = len(shown_B4)
    edges = shown_B4 if windows is None else np.asarray(windows, np.float64)
    flip = np.zeros(count, np.bool_) if flips is None else np.asarray(flips)
    if edges.shape != (count, 4) or flip.shape != (count,):
        raise DataError(
            f"Cannot match {count} ids with windows of shape {edges.shape} and flips of shape {flip.shape}",
            fix="Give windows (B, 4), edges y0, x0, y1, x1 in pixels of the image, and flips (B,).",
        )
    _check_areas(edges, shown_B4)
    # By ratios, so that a view of its image's size leaves every edge as it is.
    low, long = shown_B4[:, :2], shown_B4[:, 2:] - shown_B4[:, :2]
    ratio = np.asarray(view_size, np.float64) / long
    moved = np.concatenate([(edges[:, :2] - low) * ratio, (edges[:, 2:] - low) * ratio], axis=1)
    return moved, flip.astype(np.bool_)


def view_zooms(window_B4: Array, view_size: tuple[int, int], depth_zoom: str | None) -> Array | None:
    """Return the zoom of each window, float64 (B,), by which targets in metres are divided.

    Args:
        window_B4: (B, 4) edges (y0, x0, y1, x1) in pixels of the view.
        view_size: (H, W) of the view in pixels.
        depth_zoom: "divide" returns the zooms. "keep" leaves metres unchanged, so the result is None. With None the
            result is also None, but no window may zoom.
    Raises: RecipeError if a window zooms and `depth_zoom` is None, or if `depth_zoom` is another text.
    """
    if depth_zoom not in (None, "divide", "keep"):
        raise RecipeError(f"Invalid depth_zoom: {depth_zoom!r}", fix="Use depth_zoom='divide' or depth_zoom='keep'.")
    if depth_zoom == "keep":
        return None
    zooms = np.array([zoom_of(Window(*edges), view_size) for edges in window_B4.tolist()])
    if depth_zoom is None and (np.abs(zooms - 1) > 1e-6).any():
        raise RecipeError(
            f"Missing depth_zoom: the windows zoom {zooms.min():.3g} to {zooms.max():.3g} times, and the targets have "
            "metres",
            fix="Give depth_zoom='divide' or 'keep', or leave depth out: heads=['segmentation']",
            rule="A zoomed image looks nearer than it is.",
        )
    return zooms if depth_zoom == "divide" else None


def _check_areas(edges_B4: Array, shown_B4: Array) -> None:
    """Raise DataError for windows without an area, or outside their view."""
    y0, x0, y1, x1 = edges_B4.T
    empty = ~(np.isfinite(edges_B4).all(1) & (y0 < y1) & (x0 < x1))
    apart = (y0 >= shown_B4[:, 2]) | (x0 >= shown_B4[:, 3]) | (y1 <= shown_B4[:, 0]) | (x1 <= shown_B4[:, 1])
    shares = np.logical_and((edges_B4 <= 1).all(1), (shown_B4[:, 2:] > 1).all(1))
    wrong: Array = np.any([empty, apart, shares], axis=0)
    if wrong.any():
        row = int(wrong.argmax())
        bad, view = (", ".join(f"{edge:g}" for edge in edges[row]) for edges in (edges_B4, shown_B4))
        raise DataError(
            f"Invalid window ({bad}) in row {row} of a view that shows ({view}) of its image",
            fix="Give (top, left, top + height, left + width) of the crop"
            + (", in pixels and not as shares of the image." if np.atleast_1d(shares)[row] else "."),
            rule="A window has edges y0 < y1 and x0 < x1 in pixels of the image, and overlaps the view.",
        )
