"""KITTI's depth prediction benchmark: raw images, and LiDAR depth for the frames of its two splits.

    train/DRIVE/proj_depth/groundtruth/image_02/0000000005.png    also val/; here or in data_depth_annotated/
    DATE/DRIVE/image_02/data/0000000005.png                       raw images (or jpg), here or in any folder next to;
                                                                  or train/DRIVE/image_02/data/, next to proj_depth
    val_selection_cropped/image/, groundtruth_depth/              a split too, here or in depth_selection/

Depth is sparse: 16-bit PNGs of 1/256 of a metre, 0 where nothing was measured. Samples are the frames that have depth.
Source: Uhrig et al. 2017, the benchmark's development kit.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.depth import KITTI_UNIT, DepthScan
from kdcache.data.layouts.label_ids import NO_LABELS
from kdcache.data.layouts.scan import Scan, folders_in, pictures_in, scan_depth, scan_folders
from kdcache.data.sample import ClassList

ANNOTATED, SELECTION = "data_depth_annotated", "val_selection_cropped"
CAMERAS = ("image_02", "image_03")
_PLACES = ("", ANNOTATED)
_SELECTIONS = ("", "depth_selection", "data_depth_selection/depth_selection")


class KittiDepth(Layout):
    """The layout of KITTI's depth prediction benchmark: images with depth from LiDAR, without classes."""

    name: ClassVar[str] = "kitti-depth"
    looks_for: ClassVar[str] = f"train/ or val/ (or {ANNOTATED}/train/) with DRIVE_sync/proj_depth/groundtruth/"
    split_is: ClassVar[str] = f"train or val of {ANNOTATED}, or {SELECTION}"
    pairing: ClassVar[str] = "A depth map has a raw image of its drive, camera and number."

    def matches(self, root: Path) -> bool:
        """Return whether `root` has annotated depth for at least one split."""
        return bool(self.splits(root))

    def splits(self, root: Path) -> list[str]:
        """Return the splits that exist in `root`, sorted: "train", "val" and "val_selection_cropped"."""
        names = [split for split in ("train", "val") if _annotated(root, split)]
        return sorted(names if _selection(root) is None else [*names, SELECTION])

    def _classes(self, root: Path) -> ClassList:
        return ClassList(())

    def _scan(self, root: Path, split: str) -> Scan:
        if split == SELECTION:
            place = _selection(root)
            scan = scan_folders(root, f"{place}/image", f"{place}/label", NO_LABELS)
            return scan_depth(scan, root, f"{place}/groundtruth_depth", KITTI_UNIT, image_of=_selected_image)
        images: dict[str, str] = {}
        depth: dict[str, str] = {}
        missing: list[str] = []
        place = _annotated(root, split)
        for drive in folders_in(root / place):
            cameras = {camera: _image_folder(root, place, drive, camera) for camera in CAMERAS}
            for camera, folder in cameras.items():
                below = f"{place}/{drive}/proj_depth/groundtruth/{camera}"
                if folder is None and any(cameras.values()):
                    continue  # one camera of a drive alone may be there
                raw = f"{drive[:10]}/{drive}/{camera}/data" if folder is None else folder
                names = pictures_in(root / raw)
                for number, name in pictures_in(root / below).items():
                    sample = f"{drive}/{camera}/{number}"
                    if number in names:
                        images[sample], depth[sample] = f"{raw}/{names[number]}", f"{below}/{name}"
                    else:
                        missing.append(f"{raw}/{number}.png")
        images = dict(sorted(images.items()))
        return Scan(images, {}, NO_LABELS, place, place, missing=missing, depth=DepthScan(depth, place, KITTI_UNIT))


def _annotated(root: Path, split: str) -> str:
    """Return the folder below the root that contains a split's drives, or ''."""
    for place in _PLACES:
        folder = f"{place}/{split}".lstrip("/")
        if any((root / folder / drive / "proj_depth/groundtruth").is_dir() for drive in folders_in(root / folder)):
            return folder
    return ""


def _selection(root: Path) -> str | None:
    places = (f"{place}/{SELECTION}".lstrip("/") for place in _SELECTIONS)
    return next((place for place in places if (root / place / "groundtruth_depth").is_dir()), None)


def _image_folder(root: Path, place: str, drive: str, camera: str) -> str | None:
    """Return the folder of a drive's raw images, relative to the root, or None.

    The images may lie below the root, or next to it if the root is the folder of annotations.
    """
    above = ["", ".."] if root.absolute().name == ANNOTATED else [""]
    bases = [f"{up}/{base}".strip("/") for up in above for base in ("", *folders_in(root / up))]
    raw = [f"{base}/{drive[:10]}/{drive}/{camera}/data".lstrip("/") for base in bases]
    return next((folder for folder in (f"{place}/{drive}/{camera}/data", *raw) if (root / folder).is_dir()), None)


def _selected_image(name: str) -> str:
    """Return the image's name for a depth file of the selection.

    ..._sync_groundtruth_depth_0000000005_image_02 becomes ..._sync_image_0000000005_image_02.
    """
    return name.replace("_groundtruth_depth_", "_image_")
