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
        data: a folder (its contents tell the layout), or LAYOUT:FOLDER with one of folder, mmseg, camvid, voc,
            cityscapes, gta5, ade20k, kitti-semantic, kitti-depth, nyu, images. Or `scenes`,
            `scenes:HxW,train=64,val=16,seed=0,unlabelled=0`, with `depth=exact` or `depth=sparse` and `tasks=both`,
            `halves` or `depth`, `style=game` or `style=camera` (a folder of that name is `./scenes`).
            `,images=FOLDER` after a folder takes the images of the same samples from FOLDER/SPLIT/ID.png or
            FOLDER/ID.png. `depth:DATA` or `segmentation:DATA` has the labels of that task only.
            `DATA + DATA` has the samples of both. `memory:NAME@DIGEST` is what `from_dataset` made.
        split: its name, such as `train`, in all data sets if several are joined. `val` also finds `valid` or
            `validation`, and the reverse.
        exports: also open layouts that must be converted first, as `data convert` and `data check` do: kaggle, coco and
            exports of labelling tools.
    Raises: DataError with what is missing or malformed. Warns (DataWarning) if the folder was converted, and its
        source has changed since.
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
    """Return the sorted names of the splits that `open_split` would find, for joined data sets those that all have.

    Some splits share images on purpose, such as VOC's `trainval`.

    Raises: DataError for a malformed spec or a folder without a known layout.
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
    """Return the layout of a folder. Raises: DataError for an export of a labelling tool, unless `exports` is set."""
    place = find_layout(data)
    if place.layout.live or exports:
        return place
    raise DataError(
        f"Cannot use {data} without a conversion: it is of layout {place.layout.name} "
        f"({place.layout.why(place.root).partition(';')[0]})",
        fix=f"Convert it, then use the new folder: {convert_command(data)}",
    )
