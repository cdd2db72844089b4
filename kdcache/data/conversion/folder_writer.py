"""Write the files of a data set of layout `folder` that is made from another one.

Labels and depth are links to the source's files if their numbers are class ids and metres already, else new files.
Every file is written completely or not at all, and images are in a hidden folder until the split has all of them. So
an interrupted conversion is never taken for a small data set, and continues at the next file.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from kdcache.data.classes import write_classes
from kdcache.data.files import is_plain_label
from kdcache.data.layouts.depth import DEPTH_FILE, DepthUnit
from kdcache.data.layouts.file_split import LabelFile
from kdcache.data.layouts.own.folder import DEPTHS, IMAGES, LABELS
from kdcache.data.sample import Pixels, Source, Split
from kdcache.files import replacing, write_whole
from kdcache.tasks import DEPTH, SEGMENTATION

Link = Literal["hard link", "link", "copy"]


@dataclass(frozen=True)
class FolderWriter:
    """A writer of one split into a data folder.

    Attributes:
        source: the split to write.
        out: the data folder.
    """

    source: Split
    out: Path

    def write_beginning(self) -> None:
        """Write the files of the new data set that do not belong to a sample.

        These are `classes.txt` if the split has classes, and `depth.toml` if it has depth files in a known unit.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        if len(self.source.classes):
            write_classes(self.out, self.source.classes)
        depths = (self.source.samples[index].labels[DEPTH] for index in self.source.labelled(DEPTH))
        if (unit := _unit_text(next(depths, None))) is not None:
            write_whole(self.out / DEPTH_FILE, unit)

    def image_file(self, index: int, suffix: str = ".png") -> Path:
        """Return the path for the image of the sample at position `index` in the split, ending with `suffix`.

        It lies in a hidden folder until `publish` renames that folder.
        """
        folder = self.out / IMAGES / self.source.split
        if not folder.exists():
            folder = folder.with_name(f".{folder.name}.unfinished")
        return folder / f"{self.source.ids[index]}{suffix}"

    def write_label(self, index: int, label: Pixels | None = None) -> Link | Literal["file"] | None:
        """Write a sample's segmentation label to the new data set, or link to its source file. An existing label stays.

        Args:
            index: the sample's position in the split.
            label: class ids, uint8 (H, W), to write. None takes the source's label.

        Returns: "hard link", "link" or "copy" for the source's file, "file" for a new file, or None if nothing was
            written.
        """
        source = self.source.samples[index].labels.get(SEGMENTATION)
        path = self.out / LABELS / self.source.split / f"{self.source.ids[index]}.png"
        if source is None or path.exists():
            return None
        file = source.path
        if file is not None and label is None and self.source.label_map is None and is_plain_label(file):
            return link_file(file, path)
        # A defect of the source's stays for `data check` to name.
        save_png(source.raw() if label is None else label, path)
        return "file"

    def write_depth(self, index: int) -> None:
        """Write a sample's depth label to the new data set, unless it exists there or the sample has none.

        A file whose unit is known is linked as it is. Any other label is written as metres in a .npy file. `index` is
        the sample's position in the split.
        """
        source = self.source.samples[index].labels.get(DEPTH)
        if source is None:
            return
        folder, sample = self.out / DEPTHS / self.source.split, self.source.ids[index]
        depth_file = source.path
        if depth_file is not None and _unit_text(source) is not None:
            if not (path := folder / f"{sample}{depth_file.suffix}").exists():
                link_file(depth_file, path)
            return
        path = folder / f"{sample}.npy"
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, source.raw())

    def publish(self) -> None:
        """Rename the hidden folder of images to the split's name. Call it when all images are written."""
        folder = self.out / IMAGES / self.source.split
        if not folder.exists():
            folder.with_name(f".{folder.name}.unfinished").replace(folder)


def _unit_text(depth: Source[Any] | None) -> str | None:
    """Return the text of `depth.toml` for a depth file that can be linked.

    Return None for disparity, and for depth that is not in a file.
    """
    unit = depth.decode if isinstance(depth, LabelFile) else None
    if not isinstance(unit, DepthUnit):
        return None
    per_metre = "" if unit.per_metre is None else f"units_per_metre = {unit.per_metre!r}\n"
    return f"{per_metre}invalid = {json.dumps(list(unit.invalid))}\n"


def save_png(pixels: Pixels, path: Path) -> None:
    """Write `pixels`, uint8 (H, W) or (H, W, 3), as the PNG file `path`, and create its folder.

    An interruption leaves no partial file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")


def link_file(file: Path, path: Path) -> Link:
    """Make `path` a link to the existing `file`, and return its kind. The folder of `path` is created.

    A "hard link" is tried first, then a symbolic "link", then a "copy".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link to what is no longer there
    try:
        os.link(file.resolve(), path)
    except OSError:  # another disk, or one without them
        pass
    else:
        return "hard link"
    try:
        path.symlink_to(file.resolve())
    except OSError:
        with replacing(path) as partial:
            shutil.copyfile(file, partial)
        return "copy"
    return "link"
