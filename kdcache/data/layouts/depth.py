"""Read depth files: convert their numbers to metres, and detect what cannot be depth in metres.

A file holds float metres, or whole numbers of a unit that only its layout or a `depth.toml` knows: KITTI's PNGs count
1/256 of a metre, NYU's millimetres, and Cityscapes' disparity becomes depth by the camera. A unit is never guessed.
Unknown is 0 (in all of these), NaN or infinite, and becomes NaN.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.data.files import read_numbers
from kdcache.data.sample import Depth
from kdcache.errors import DataError

DEPTH_FILE = "depth.toml"
DEPTH_SUFFIXES = (".png", ".npy", ".npz", ".tif", ".tiff")

FARTHEST_MEDIAN = 1000.0
"""Metres. Where half of a label is farther, a file's numbers were taken for metres: KITTI's lie about 2,500, a room's
millimetres likewise."""

DepthReader = Callable[[Path], Depth]
"""From a file to float32 (H, W), NaN where unknown; raises DataError. A function that worker processes can be sent."""


@dataclass(frozen=True)
class DepthScan:
    """The depth files of a split on disk.

    Attributes:
        files: sample id -> path below the data set's folder, for samples that have an image.
        place: the searched folder, below the data set's folder.
        read: reads a depth file as metres, float32 (H, W).
        orphans: depth files without an image, and further depth files of an image that has one, below `place`.
    """

    files: dict[str, str]
    place: str
    read: DepthReader
    orphans: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DepthUnit:
    """The unit of depth files. Calling it with a file's path returns the file's depth in metres.

    Attributes:
        per_metre: the number that means one metre, such as 1000 for millimetres. None accepts only files with floats,
            in metres.
        invalid: numbers that mean "unknown", in addition to NaN and infinity.
    """

    per_metre: float | None = None
    invalid: tuple[float, ...] = (0.0,)

    def __call__(self, path: Path) -> Depth:
        """Return a file's depth in metres, float32 (H, W), NaN where unknown.

        Raises: DataError for a file that cannot be read, or integers without a unit.
        """
        numbers = read_numbers(path)
        if self.per_metre is None and numbers.dtype.kind in "ui":
            raise DataError(
                f"Unknown unit of depth file {path}: it holds whole numbers ({numbers.dtype} up to {numbers.max()})",
                fix=f"Write `units_per_metre = 1000` (millimetres) or 256 (as KITTI has it) into {DEPTH_FILE}, next to "
                "images/.",
            )
        with np.errstate(all="ignore"):  # what float32 has no number for is infinite
            metres = numbers.astype(np.float32)
            metres /= np.float32(self.per_metre or 1.0)
        for number in self.invalid:
            np.putmask(metres, numbers == number, np.nan)
        np.putmask(metres, np.isinf(metres), np.nan)
        return metres


KITTI_UNIT, NYU_UNIT = DepthUnit(256.0), DepthUnit(1000.0)


def read_unit(root: Path) -> DepthUnit:
    """Return the unit of depth files that `depth.toml` in the data folder `root` states.

    Without that file, depth files must hold floats in metres.

    Raises: DataError for a malformed `depth.toml`.
    """
    path = root / DEPTH_FILE
    if not path.is_file():
        return DepthUnit()
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _malformed(path, str(error)) from error
    per_metre, invalid = entries.pop("units_per_metre", None), entries.pop("invalid", [0])
    if entries:
        raise _malformed(path, f"unknown keys {', '.join(sorted(entries))}")
    if per_metre is not None and not (_is_number(per_metre) and 0 < per_metre < math.inf):
        raise _malformed(path, f"units_per_metre = {per_metre!r}")
    if not isinstance(invalid, list) or not all(map(_is_number, invalid)):
        raise _malformed(path, f"invalid = {invalid!r}")
    return DepthUnit(None if per_metre is None else float(per_metre), tuple(map(float, invalid)))


def read_disparity(path: Path) -> Depth:
    """Return the depth in metres from a Cityscapes disparity file, float32 (H, W), NaN where unknown.

    With a pixel's number in the file, depth is baseline * fx / ((number - 1) / 256). Numbers 0 and 1 mean unknown. The
    sample's camera file has baseline (metres) and fx (pixels).
    Source: the README of cityscapesScripts.

    Raises: DataError for a file that cannot be read, or a camera file without baseline and fx.
    """
    numbers = read_numbers(path).astype(np.float32)
    camera = camera_of(path)
    try:
        entries = json.loads(camera.read_text(encoding="utf-8"))
        constant = float(entries["extrinsic"]["baseline"]) * float(entries["intrinsic"]["fx"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"Cannot read camera file {camera}: {type(error).__name__} {error}",
            fix="Restore it from its source (camera_trainvaltest.zip), with extrinsic.baseline (metres) and "
            "intrinsic.fx (pixels).",
        ) from error
    numbers[numbers <= 1] = np.nan
    depth: Depth = np.float32(constant * 256) / (numbers - 1)
    return depth


def camera_of(disparity: Path) -> Path:
    """Return the camera file that belongs to a Cityscapes disparity file.

    DIR/disparity/SPLIT/CITY/NAME_disparity.png has the camera file DIR/camera/SPLIT/CITY/NAME_camera.json.
    """
    folders = list(disparity.parent.parts)
    folders[len(folders) - 1 - folders[::-1].index("disparity")] = "camera"
    return Path(*folders, disparity.stem.removesuffix("_disparity") + "_camera.json")


def impossible_depth(depth: Depth) -> str:
    """Return in words why a depth label, float32 (H, W), cannot be in metres, or '' if it can.

    NaN pixels (unknown depth) are ignored. A label with only NaN also gets a reason.
    """
    known, wrong = (int(np.count_nonzero(mask)) for mask in (~np.isnan(depth), depth <= 0))
    if not known:
        return "no pixel has a known depth"
    if wrong:
        return f"{wrong} of {known} depths are not above 0 (the least is {np.nanmin(depth):g})"
    if 2 * int(np.count_nonzero(depth > FARTHEST_MEDIAN)) > known:
        middle = float(np.nanmedian(depth))
        return (
            f"half of the depths are beyond {middle:,.0f} m, as where a file's numbers are taken for metres: "
            f"in 1/256 m (KITTI) that would be {middle / 256:.1f} m, in millimetres {middle / 1000:.1f} m"
        )
    return ""


def check_depth(depth: Depth, path: Path) -> None:
    """Raise DataError if a depth label, float32 (H, W), cannot be in metres or has only NaN. `path` is its file.

    It cannot be in metres if a depth is 0 or below, or if more than half of the depths are above 1000.
    """
    if reason := impossible_depth(depth):
        raise DataError(
            f"Cannot use depth file {path}: {reason}",
            fix=f"Name the unit, and the number that means unknown, in {DEPTH_FILE} (layout folder). Or correct or "
            "remove the file. `kdcache data check` lists all such files.",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _malformed(path: Path, fault: str) -> DataError:
    return DataError(
        f"Cannot read {path}: {fault}",
        fix="Write `units_per_metre`, a number above 0 (1000 for millimetres), and `invalid`, a list of the numbers "
        "that mean unknown ([0] is the default).",
    )
