"""Cityscapes: 19 classes out of the ids 0 to 33 in its labels.

    leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png
    gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png          ids of all 34 kinds
    gtFine/SPLIT/CITY/NAME_gtFine_labelTrainIds.png     class ids already: used if there are no labelIds
    disparity/SPLIT/CITY/NAME_disparity.png             16-bit disparity, converted to depth with
    camera/SPLIT/CITY/NAME_camera.json                  its camera's baseline and focal length

labelIds are mapped to the 19 classes when they are read, once. Mapped twice, road (0) would be void, a traffic sign (7)
road and a person (11) building, and training would continue with the rest. So files with signs of this are errors.
Source: Cordts et al. 2016; ids and colours as in cityscapesScripts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from kdcache.data.files import LABEL_SUFFIXES
from kdcache.data.layouts.base import Layout
from kdcache.data.layouts.depth import camera_of, read_disparity
from kdcache.data.layouts.label_ids import LabelIds, Seen, id_table
from kdcache.data.layouts.scan import Scan, folders_in, scan_depth, scan_folders
from kdcache.data.sample import ClassList
from kdcache.errors import DataError
from kdcache.tasks import IGNORE_INDEX

_KINDS = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
"""labelId, name and colour of the classes, in the order of their train ids."""

CLASSES = ClassList(tuple(name for _, name, _ in _KINDS), tuple(colour for _, _, colour in _KINDS))
MOST_LABEL_ID = 33
_SELDOM = (5, 9, 10, 14, 18)
"""dynamic, parking, rail track, guard rail, pole group; as train ids: pole, terrain, sky, truck, bicycle."""

IMAGES, LABELS, DISPARITY = "leftImg8bit", "gtFine", "disparity"
_DISPARITY_END = "_disparity"
_IMAGE_END, _IDS_END, _TRAIN_IDS_END = "_leftImg8bit", "_gtFine_labelIds", "_gtFine_labelTrainIds"


def to_classes(most_label_id: int) -> dict[int, int]:
    """Return labelId -> class id, for labelIds from 0 to `most_label_id`. Those without a class map to 255 (void)."""
    classes = {label_id: index for index, (label_id, _, _) in enumerate(_KINDS)}
    return {label_id: classes.get(label_id, IGNORE_INDEX) for label_id in range(most_label_id + 1)}


def refuse_train_ids(seen: Seen, path: Path) -> None:
    """Raise DataError if a label file that should hold labelIds holds train ids instead.

    Nearly every street image has a labelId of 19 or more: vegetation, sky, a car or a sign. A label without any of them
    fails if one of these is true:

    - It has the number 255 (void). labelIds never have it.
    - It has two of the ids 5, 9, 10, 14 and 18. They are rare as labelIds, but frequent as train ids.

    Args:
        seen: whether each of the numbers 0 to 255 occurs in the label, bool (256,).
        path: the label file, for the message.
    """
    if seen[len(CLASSES) : IGNORE_INDEX].any() or not (seen[IGNORE_INDEX] or seen[list(_SELDOM)].sum() >= 2):
        return
    raise DataError(
        f"Cannot read {path} as labelIds: it has train ids ({', '.join(map(str, seen.nonzero()[0]))})",
        fix="Restore the labelIds. To use train ids, name the files *_gtFine_labelTrainIds.png and remove the labelIds "
        "(Cityscapes), or use the folder layout with a classes.txt of the 19 classes.",
        rule=f"labelIds are 0 to {MOST_LABEL_ID}, and pictures of streets have some from 19 up.",
    )


LABEL_IDS = LabelIds(
    f"Cityscapes' labelIds are 0 to {MOST_LABEL_ID} (255 is void too).",
    "Restore the labels from their source, or use the folder layout with a classes.txt.",
    id_table(to_classes(MOST_LABEL_ID)),
    refuse_train_ids,
)
TRAIN_IDS = LabelIds(
    "Cityscapes' train ids are 0 to {last}, and 255 for void.",
    "Make the files again with cityscapesScripts, or keep the labelIds next to them.",
)


class Cityscapes(Layout):
    """The layout of Cityscapes with fine annotations (gtFine)."""

    name: ClassVar[str] = "cityscapes"
    looks_for: ClassVar[str] = f"{IMAGES}/SPLIT/CITY/ (and {LABELS}/SPLIT/CITY/)"
    split_is: ClassVar[str] = f"a folder below {IMAGES}"
    pairing: ClassVar[str] = f"The label of CITY/NAME{_IMAGE_END}.png is CITY/NAME{_IDS_END}.png."

    def matches(self, root: Path) -> bool:
        """Return whether `root` has a folder leftImg8bit/ with folders in it."""
        return bool(folders_in(root / IMAGES))

    def splits(self, root: Path) -> list[str]:
        """Return the sorted names of the folders in leftImg8bit/ of `root`, such as "train" and "val"."""
        return folders_in(root / IMAGES)

    def _classes(self, root: Path) -> ClassList:
        return CLASSES

    def _scan(self, root: Path, split: str) -> Scan:
        scan, place = self._scan_labels(root, split), f"{DISPARITY}/{split}"
        if not (root / place).is_dir():
            return scan
        scan = scan_depth(
            scan,
            root,
            place,
            read_disparity,
            depth_end=_DISPARITY_END,
            image_of=lambda name: name.removesuffix(_DISPARITY_END) + _IMAGE_END,
        )
        assert scan.depth is not None
        cameras = [camera_of(Path(path)) for path in scan.depth.files.values()]
        lost = [camera.as_posix() for camera in cameras if not (root / camera).is_file()]
        return replace(scan, missing=scan.missing + lost)

    def _scan_labels(self, root: Path, split: str) -> Scan:
        places = f"{IMAGES}/{split}", f"{LABELS}/{split}"
        fine = scan_folders(root, *places, LABEL_IDS, image_end=_IMAGE_END, label_end=_IDS_END)
        train = scan_folders(root, *places, TRAIN_IDS, image_end=_IMAGE_END, label_end=_TRAIN_IDS_END)
        if not fine.labels and not fine.orphans:
            return train
        # One kind for all: a sample that has train ids alone would pass for one without a label.
        lost = sorted(train.labels.keys() - fine.labels.keys())
        ends = [f"{places[1]}/{sample.removesuffix(_IMAGE_END)}{_IDS_END}{LABEL_SUFFIXES[0]}" for sample in lost]
        return replace(fine, missing=ends)
