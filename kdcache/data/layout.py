"""Splits from a spec: a folder in one of the layouts, or the built-in procedural `scenes`."""

from __future__ import annotations

import os
import warnings

from kdcache.data.concat import join, one_task, parts_of, task_of
from kdcache.data.layouts.converted import DataWarning, source_changes
from kdcache.data.layouts.registry import LayoutRoot, convert_command, find_layout
from kdcache.data.memory import opened
from kdcache.data.sample import Split
from kdcache.data.scenes.generate import ScenesSpec, is_scenes, open_scenes
from kdcache.errors import DataError


def open_split(data: str | os.PathLike[str], split: str, *, exports: bool = False) -> Split:
    """Open one split of a data set.

    >>> import kdcache
    >>> split = kdcache.open_split("streets", "val")
    >>> len(split), split.image(0).shape
    (4, (48, 64, 3))

    Args:
        data: the data set, as one of these specs:
            - FOLDER. The folder's contents tell its layout.
            - LAYOUT:FOLDER with folder, mmseg, camvid, voc, cityscapes, gta5, ade20k, kitti-semantic, kitti-depth, nyu
              or images.
            - FOLDER,images=OTHER takes the images from OTHER/SPLIT/ID.png or OTHER/ID.png.
            - scenes, or scenes:HxW,train=64,val=16,seed=0,unlabelled=0, is the procedural data set. Further options are
              depth=exact or sparse, tasks=both, halves or depth, and style=game or camera.
            - depth:DATA or segmentation:DATA has the labels of one task only.
            - DATA + DATA has the samples of both.
            - memory:NAME@DIGEST is a data set that `from_dataset` made in this process.
        split: the split's name, such as "train". "val", "valid" and "validation" find each other.
        exports: also open layouts that `data convert` must convert first: kaggle, coco and exports of labelling tools.

    Raises: DataError if something is missing or invalid.
    Warns: DataWarning if the folder was converted, and its source has changed since.
    """
    data = os.fspath(data)
    if len(parts := parts_of(data)) > 1:
        return join(data, [open_split(part, split) for part in parts])
    task, data = task_of(data)
    if task is not None:
        return one_task(open_split(data, split), task)
    if is_scenes(data):
        return open_scenes(data, split)
    if opened.is_memory(data):
        return opened.find(data, split)
    layout, root, images = _find(data, exports)
    found = layout.open(data, root, split, images)
    if changed := source_changes(root, found.split):
        warnings.warn(changed, DataWarning, stacklevel=2)
    return found


def list_splits(data: str | os.PathLike[str], *, exports: bool = False) -> list[str]:
    """Return the sorted names of a data set's splits. For joined data sets, return the names that all of them have.

    Args:
        data: a folder, LAYOUT:FOLDER, `scenes`, or another spec that `open_split` takes.
        exports: also accept layouts that `data convert` must convert first.

    Raises: DataError for an invalid spec, or a folder without a known layout.
    """
    data = os.fspath(data)
    if len(parts := parts_of(data)) > 1:
        return sorted(set.intersection(*(set(list_splits(part)) for part in parts)))
    data = task_of(data)[1]
    if is_scenes(data):
        return ScenesSpec.parse(data).splits()
    if opened.is_memory(data):
        return opened.names(data)
    layout, root, _ = _find(data, exports)
    return layout.splits(root)


def _find(data: str, exports: bool) -> LayoutRoot:
    """Return the layout and root of a folder.

    Raises: DataError for an export of a labelling tool, unless `exports` is set.
    """
    place = find_layout(data)
    if place.layout.live or exports:
        return place
    raise DataError(
        f"Cannot use {data} without a conversion: it is of layout {place.layout.name} "
        f"({place.layout.why(place.root).partition(';')[0]})",
        fix=f"Convert it, then use the new folder: {convert_command(data)}",
    )
